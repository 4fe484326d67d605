"""Phi-4 and Phi-4-reasoning: separate embeddings, fused QKV and gate-up tensors, whole heads rotated."""

from __future__ import annotations

from typing import Any

from phi4r.families.family import ChatFormat, Family, LayerTensor, Sampling

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

PHI3_TENSORS = (
    LayerTensor("input_layernorm.weight", "input_layernorm.weight"),
    LayerTensor("self_attn.qkv_proj.weight", "self_attention.linear_qkv.weight", "qkv", 0),
    LayerTensor("self_attn.o_proj.weight", "self_attention.linear_proj.weight", "plain", 1),
    LayerTensor("post_attention_layernorm.weight", "pre_mlp_layernorm.weight"),
    LayerTensor("mlp.gate_up_proj.weight", "mlp.linear_fc1.weight", "gate_up", 0),
    LayerTensor("mlp.down_proj.weight", "mlp.linear_fc2.weight", "plain", 1),
)
"""Layers of a Phi3ForCausalLM."""

PHI3_DEFAULTS: dict[str, Any] = {
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
}
"""What transformers takes for what the config.json of a Phi3ForCausalLM leaves out."""

PHI3_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "qk_layernorm": (False,),
    "attention_dropout": (0.0,),
    "embd_pdrop": (0.0,),
    "resid_pdrop": (0.0,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
}

PHI4 = Family(
    title="Phi-4",
    presets={
        "phi4": _PHI4,
        # The reasoning models double the RoPE base and the context, and change nothing else.
        "phi4_reasoning": {**_PHI4, "rope_theta": 500_000.0, "max_position_embeddings": 32_768},
        "tiny": _TINY,
        # Four layers can be cut into two pipeline stages of two virtual stages each.
        "tiny_deep": {**_TINY, "num_layers": 4},
    },
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    tensors=PHI3_TENSORS,
    defaults=PHI3_DEFAULTS,
    fixed=PHI3_FIXED,
    written={"embd_pdrop": 0.0, "resid_pdrop": 0.0},
    chat=ChatFormat(
        header="<|im_start|>{role}<|im_sep|>",
        end="<|im_end|>",
        pad=("<|dummy_85|>", "<pad>", "<|pad|>", "<|endoftext|>"),
        # ids 100350 and 100351, after the pad token
        think_placeholders=("<|dummy_86|>", "<|dummy_87|>"),
    ),
    sampling=Sampling(temperature=0.8, top_p=0.95, top_k=50),
)
