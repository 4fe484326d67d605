"""Host code that is worth C++: packing and n-gram statistics, from `phi4r_kernels._native` or in Python.

The C++ module is used when it was built; without it (no compiler at install time, or PHI4R_NATIVE=0 in the
environment) the Python references below do the same work, slower. Both give the same answer to the last bit:
a property test holds them together, and `benchmarks/native.py` measures what the difference costs.
"""

from __future__ import annotations

import os
from collections import Counter
from importlib import import_module
from types import ModuleType

import numpy as np
import numpy.typing as npt


def _find() -> tuple[ModuleType | None, str]:
    if os.environ.get("PHI4R_NATIVE", "1").lower() in ("0", "off", "false"):
        return None, "PHI4R_NATIVE=0 in the environment"
    try:
        return import_module("phi4r_kernels._native"), ""
    except ImportError as error:
        return None, f"the C++ module was not built at install time ({error})"


_NATIVE, _REASON = _find()


def backend() -> str:
    """ "native" when the C++ module does the work, "python" when the references do."""
    return "python" if _NATIVE is None else "native"


def reason() -> str:
    """Why `backend()` is "python"; empty when it is "native"."""
    return _REASON


def _check_lengths(lengths: npt.NDArray[np.int64], capacity: int) -> None:
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be a vector, found shape {lengths.shape}")
    if capacity < 1:
        raise ValueError(f"capacity must be positive, found {capacity}")
    bad = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(bad):
        raise ValueError(
            f"lengths[{bad[0]}] = {lengths[bad[0]]} is not between 1 and the capacity {capacity}"
        )


def pack_ffd(lengths: npt.ArrayLike, capacity: int) -> npt.NDArray[np.int32]:
    """First-fit-decreasing bin packing in O(n log n).

    lengths int64[n], each in 1..capacity. Returns bin int32[n], numbered from 0 in the order bins are opened:
    items are taken by length from the longest (ties by index), and each goes to the first bin with room.
    ValueError on bad input.
    """
    lengths_n = np.ascontiguousarray(lengths, dtype=np.int64)
    _check_lengths(lengths_n, capacity)
    if _NATIVE is None:
        return pack_ffd_python(lengths_n, capacity)
    return np.asarray(_NATIVE.pack_ffd(lengths_n, capacity))


def ngram_repetition(tokens: npt.ArrayLike, ngram: int, threshold: int) -> tuple[int, int, int]:
    """Frequency statistics of the n-grams of a token sequence (paper: the repetition penalty, 5-grams,
    threshold 5).

    tokens int32[n]. Returns (number of n-grams = max(n - ngram + 1, 0), number of distinct n-grams that occur
    more than `threshold` times, count of the most frequent n-gram, 0 if there is none). Exact: equal hashes
    are compared in full.
    """
    tokens_n = np.ascontiguousarray(tokens, dtype=np.int32)
    if tokens_n.ndim != 1:
        raise ValueError(f"tokens must be a vector, found shape {tokens_n.shape}")
    if ngram < 1:
        raise ValueError(f"ngram must be positive, found {ngram}")
    if _NATIVE is None:
        return ngram_repetition_python(tokens_n, ngram, threshold)
    count, distinct, most = _NATIVE.ngram_repetition(tokens_n, ngram, threshold)
    return int(count), int(distinct), int(most)


# --- reference


def pack_ffd_python(lengths: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int32]:
    """`pack_ffd` in Python: a segment tree over bins holds the room left, each node the most room below
    it."""
    size = 1
    while size < len(lengths):
        size *= 2
    room = [capacity] * (2 * size)
    bins = np.empty(len(lengths), dtype=np.int32)
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        node = 1
        while node < size:
            node *= 2
            if room[node] < length:
                node += 1
        bins[index] = node - size
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def ngram_repetition_python(
    tokens: npt.NDArray[np.int32], ngram: int, threshold: int
) -> tuple[int, int, int]:
    """`ngram_repetition` in Python: count the n-grams as tuples."""
    values = tokens.tolist()
    counts = Counter(zip(*(values[offset:] for offset in range(ngram)), strict=False))
    distinct = sum(count > threshold for count in counts.values())
    return max(len(values) - ngram + 1, 0), distinct, max(counts.values(), default=0)
