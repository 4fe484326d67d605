"""The section `model`: which family, and how large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from phi4r.core.checks import at_least, positive, require
from phi4r.core.errors import ConfigError
from phi4r.families.family import Family
from phi4r.families.registry import get_family, presets
from phi4r.families.rotary import Rotary, parse_factors
from phi4r.families.sizes import LayerSizes

Dtype = Literal["fp64", "fp32", "bf16"]

SHAPE_FIELDS = (
    "family", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "head_dim", "tie_embeddings", "rms_norm_eps",
)  # fmt: skip
"""What weights depend on, besides the vocabulary; the rest (RoPE, context, dtype, backend) a user may change
on purpose."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer: a pre-norm decoder with grouped-query attention, RoPE and a SiLU-gated MLP."""

    preset: str = ""
    """A named size that fills in the fields below: phi4, phi4_reasoning, phi4_mini, phi4_mini_long,
    qwen3_0_6b, qwen3_1_7b, qwen3_4b, qwen3_8b, tiny or tiny_deep ("": take them as given)."""
    family: str = "phi4"
    """The family whose layers, file format and chat format the model has: phi4, phi4_mini, qwen3, or the
    import path of a description, package.module:name."""
    num_layers: int = 3
    """Decoder layers."""
    hidden_size: int = 128
    """Width of the residual stream."""
    ffn_hidden_size: int = 448
    """Width inside the gated MLP."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int = 2
    """Key/value heads, each shared by num_attention_heads / num_query_groups query heads."""
    head_dim: int = 32
    """Width of one head."""
    vocab_size: int = 0
    """Rows of the embedding and of the output head (0: the tokenizer's size rounded up to a multiple of
    64)."""
    tie_embeddings: bool = False
    """Whether the output head is the embedding's table."""
    rope_theta: float = 10_000.0
    """Base of the rotary angles. Phi-4 uses 250,000, doubled for the reasoning models."""
    rotary_fraction: float = 1.0
    """Share of a head that RoPE turns, its first values."""
    rope_short_factors: str = ""
    """longrope: divisors of the rotary frequencies in documents of up to original_max_position_embeddings
    tokens, with commas between ("": no longrope)."""
    rope_long_factors: str = ""
    """longrope: the same in longer documents. Where both lists are equal, nothing depends on the length."""
    original_max_position_embeddings: int = 0
    """longrope: the longest document that takes the short factors. The square root of 1 +
    log(max_position_embeddings / this) / log(this) multiplies cos and sin."""
    max_position_embeddings: int = 512
    """Longest document, in tokens, that the model is meant for."""
    rms_norm_eps: float = 1e-5
    """Added to the variance inside RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of random weights when init_scheme is "normal"."""
    init_scheme: Literal["normal", "fan_in"] = "fan_in"
    """Random weights: "normal" = N(0, init_std) as in Phi-4; "fan_in" = N(0, 1/fan_in), which suits tiny
    models."""
    dtype: Dtype = "fp32"
    """Compute and weight type. With bf16 the optimizer keeps fp32 master weights. fp64 is for proofs on CPU:
    it leaves a chaotic run nine more digits before rounding shows."""
    attention_backend: Literal["auto", "reference", "sdpa", "triton", "flash_attn"] = "auto"
    """Attention: "reference" is written out in fp32, "sdpa" is torch's, "triton" our kernels,
    "flash_attn" that package; "auto" takes the fastest of ours that runs here (see `phi4r doctor`)."""

    def __post_init__(self) -> None:
        names = ", ".join(presets())
        require(
            self.preset == "" or self.preset in presets(),
            "model.preset",
            f"expected one of {names}, got {self.preset!r}",
        )
        positive(
            "model",
            self,
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "head_dim",
            "rope_theta",
            "rotary_fraction",
            "max_position_embeddings",
            "rms_norm_eps",
            "init_std",
        )
        at_least("model", self, vocab_size=0, original_max_position_embeddings=0)
        require(
            self.head_dim % 2 == 0, "model.head_dim", f"must be even (RoPE turns pairs), got {self.head_dim}"
        )
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            "model.num_attention_heads",
            f"{self.num_attention_heads} heads cannot share {self.num_query_groups} KV heads",
        )
        self._check_family()

    def _check_family(self) -> None:
        """Refuse what the family's models do not have."""
        options, rotary = self.description.options, self.rotary
        require(
            rotary.dim % 2 == 0 and 0 < rotary.dim <= self.head_dim,
            "model.rotary_fraction",
            f"must turn an even number of a head's {self.head_dim} values, and {self.rotary_fraction:g} turns"
            f" {rotary.dim}",
        )
        for option, key, is_used in (
            ("partial_rotary", "rotary_fraction", rotary.dim != self.head_dim),
            ("longrope", "rope_long_factors", bool(rotary.long)),
        ):
            require(
                not is_used or option in options,
                f"model.{key}",
                f"models of the family {self.family} have no {option.replace('_', ' ')}",
            )
        require(
            not self.tie_embeddings or "tied_embeddings" in options,
            "model.tie_embeddings",
            f"models of the family {self.family} have a head of their own",
        )

    @classmethod
    def from_preset(cls, preset: str, **changes: Any) -> ModelConfig:
        """The named size with `changes` on top. (`ModelConfig(preset=...)` by itself only records the
        name.)"""
        if preset not in presets():
            raise ConfigError("model.preset", f"expected one of {', '.join(presets())}, got {preset!r}")
        return cls(**{"preset": preset, **presets()[preset], **changes})

    @property
    def description(self) -> Family:
        """The description of its family."""
        return get_family(self.family)

    @property
    def rotary(self) -> Rotary:
        """Its RoPE. Raises ConfigError for factors that do not fit."""
        dim = int(self.head_dim * self.rotary_fraction)
        short = parse_factors("model.rope_short_factors", self.rope_short_factors, dim)
        long = parse_factors("model.rope_long_factors", self.rope_long_factors, dim)
        original = self.original_max_position_embeddings
        require(
            bool(short) == bool(long) == bool(original),
            "model.original_max_position_embeddings",
            "longrope needs it together with rope_short_factors and rope_long_factors",
        )
        if not short:
            return Rotary(dim, self.rope_theta)
        return Rotary.longrope(dim, self.rope_theta, short, long, original, self.max_position_embeddings)

    def layer_sizes(self, tp: int = 1) -> LayerSizes:
        """Widths of its layers on one of `tp` tensor-parallel ranks."""
        return LayerSizes(
            hidden=self.hidden_size,
            q=self.num_attention_heads * self.head_dim // tp,
            kv=self.num_query_groups * self.head_dim // tp,
            ffn=self.ffn_hidden_size // tp,
            num_heads=self.num_attention_heads // tp,
            head_dim=self.head_dim,
            qk_norm=self.description.qk_norm,
        )

    def training_flops(self, num_tokens: float, sum_of_squares: float) -> float:
        """Model FLOPs (see `phi4r.families.sizes`) of training on documents of `num_tokens` tokens together,
        the squares of whose lengths add up to `sum_of_squares`."""
        layer = self.layer_sizes()
        linear = self.num_layers * layer.matrices + self.vocab_size * self.hidden_size
        return 6.0 * linear * num_tokens + 6.0 * self.num_layers * layer.q * sum_of_squares

    @property
    def num_parameters(self) -> int:
        """Exact number of weights (Phi-4: 14,659,507,200). Raises ConfigError while vocab_size is 0 (not yet
        known)."""
        require(
            self.vocab_size > 0,
            "model.vocab_size",
            "is 0 (taken from the tokenizer), so the size is not known yet",
        )
        tables = 1 if self.tie_embeddings else 2
        layers = self.num_layers * sum(self.layer_sizes().parameters)
        return layers + self.hidden_size + tables * self.vocab_size * self.hidden_size
