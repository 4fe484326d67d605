"""Phi-4-mini: Phi-4's layers with tied embeddings, three quarters of a head rotated, and longrope."""

from __future__ import annotations

from typing import Any

from phi4r.families.family import ChatFormat, Family, Sampling
from phi4r.families.phi4 import PHI3_DEFAULTS, PHI3_FIXED, PHI3_TENSORS
from phi4r.families.rotary import factors_text

_LONG = factors_text([
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533,
    5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651,
    14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1,
    32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
])  # fmt: skip

_MINI: dict[str, Any] = {
    "num_layers": 32,
    "hidden_size": 3072,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 24,
    "num_query_groups": 8,
    "head_dim": 128,
    "vocab_size": 200_064,
    "tie_embeddings": True,
    "rope_theta": 10_000.0,
    "rotary_fraction": 0.75,
    "rope_short_factors": factors_text([1.0] * 48),
    "rope_long_factors": _LONG,
    "original_max_position_embeddings": 4096,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "init_std": 0.02,
    "init_scheme": "normal",
    "dtype": "bf16",
}

PHI4_MINI = Family(
    title="Phi-4-mini",
    presets={
        "phi4_mini": _MINI,
        # Documents of every length take the long factors, as servers do it for a context beyond 4,096 tokens:
        # what is sampled token by token then has the rates under which it is trained.
        "phi4_mini_long": {**_MINI, "rope_short_factors": _LONG},
    },
    options=frozenset(("tied_embeddings", "partial_rotary", "longrope")),
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    tensors=PHI3_TENSORS,
    defaults=PHI3_DEFAULTS,
    fixed=PHI3_FIXED,
    written={"embd_pdrop": 0.0, "resid_pdrop": 0.0},
    chat=ChatFormat(header="<|{role}|>", end="<|end|>", pad=("<|endoftext|>",)),
    sampling=Sampling(temperature=0.8, top_p=0.95),
)
