"""Learning-rate schedule: a pure function of the step."""

from __future__ import annotations

import math

from phi4r.configs.sections import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0): linear warm-up, then the configured decay to
    `min_lr_ratio * lr` at `num_steps`. The paper warms SFT up over 450 steps; its decay is open (section
    3)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
