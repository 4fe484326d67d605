"""RoPE of a model in numbers: which part of a head turns, at which rates, and when longrope changes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi4r.core.checks import require
from phi4r.core.errors import ConfigError

if TYPE_CHECKING:
    from phi4r.families.model import ModelConfig


@dataclass(frozen=True)
class Rotary:
    """Pair i of the first `dim` values of a head turns by position / (factor_i theta^(2 i / dim)); cos and
    sin are multiplied by `scale`. longrope (arXiv 2402.13753): documents of up to `switch` tokens take the
    factors `short`, longer ones `long`; both are () without it."""

    dim: int
    theta: float
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    switch: int = 0
    scale: float = 1.0

    @property
    def switches(self) -> bool:
        """Whether the rates depend on the length of a document."""
        return self.short != self.long

    @classmethod
    def of(cls, model: ModelConfig) -> Rotary:
        """The RoPE of `model`. Raises ConfigError for factors that do not fit."""
        dim = int(model.head_dim * model.rotary_fraction)
        short = _factors("rope_short_factors", model.rope_short_factors, dim)
        long = _factors("rope_long_factors", model.rope_long_factors, dim)
        require(
            bool(short) == bool(long) == bool(model.original_max_position_embeddings),
            "model.original_max_position_embeddings",
            "longrope needs it together with rope_short_factors and rope_long_factors",
        )
        if not short:
            return cls(dim, model.rope_theta)
        original = model.original_max_position_embeddings
        ratio = model.max_position_embeddings / original
        scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        return cls(dim, model.rope_theta, short, long, original, scale)


def _factors(name: str, text: str, dim: int) -> tuple[float, ...]:
    try:
        factors = tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"model.{name}", f"expected numbers with commas between, got {text!r}") from None
    require(
        len(factors) in (0, dim // 2) and all(math.isfinite(f) and f > 0 for f in factors),
        f"model.{name}",
        f"expected {dim // 2} numbers above 0 (half of the {dim} values that turn), got {len(factors)}",
    )
    return factors


def factors_text(factors: list[float]) -> str:
    """The setting that means these factors."""
    return ",".join(repr(float(factor)) for factor in factors)
