"""Small random models of the families, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
SWITCH = 24
"""Longest document under the short factors."""
PHI3 = {**SIZES, "num_key_value_heads": 2, "hidden_size": 64}


def mini_config(**changes: Any) -> Phi3Config:
    """Phi-4-mini in small: heads of 16 values, of which 12 turn."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.0, 1.1, 1.0, 1.2, 1.0],
        "long_factor": [1.0, 1.5, 2.25, 4.0, 9.5, 31.0],
        "original_max_position_embeddings": SWITCH,
    }
    given = {**PHI3, "rope_parameters": rope, "original_max_position_embeddings": SWITCH}
    return Phi3Config(**{**given, "tie_word_embeddings": True, "sliding_window": 262_144, **changes})


def qwen3_config(**changes: Any) -> Qwen3Config:
    """Qwen3 in small: heads that together are wider than the hidden state."""
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    given = {**SIZES, "head_dim": 16, "rope_parameters": rope, "tie_word_embeddings": False}
    return Qwen3Config(**{**given, **changes})


CASES = {
    "phi4_mini": lambda: Phi3ForCausalLM(mini_config()),
    "qwen3": lambda: Qwen3ForCausalLM(qwen3_config()),
    "qwen3_tied": lambda: Qwen3ForCausalLM(qwen3_config(tie_word_embeddings=True)),
}


def make(case: str, folder: Path, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A random model, saved into `folder` in several shards; norms are not ones, so that a mix-up of two
    shows."""
    torch.manual_seed(0)
    model = CASES[case]()
    with torch.no_grad():
        for parameter in model.parameters():
            is_norm = parameter.dim() == 1
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if is_norm else 0.0))
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size="40KB")
    return model
