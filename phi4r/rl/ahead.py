"""RUN/ahead: completions that were sampled ahead of the step that will train on them.

    draw_000012.jsonl    a whole draw, a line per request in order (rollout.staleness = 1)
    open_000012.jsonl    the open draws as the checkpoint after 12 steps needs them, whole answers and
                         beginnings, a line per request in order (rollout.continuous)

Files stay for as long as a checkpoint may need them and are of no use to readers; RUN/rollouts has the
samples as they were trained on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4r.core.io import JsonlWriter, read_jsonl
from phi4r.sampling.embedded import Completion


class AheadFolder:
    """The files of one run, on rank 0."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "ahead"

    def _files(self, kind: str) -> dict[int, Path]:
        found = ((re.fullmatch(kind + r"_(\d{6,})\.jsonl", path.name), path) for path in self.path.glob("*"))
        return {int(match[1]): path for match, path in found if match}

    # --- whole draws

    def put(self, draw: int, completions: Sequence[Completion]) -> None:
        """Keep the completions of a draw; the file appears whole."""
        with JsonlWriter(self.path / f"draw_{draw:06d}.jsonl") as writer:
            for completion in completions:
                writer.write(vars(completion))

    def take(self, draw: int) -> list[Completion] | None:
        """The completions of `draw`, if they are there. The files of later draws are of a future that will
        not be: they are deleted."""
        files = self._files("draw")
        for number, path in files.items():
            if number > draw:
                path.unlink()
        if draw not in files:
            return None
        return [_completion(row) for _, row in read_jsonl(files[draw])]

    def forget_before(self, draw: int) -> None:
        """Delete the files of draws that no checkpoint needs any more."""
        for number, path in self._files("draw").items():
            if number < draw:
                path.unlink()

    # --- open draws

    def put_open(self, step: int, draws: Mapping[int, Sequence[Completion]]) -> None:
        """Keep what there is of the open draws after `step` steps; the file appears whole."""
        with JsonlWriter(self.path / f"open_{step:06d}.jsonl") as writer:
            for draw, completions in sorted(draws.items()):
                for completion in completions:
                    writer.write({"draw": draw, **vars(completion)})

    def take_open(self, step: int) -> dict[int, list[Completion]]:
        """What there was of the open draws after `step` steps, or last before. What came later is of a future
        that will not be: it is deleted."""
        files = self._files("open")
        for number, path in files.items():
            if number > step:
                path.unlink()
        newest = max((number for number in files if number <= step), default=None)
        found: dict[int, list[Completion]] = {}
        for _, row in read_jsonl(files[newest]) if newest is not None else ():
            found.setdefault(row.pop("draw"), []).append(_completion(row))
        return found

    def forget_open(self, step: int, checkpoints: Collection[int], every: int) -> None:
        """Delete what neither the checkpoints after these numbers of steps need nor one that is to come:
        checkpoints are written every `every` steps, in the background, and when a run is stopped."""
        newest = max(checkpoints, default=-1)
        for number, path in self._files("open").items():
            may_come = number > newest and every > 0 and number % every == 0
            if number < step and number not in checkpoints and not may_come:
                path.unlink()


def _completion(row: dict[str, Any]) -> Completion:
    return Completion(**{**row, "spans": [(version, count) for version, count in row["spans"]]})
