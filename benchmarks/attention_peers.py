"""Causal attention inside packed documents, by everybody: q [T, N, H], k and v [T, K, H] -> out [T, N, H].

A maker takes the `Documents` and returns the function; what depends on the documents alone (masks, plans) is
made there and not timed, because a model makes it once for all its layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import compile_exactly
from benchmarks.suite import INTERPRETED, SkippedError

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Documents:
    """Lengths of the packed documents, their offsets int32 [D + 1] on `device`."""

    lengths: tuple[int, ...]
    device: str

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def bounds(self) -> list[int]:
        """Offsets as integers, D + 1 of them."""
        out = [0]
        for n in self.lengths:
            out.append(out[-1] + n)
        return out

    def cu_seqlens(self) -> Tensor:
        """Offsets int32 [D + 1]."""
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.device)


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """The same with every score written out, in the inputs' own dtype: float64 gives the exact answer."""
    group = q.size(1) // k.size(1)
    outs = []
    for start, stop in pairwise(documents.bounds):
        q_NSH = q[start:stop].transpose(0, 1)
        k_NSH = k[start:stop].transpose(0, 1).repeat_interleave(group, 0)
        v_NSH = v[start:stop].transpose(0, 1).repeat_interleave(group, 0)
        scores = q_NSH @ k_NSH.transpose(1, 2) * q.size(-1) ** -0.5
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        probs = scores.masked_fill(future, float("-inf")).softmax(-1)
        outs.append((probs @ v_NSH).transpose(0, 1))
    return torch.cat(outs)


# --- torch


def _sdpa(documents: Documents, backend: SDPBackend) -> Attention:
    bounds = documents.bounds

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        with sdpa_kernel(backend):
            for start, stop in pairwise(bounds):
                one = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
                out = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
                outs.append(out[0].transpose(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    return call


def sdpa_cudnn(documents: Documents) -> Attention:
    """torch's SDPA with the cuDNN backend, one call per document (it has no packed form)."""
    if documents.device != "cuda":
        raise SkippedError("cuDNN needs a GPU")
    return _sdpa(documents, SDPBackend.CUDNN_ATTENTION)


def sdpa_flash(documents: Documents) -> Attention:
    """torch's SDPA with its FlashAttention backend, one call per document."""
    return _sdpa(documents, SDPBackend.FLASH_ATTENTION)


def sdpa_math(documents: Documents) -> Attention:
    """torch's SDPA with every score written out, one call per document; only where it is small."""
    if documents.num_tokens > 4096:
        raise SkippedError("its scores do not fit above 4,096 tokens")
    return _sdpa(documents, SDPBackend.MATH)


def varlen(documents: Documents) -> Attention:
    """torch's `varlen_attn` (FlashAttention-2) over the packed row."""
    if documents.device != "cuda":
        raise SkippedError("it has no CPU kernel")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise SkippedError(f"torch {torch.__version__} has no varlen_attn") from None
    parameters = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    gqa = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    offsets, longest = documents.cu_seqlens(), max(documents.lengths)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, offsets, offsets, longest, longest, **causal, **gqa)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.size(1) // k.size(1)
        return call(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))

    return call if _shares_heads(call, documents) else repeated


def _shares_heads(attend: Attention, documents: Documents) -> bool:
    """Whether query heads may share KV heads, which the first releases of `varlen_attn` do not promise."""
    size = (documents.num_tokens, 1, 64)
    q, k = (torch.randn(size, device=documents.device, dtype=torch.bfloat16) for _ in range(2))
    q = q.repeat(1, 2, 1)
    try:
        attend(q, k, k)
    except (RuntimeError, ValueError):
        return False
    return True


def flex(documents: Documents) -> Attention:
    """FlexAttention, compiled, with a causal document mask; the block mask is made beforehand."""
    if documents.device != "cuda":
        raise SkippedError("it has no backward on CPU, and compiles for longer than it is worth")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    num_tokens = documents.num_tokens
    lengths = torch.tensor(documents.lengths, device=documents.device)
    doc_T = torch.repeat_interleave(torch.arange(len(lengths), device=documents.device), lengths)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (doc_T[i] == doc_T[j])

    mask = create_block_mask(
        visible, None, None, num_tokens, num_tokens, device=documents.device, _compile=True
    )
    compiled = compile_exactly(flex_attention)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call


PEERS: dict[str, Callable[[Documents], Attention]] = {
    "sdpa_cudnn": sdpa_cudnn,
    "sdpa_flash": sdpa_flash,
    "sdpa_math": sdpa_math,
    "varlen_attn": varlen,
    "flex": flex,
}


# --- ours


def _ours(documents: Documents, path: str, deterministic: bool = False) -> Attention:
    if documents.device != "cuda":
        raise SkippedError(INTERPRETED)
    from phi4r_kernels.attention import flash_attention
    from phi4r_kernels.attention_plan import make_plan

    plan = make_plan(documents.bounds, documents.bounds, causal=True, device=documents.device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, plan, deterministic=deterministic, path=path)[0]

    return call


def ours(documents: Documents) -> Attention:
    """Ours in plain Triton."""
    return _ours(documents, "triton")


def ours_hopper(documents: Documents) -> Attention:
    """Ours on the path for Hopper GPUs."""
    return _ours(documents, "hopper")


def ours_deterministic(documents: Documents) -> Attention:
    """Ours in plain Triton, gradients equal to the last bit from run to run."""
    return _ours(documents, "triton", deterministic=True)


def ours_fastest(documents: Documents) -> Attention:
    """Ours as training calls it: the fastest path that fits."""
    return _ours(documents, "auto")


OURS: dict[str, Callable[[Documents], Attention]] = {
    "ours_hopper": ours_hopper,
    "ours": ours,
    "ours_deterministic": ours_deterministic,
}
