"""Core attention for megatron-core's local layer spec: RoPE, GQA, packed rows, context parallelism, KV cache.

Megatron's own unfused core attention refuses packed rows and CP, and its packed RoPE synchronises with the
host for every layer; here both come from the row's `PackedContext`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from phi4r.models.backends import BACKENDS
from phi4r.models.packed import PackedContext
from phi4r.parallel import zigzag


def apply_rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """NeoX half-rotation x cos + rotate_half(x) sin over the first values of a head, as many as cos and sin
    have, computed in fp32."""
    if (dim := cos_TH.size(-1)) < x_TNH.size(-1):
        rotated = apply_rotary(x_TNH[..., :dim], cos_TH, sin_TH)
        return torch.cat([rotated, x_TNH[..., dim:]], dim=-1)
    first, second = x_TNH.float().chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x_TNH.float() * cos_TH[:, None] + rotated * sin_TH[:, None]).to(x_TNH.dtype)


class CoreAttention(torch.nn.Module):
    """Causal attention inside each document; built by megatron's SelfAttention, one per layer.

    `config` carries `phi4r_rotary` and `phi4r_attention_backend` (see `models/gpt.py`).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.head_dim = config.kv_channels
        self.rotary = config.phi4r_rotary
        self.backend = BACKENDS[config.phi4r_attention_backend]
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedContext | None = None,
    ) -> Tensor:
        """query [T local, N, H], key and value [T local, K, H], not yet rotated; returns [T local, N * H]."""
        context = packed_seq_params
        assert isinstance(context, PackedContext), "every stage needs the row's PackedContext (cu_seqlens)"
        cos, sin = context.rotary(self.rotary)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        cache = context.kv_cache
        if cache is not None and cache.decoding:
            return cache.attend(self.layer_number, query, key, value, self.scale).flatten(1)
        if cache is not None:
            cache.store(self.layer_number, key, value)
        elif context.cp > 1:
            both = torch.cat([key, value], dim=-1)
            both = gather_from_sequence_parallel_region(
                both, tensor_parallel_output_grad=True, group=self.cp_group
            )
            key, value = zigzag.to_row_order(both, context.cp).split(self.head_dim, dim=-1)
        return self.backend(query, key, value, context, self.scale).flatten(1)
