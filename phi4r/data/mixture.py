"""Mixture weights: how often each document is seen, as epochs per cluster (the paper's additive mixture).

A weight of 2.25 means: every document of the cluster twice, and a quarter of them, drawn by seed and id, a
third time. Domains are tuned one by one and put side by side, so a weight says nothing about other clusters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from phi4r.core.errors import UserError


def parse(text: str) -> dict[str, float]:
    """ "math=2.5, web=0.5" -> epochs per cluster; UserError naming the part that is wrong."""
    epochs: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = (piece.strip() for piece in part.rpartition("="))
        if not name or not re.fullmatch(r"\d+(\.\d+)?|\.\d+", value):
            raise UserError(f'--mixture: expected "cluster=epochs, ...", found {part!r}')
        epochs[name] = float(value)
    return epochs


def uniform(ids: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) that depend on (seed, id) only: the finaliser of splitmix64."""
    x = ids ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0x1F123BB5) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def copies(
    ids: npt.NDArray[np.uint64],
    clusters: npt.NDArray[np.int32],
    names: Sequence[str],
    epochs: Mapping[str, float],
    seed: int,
) -> npt.NDArray[np.int64]:
    """How often each document is seen, int64[N]. clusters: index of each document's cluster in `names`.

    A cluster is looked up by its whole name, then by the part before "/", then as "*"; clusters in none of
    them are seen once. UserError for a weight whose cluster no document is in.
    """
    for name in epochs:
        if name != "*" and name not in names and not any(n.partition("/")[0] == name for n in names):
            raise UserError(
                f"--mixture: no document is in cluster {name!r} (there are: {', '.join(sorted(names))})"
            )
    wanted = np.array(
        [epochs.get(name, epochs.get(name.partition("/")[0], epochs.get("*", 1.0))) for name in names]
    )[clusters]
    whole = wanted.astype(np.int64)
    return whole + (uniform(ids, seed) < wanted - whole)
