"""The fast path of `attention` on Hopper: when it is taken, how it is launched, and what ships of it.

Only the forward; the backward is `attention`'s own. The kernel is in `attention_hopper_kernel`. Compiled for
sm_90 and checked by `benchmarks.compile_check`; no interpreter runs Gluon, and it has not been run by us on a
GPU. So it proves itself in every process before it is used: `reason` computes a small packed row with it and
in plain PyTorch, and a compiler error or another answer sends everything to the portable kernels, with one
warning.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
import warnings
from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from phi4r_kernels.aot import Variant
from phi4r_kernels.attention_plan import Q_TILE, make_plan

VERSIONS = ("3.6.", "3.7.")
"""Versions of Triton whose Gluon the kernel is written for; Gluon is experimental and changes."""

KEYS = 128
"""Keys of one block."""
STAGES = 2
"""Blocks of keys, and of values, in shared memory."""
REGISTERS = (240, 24)
"""Per thread of a consumer and of the producer; with the first consumer's they fill the register file."""

DEADLINE_S = 60
"""For the check of a row of 700 tokens, which takes microseconds, on a device others may be using."""

HEAD_DIMS = (64, 128)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def reason(q: Tensor) -> str:
    """Why q [Tq, N, H] does not take the fast path; "" if it does. The first call of a process for a device,
    dtype and head dimension compiles and checks the kernel, which a stream being captured cannot do."""
    if q.device.type != "cuda":
        return f"it runs on CUDA, not on {q.device.type}"
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"it is for compute capability 9.0, not {torch.cuda.get_device_capability(q.device)}"
    if not triton.__version__.startswith(VERSIONS):
        return f"it is written for triton {' and '.join(v + 'x' for v in VERSIONS)}, not {triton.__version__}"
    if q.dtype not in DTYPES or q.size(2) not in HEAD_DIMS:
        return f"it takes bf16 and fp16 and head dimensions {HEAD_DIMS}, not {q.dtype} and {q.size(2)}"
    key = (q.device.index or 0, q.dtype, q.size(2))
    if key not in _checked:
        if torch.cuda.is_current_stream_capturing():
            return "it has not been checked before this capture: run once without capturing"
        _checked[key] = _self_check(*key)
        if _checked[key]:
            warnings.warn(
                f"attention's Hopper path is not used: {_checked[key]}; the portable kernels take its place",
                stacklevel=2,
            )
    return _checked[key]


_checked: dict[tuple[int, torch.dtype, int], str] = {}


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _layout(block: int, dim: int, dtype: str) -> object:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(
        [block, dim], {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
    )


def _descriptor(x: Tensor, block: int) -> object:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    columns = (x.size(1) - 1) * x.stride(1) + x.size(2)
    layout = _layout(block, x.size(2), DTYPES[x.dtype])
    return TensorDescriptor(x, [x.size(0), columns], [x.stride(0), 1], [block, x.size(2)], layout)


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_tiles: Tensor, scale: float, section: int
) -> tuple[Tensor, Tensor]:
    """(out [Tq, N, H], lse fp32 [N, Tq]) as `attention`'s forward; strides as a descriptor can read them;
    section: query heads that work side by side."""
    from phi4r_kernels.attention_hopper_kernel import _attention_fwd_hopper_kernel

    (num_queries, num_heads, dim), num_kv_heads = q.shape, k.size(1)
    out = torch.empty(num_queries, num_heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_heads, num_queries, dtype=torch.float32, device=q.device)
    programs = min(q_tiles.size(0) * num_heads, _multiprocessors(q.device.index or 0))
    _attention_fwd_hopper_kernel[(programs,)](
        _descriptor(q, Q_TILE), _descriptor(k, KEYS), _descriptor(v, KEYS), out, lse, q_tiles,
        q_tiles.size(0), section, num_queries, num_heads, q.stride(1), k.stride(1), v.stride(1),
        scale * math.log2(math.e),
        GROUP=num_heads // num_kv_heads, H=dim, BM=Q_TILE, BN=KEYS, STAGES=STAGES,
        CONSUMER_REGISTERS=REGISTERS[0], PRODUCER_REGISTERS=REGISTERS[1], num_warps=4,
    )  # fmt: skip
    return out, lse


def _wait(where: torch.device) -> None:
    """Until the device has done what was asked of it. RuntimeError after DEADLINE_S: barriers that wait for
    each other can only be left by ending the process."""
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(where))
    deadline = time.monotonic() + DEADLINE_S
    while not done.query():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"attention's Hopper kernel did not finish a row of 700 tokens in {DEADLINE_S} s on {where}: "
                "start again with path='triton'"
            )
        time.sleep(0.001)


def _self_check(device: int, dtype: torch.dtype, dim: int) -> str:
    """What is wrong with the kernel on this device, "" if nothing: a row with a document of one token, of a
    block less one, and of several blocks, against fp32 softmax in PyTorch."""
    where = torch.device("cuda", device)
    bounds = [0, 1, 128, 700]
    tiles = make_plan(bounds, bounds, causal=True, device=where).q_tiles
    random = torch.Generator(where).manual_seed(0)
    q, k, v = (
        torch.randn(bounds[-1], heads, dim, generator=random, device=where, dtype=torch.float32).to(dtype)
        for heads in (4, 2, 2)
    )
    scale = 1 / math.sqrt(dim)
    try:
        out, lse = forward(q, k, v, tiles, scale, section=4)
    except (RuntimeError, TritonError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    _wait(where)
    # A p rounded to dtype, and the result: relative errors of half an ulp each, of a convex sum of values.
    ulp = torch.finfo(dtype).eps
    for start, stop in itertools.pairwise(bounds):
        q_NTH, k_NTH, v_NTH = (
            x[start:stop].float().repeat_interleave(4 // x.size(1), 1).transpose(0, 1) for x in (q, k, v)
        )
        scores = (q_NTH @ k_NTH.transpose(1, 2)) * scale
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        expected = (scores.softmax(-1) @ v_NTH).transpose(0, 1)
        budget = 2 * ulp * (scores.softmax(-1) @ v_NTH.abs()).transpose(0, 1) + ulp
        wrong = ((out[start:stop].float() - expected).abs() > budget).sum().item()
        if wrong or not torch.allclose(lse[:, start:stop], scores.logsumexp(-1), rtol=1e-4, atol=1e-3):
            return f"document {start}..{stop} of the check comes out wrong in {wrong:,} places"
    return ""


def variants(group: int = 4) -> Iterator[Variant]:
    """The kernel for Hopper, both head dimensions, bf16 and fp16, GQA groups of `group`."""
    from phi4r_kernels.attention_hopper_kernel import _attention_fwd_hopper_kernel as kernel

    pointers = {"out_ptr", "lse_ptr", "tiles_ptr"}
    strides = {"q_head", "k_head", "v_head"}
    for dim in HEAD_DIMS:
        for dtype in DTYPES.values():
            blocks = {"q_desc": Q_TILE, "k_desc": KEYS, "v_desc": KEYS}
            signature = dict.fromkeys(kernel.arg_names[6:13], "i32") | {"qk_scale": "fp32"}
            signature |= {"out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "tiles_ptr": "*i32"}
            for name, block in blocks.items():
                signature[name] = f"tensordesc<{dtype}[{block}, {dim}],{_layout(block, dim, dtype)!r}>"
            constexprs = {
                "GROUP": group, "H": dim, "BM": Q_TILE, "BN": KEYS, "STAGES": STAGES,
                "CONSUMER_REGISTERS": REGISTERS[0], "PRODUCER_REGISTERS": REGISTERS[1],
            }  # fmt: skip
            aligned = tuple(name for name in kernel.arg_names if name in pointers | strides)
            yield Variant(
                f"attention hopper fwd H{dim} {dtype}", 90, kernel, signature, constexprs, aligned, 4, 2
            )
