"""Attention backends: functions from rotated q, k, v of one packed row to its attention output.

Each takes q [Tq, N, H] (this rank's local queries), k and v [T, K, H] (the whole row, K dividing N), the
row's `PackedContext` and the softmax scale, and returns [Tq, N, H]. `BACKENDS` is where the Triton kernel
plugs in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from phi4r.errors import UserError
from phi4r.model.packed import PackedContext

Backend = Callable[[Tensor, Tensor, Tensor, PackedContext, float], Tensor]

# Up to this many tokens one call with a dense mask costs less on CPU than a call per document.
DENSE_MASK_TOKENS = 512


def reference_attention(q: Tensor, k: Tensor, v: Tensor, context: PackedContext, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v in fp32 (fp64 for fp64 input), written out: the reference for every other
    backend."""
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.size(1) // k.size(1)
    q_NTH = q.transpose(0, 1).to(compute)
    k_NTH = k.repeat_interleave(group, 1).transpose(0, 1).to(compute)
    v_NTH = v.repeat_interleave(group, 1).transpose(0, 1).to(compute)
    scores = (q_NTH @ k_NTH.transpose(1, 2)) * scale
    probs = scores.masked_fill(~context.mask(), float("-inf")).softmax(-1)
    return (probs @ v_NTH).transpose(0, 1).to(q.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, context: PackedContext, scale: float) -> Tensor:
    """torch's scaled_dot_product_attention: one masked call for short rows, one causal call per document for
    long ones."""
    q_1NTH, k_1KTH, v_1KTH = (x.transpose(0, 1)[None] for x in (q, k, v))
    if context.num_tokens <= DENSE_MASK_TOKENS:
        out = F.scaled_dot_product_attention(
            q_1NTH, k_1KTH, v_1KTH, attn_mask=context.mask(), scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    pieces = []
    for q_lo, q_hi, k_lo, k_hi in context.segments():
        whole = q_hi - q_lo == k_hi - k_lo
        # A piece that starts inside its document sees all earlier keys: a causal mask, lower right.
        mask = (
            None
            if whole
            else torch.ones(q_hi - q_lo, k_hi - k_lo, dtype=torch.bool, device=q.device).tril(
                (k_hi - k_lo) - (q_hi - q_lo)
            )
        )
        out = F.scaled_dot_product_attention(
            q_1NTH[:, :, q_lo:q_hi], k_1KTH[:, :, k_lo:k_hi], v_1KTH[:, :, k_lo:k_hi],
            attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True,
        )  # fmt: skip
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


BACKENDS: dict[str, Backend] = {"reference": reference_attention, "sdpa": sdpa_attention}


def select_backend(name: str) -> str:
    """The backend that `model.attention_backend = name` means on this machine."""
    if name == "auto":
        return "sdpa"
    if name not in BACKENDS:
        raise UserError(
            f"model.attention_backend: unknown backend {name!r}, expected auto or one of {sorted(BACKENDS)}"
        )
    return name
