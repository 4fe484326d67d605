"""Kernels that compile_check must catch, and one that it must pass."""

from __future__ import annotations

import os
from collections.abc import Iterator

import triton
import triton.language as tl
from phi4r_kernels.aot import Variant


@triton.jit
def _products_kernel(
    a_desc, b_desc, out_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ABORT: tl.constexpr
):
    tl.static_assert(not ABORT, "planted")
    sums = tl.zeros([M, N], tl.float32)
    for step in tl.range(0, steps):
        sums = tl.dot(a_desc.load([0, step * K]), b_desc.load([0, step * K]).T, sums)
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], sums)


def _variant(
    name: str, m: int, n: int, k: int, num_warps: int, num_stages: int, abort: bool = False
) -> Variant:
    descriptors = {"a_desc": f"tensordesc<bf16[{m}, {k}]>", "b_desc": f"tensordesc<bf16[{n}, {k}]>"}
    signature = descriptors | {"out_ptr": "*fp32", "steps": "i32"}
    constexprs = {"M": m, "N": n, "K": k, "ABORT": abort}
    return Variant(name, 90, _products_kernel, signature, constexprs, ("out_ptr",), num_warps, num_stages)


class _Crash:
    """Ends the process as a failed assertion in the compiler does."""

    @property
    def arg_names(self) -> list[str]:
        os.abort()

    def is_gluon(self) -> bool:
        return False


def variants() -> Iterator[Variant]:
    """A kernel as it should be; one whose sums do not fit in registers; one with more buffers than shared
    memory holds; one that does not compile; one that takes the compiler's process with it."""
    yield _variant("sound", 64, 64, 64, 4, 2)
    yield _variant("spilling", 128, 256, 64, 4, 2)
    yield _variant("oversized", 128, 128, 128, 8, 5)
    yield _variant("broken", 64, 64, 64, 4, 2, abort=True)
    yield Variant("crashing", 90, _Crash(), {}, {}, (), 4, 2)
    yield _variant("sound after the crash", 64, 64, 32, 4, 2)
