"""Qwen3 (dense): norms of queries and keys, one tensor each for Q, K, V, gate and up, tied in small sizes."""

from __future__ import annotations

from typing import Any

from phi4r.families.family import ChatFormat, Family, LayerTensor, Sampling

_COMMON: dict[str, Any] = {
    "num_query_groups": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "init_std": 0.02,
    "init_scheme": "normal",
    "dtype": "bf16",
}


def _size(num_layers: int, hidden: int, ffn: int, num_heads: int, *, tied: bool) -> dict[str, Any]:
    widths = {"hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": num_heads}
    return {"num_layers": num_layers, **widths, **_COMMON, "tie_embeddings": tied}


QWEN3 = Family(
    title="Qwen3",
    presets={
        "qwen3_0_6b": _size(28, 1024, 3072, 16, tied=True),
        "qwen3_1_7b": _size(28, 2048, 6144, 16, tied=True),
        "qwen3_4b": _size(36, 2560, 9728, 32, tied=True),
        "qwen3_8b": _size(36, 4096, 12_288, 32, tied=False),
    },
    qk_norm=True,
    options=frozenset(("tied_embeddings",)),
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    tensors=(
        LayerTensor("input_layernorm.weight", "input_layernorm.weight"),
        LayerTensor(
            "self_attn.qkv_proj.weight",
            "self_attention.linear_qkv.weight",
            "qkv",
            0,
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        ),
        LayerTensor("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
        LayerTensor("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
        LayerTensor("self_attn.o_proj.weight", "self_attention.linear_proj.weight", "plain", 1),
        LayerTensor("post_attention_layernorm.weight", "pre_mlp_layernorm.weight"),
        LayerTensor(
            "mlp.gate_up_proj.weight",
            "mlp.linear_fc1.weight",
            "gate_up",
            0,
            ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        ),
        LayerTensor("mlp.down_proj.weight", "mlp.linear_fc2.weight", "plain", 1),
    ),
    defaults={
        "rope_theta": 10_000.0,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
    },
    fixed={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "attention_dropout": (0.0,)},
    written={"use_sliding_window": False},
    chat=ChatFormat(header="<|im_start|>{role}\n", end="<|im_end|>", after_end="\n", pad=("<|endoftext|>",)),
    sampling=Sampling(temperature=0.6, top_p=0.95, top_k=20),
)
