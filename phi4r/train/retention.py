"""Which checkpoints a run keeps: the newest, every n-th step, and the best by a metric. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from phi4r.configs.sections import CheckpointConfig


@dataclass(frozen=True)
class Retention:
    """What to keep: the `keep_last` newest (0: all), multiples of `keep_every` (0: none), the best one."""

    keep_last: int = 2
    keep_every: int = 0
    best_metric: str = ""
    best_mode: Literal["min", "max"] = "min"

    @classmethod
    def of(cls, config: CheckpointConfig) -> Retention:
        """The retention that a configuration asks for."""
        return cls(config.keep_last, config.keep_every, config.best_metric, config.best_mode)

    def best(self, metrics: Mapping[int, Mapping[str, float]]) -> int | None:
        """The step with the best `best_metric` among {step: metrics}; of equals the earliest. None without
        one."""
        sign = 1 if self.best_mode == "min" else -1
        values = {
            step: found[self.best_metric] for step, found in metrics.items() if self.best_metric in found
        }
        finite = [(sign * value, step) for step, value in values.items() if math.isfinite(value)]
        return min(finite)[1] if finite else None

    def to_retire(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps of {step: metrics} that nothing asks to keep, oldest first."""
        if self.keep_last == 0:
            return []
        steps = sorted(metrics)
        kept = {*steps[-self.keep_last :], self.best(metrics)}
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        return [step for step in steps if step not in kept]
