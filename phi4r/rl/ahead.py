"""RUN/ahead: completions that were sampled ahead of the step that will train on them.

One file a draw, draw_000012.jsonl, a line per request in order. Files stay for as long as a checkpoint may
need them and are of no use to readers; RUN/rollouts has the samples as they were trained on.
"""

from __future__ import annotations

import re
from pathlib import Path

from phi4r.io import JsonlWriter, read_jsonl
from phi4r.rl.rollout import Completion

_FILE = re.compile(r"draw_(\d{6,})\.jsonl")


class AheadFolder:
    """The files of one run, on rank 0."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "ahead"

    def _files(self) -> dict[int, Path]:
        found = ((_FILE.fullmatch(path.name), path) for path in self.path.glob("draw_*.jsonl"))
        return {int(match[1]): path for match, path in found if match}

    def put(self, draw: int, completions: list[Completion]) -> None:
        """Keep the completions of a draw; the file appears whole."""
        with JsonlWriter(self.path / f"draw_{draw:06d}.jsonl") as writer:
            for completion in completions:
                writer.write(vars(completion))

    def take(self, draw: int) -> list[Completion] | None:
        """The completions of `draw`, if they are there. The files of later draws are of a future that will
        not be: they are deleted."""
        files = self._files()
        for number, path in files.items():
            if number > draw:
                path.unlink()
        if draw not in files:
            return None
        return [Completion(**row) for _, row in read_jsonl(files[draw])]

    def forget_before(self, draw: int) -> None:
        """Delete the files of draws that no checkpoint needs any more."""
        for number, path in self._files().items():
            if number < draw:
                path.unlink()
