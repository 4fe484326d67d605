"""Model sizes by name: `model.preset = "phi4"` fills in the fields below, and anything set beside it wins
over it."""

from __future__ import annotations

from typing import Any

_PHI4: dict[str, Any] = {
    "num_layers": 40,
    "hidden_size": 5120,
    "ffn_hidden_size": 17920,
    "num_attention_heads": 40,
    "num_query_groups": 10,
    "head_dim": 128,
    "vocab_size": 100_352,
    "rope_theta": 250_000.0,
    "max_position_embeddings": 16_384,
    "rms_norm_eps": 1e-5,
    "init_std": 0.02,
    "init_scheme": "normal",
    "dtype": "bf16",
}

_TINY: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 128,
    "ffn_hidden_size": 448,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 32,
    "vocab_size": 0,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "init_std": 0.02,
    "init_scheme": "fan_in",
    "dtype": "fp32",
}

PRESETS: dict[str, dict[str, Any]] = {
    "phi4": _PHI4,
    # The reasoning models double the RoPE base and the context, and change nothing else.
    "phi4_reasoning": {**_PHI4, "rope_theta": 500_000.0, "max_position_embeddings": 32_768},
    "tiny": _TINY,
    # Four layers can be cut into two pipeline stages of two virtual stages each.
    "tiny_deep": {**_TINY, "num_layers": 4},
}
