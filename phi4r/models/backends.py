"""Attention backends: functions from rotated q, k, v of one packed row to its attention output.

Each takes q [Tq, N, H] (this rank's local queries), k and v [T, K, H] (the whole row, K dividing N), the
row's `PackedContext` and the softmax scale, and returns [Tq, N, H]. `BACKENDS` names them;
`select_backend` says which one a machine can run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from phi4r.core import optional
from phi4r.core.errors import UserError
from phi4r.models.packed import PackedContext

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


def triton_attention(q: Tensor, k: Tensor, v: Tensor, context: PackedContext, scale: float) -> Tensor:
    """Our FlashAttention kernels (`phi4r_kernels.attention`), with the row's plan."""
    from phi4r_kernels.attention import flash_attention

    return flash_attention(q, k, v, context.plan(), scale=scale)[0]


def flash_attn_attention(q: Tensor, k: Tensor, v: Tensor, context: PackedContext, scale: float) -> Tensor:
    """The package flash-attn (2.1 or later: causal masks are aligned at the last query and key)."""
    function = optional.require("flash_attn").flash_attn_varlen_func
    pieces = context.varlen()
    if pieces.key_index is not None:
        k, v = k[pieces.key_index], v[pieces.key_index]
    out: Tensor = function(
        q, k, v, pieces.query_bounds, pieces.key_bounds, pieces.max_queries, pieces.max_keys,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
    return out


BACKENDS: dict[str, Backend] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "triton": triton_attention,
    "flash_attn": flash_attn_attention,
}


def why_not_triton(head_dim: int, dtype: str) -> str:
    """Why the Triton kernels cannot serve heads of `head_dim` in `dtype` ("bf16", ...) here; "" if they
    can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    if interpreted and torch.cuda.is_available():
        return "TRITON_INTERPRET=1 runs the kernels on the CPU, and this machine has a GPU"
    # Not at the top: triton is optional, and reads TRITON_INTERPRET when it is first imported.
    from phi4r_kernels.attention_tiles import HEAD_DIMS

    if head_dim not in HEAD_DIMS:
        return f"model.head_dim is {head_dim}, the kernels take {', '.join(map(str, HEAD_DIMS))}"
    if dtype != "bf16" and not (interpreted and dtype == "fp32"):
        return f"model.dtype is {dtype}, the kernels take bf16"
    return ""


def why_not_auto(head_dim: int, dtype: str) -> str:
    """Why "auto" does not take the Triton kernels here: that they cannot serve, or have not been tested with
    this version of triton (they run with it where they are asked for); "" if it does."""
    if reason := why_not_triton(head_dim, dtype):
        return reason
    from phi4r_kernels.triton_version import untested

    return untested()


def why_not_flash_attn(dtype: str) -> str:
    """Why the package flash-attn cannot be used here; "" if it can."""
    if not optional.available("flash_attn"):
        return f"flash-attn is not installed: {optional.TABLE['flash_attn'].install}"
    if not torch.cuda.is_available():
        return "there is no GPU"
    return "" if dtype == "bf16" else f"model.dtype is {dtype}, flash-attn takes bf16"


def select_backend(name: str, head_dim: int = 128, dtype: str = "bf16") -> str:
    """The backend that `model.attention_backend = name` means on this machine for a model with these heads:
    "auto" is triton on a GPU where its kernels fit, else sdpa. UserError if `name` cannot run here."""
    if name == "auto":
        on_gpu = torch.cuda.is_available()
        return "triton" if on_gpu and not why_not_auto(head_dim, dtype) else "sdpa"
    if name not in BACKENDS:
        raise UserError(
            f"model.attention_backend: unknown backend {name!r}, expected auto or one of {sorted(BACKENDS)}"
        )
    if name == "triton" and (reason := why_not_triton(head_dim, dtype)):
        raise UserError(f"model.attention_backend: triton cannot be used: {reason}; expected auto or sdpa")
    if name == "flash_attn" and (reason := why_not_flash_attn(dtype)):
        raise UserError(f"model.attention_backend: flash_attn cannot be used: {reason}")
    return name
