"""RoPE of a model in numbers: which part of a head turns, at which rates, and when longrope changes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from phi4r.core.checks import require
from phi4r.core.errors import ConfigError


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

    def why_not_sampled(self, longest: int) -> str:
        """Why sequences of up to `longest` tokens cannot be sampled token by token: keys that were cached
        under the short factors would meet queries under the long ones. "" if they can."""
        if not self.switches or longest <= self.switch:
            return ""
        return (
            f"{longest:,} tokens pass model.original_max_position_embeddings ({self.switch:,}), where"
            " longrope changes the rates of keys that are cached already; expected model.rope_short_factors"
            " equal to rope_long_factors, as in the preset phi4_mini_long, or fewer tokens"
        )

    @classmethod
    def longrope(
        cls,
        dim: int,
        theta: float,
        short: tuple[float, ...],
        long: tuple[float, ...],
        original: int,
        longest: int,
    ) -> Rotary:
        """For a model that was trained on `original` tokens and then extended to `longest`."""
        ratio = longest / original
        scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        return cls(dim, theta, short, long, original, scale)


def parse_factors(key: str, text: str, dim: int) -> tuple[float, ...]:
    """The factors that the setting `key` means: half of `dim`, or (). Raises ConfigError."""
    try:
        factors = tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(key, f"expected numbers with commas between, got {text!r}") from None
    require(
        len(factors) in (0, dim // 2) and all(math.isfinite(f) and f > 0 for f in factors),
        key,
        f"expected {dim // 2} numbers above 0 (half of the {dim} values that turn), got {len(factors)}",
    )
    return factors


def factors_text(factors: list[float]) -> str:
    """The setting that means these factors."""
    return ",".join(repr(float(factor)) for factor in factors)
