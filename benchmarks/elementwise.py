"""What is bound by memory around the matrix products: eager torch, torch.compile and Liger's kernels.

    python -m benchmarks.elementwise [--tokens 8192] [--ops rms_norm swiglu rope]

    rms_norm  residual + x, then RMSNorm of the sum: x, residual [T, D] -> sum, normed [T, D]
    swiglu    silu(gate) * up: [gate | up] [T, 2F] -> [T, F]
    rope      rotation of q [T, N, H] and k [T, K, H] by their positions in packed documents (fp32 tables)

A kernel of our own is worth having where the best of these leaves more than 10% of the op. Modes: forward,
and forward_backward. Bytes are the least that must move. Rows go to results/elementwise.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure, suite
from benchmarks.shapes import SHAPES, Shape, documents
from benchmarks.suite import SkippedError

EPS = 1e-5
THETA = 500_000.0
MODES = ("forward", "forward_backward")
ERROR_TOKENS = 256
Function = Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """inputs: tensors with a gradient, then those without; grads: of the outputs; bytes moved by the forward
    and by the backward at least."""

    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    forward_bytes: float
    backward_bytes: float


# --- the ops in plain torch


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(x + residual, its RMSNorm times weight), the norm in at least fp32."""
    total = x + residual
    wide = total if total.dtype == torch.float64 else total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return total, normed.to(x.dtype) * weight


def swiglu(x: Tensor) -> tuple[Tensor]:
    """silu of the first half times the second half."""
    gate, up = x.chunk(2, -1)
    return (F.silu(gate) * up,)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide.chunk(2, -1)
    return (wide * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]).to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """NeoX half rotation of q and k; cos and sin [T, H]."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


EAGER: dict[str, Function] = {"rms_norm": add_rms_norm, "swiglu": swiglu, "rope": rope}


def rotary_tables(lengths: list[int], head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin fp32 [T, H] at each token's position in its document."""
    positions = torch.cat([torch.arange(n, device=device) for n in lengths]).float()
    inverse = THETA ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = (positions[:, None] * inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


# --- implementations


def eager(op: str, device: str) -> Function:
    """Plain torch."""
    del device
    return EAGER[op]


@cache
def compiled(op: str, device: str) -> Function:
    """torch.compile of the same lines."""
    if device != "cuda":
        raise SkippedError("compiling for CPU takes longer than it is worth here")
    return measure.compile_exactly(EAGER[op])


def liger(op: str, device: str) -> Function:
    """Liger's kernels, called as its own patches for Phi-3 call them."""
    if device != "cuda":
        raise SkippedError("a Triton kernel needs a GPU")
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        raise SkippedError("liger-kernel is not installed") from None

    def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = functional.liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False)
        return total, normed

    def gated(x: Tensor) -> tuple[Tensor]:
        return (functional.liger_swiglu(*x.chunk(2, -1)),)

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # It rotates in place, so a copy belongs to it here: q and k are views of a projection in a model.
        q_1NTH, k_1KTH = (x.clone().transpose(0, 1)[None] for x in (q, k))
        q_1NTH, k_1KTH = functional.liger_rope(q_1NTH, k_1KTH, cos[None], sin[None])
        return q_1NTH[0].transpose(0, 1), k_1KTH[0].transpose(0, 1)

    return {"rms_norm": norm, "swiglu": gated, "rope": rotated}[op]


IMPLEMENTATIONS = {"compile": compiled, "eager": eager, "liger": liger}


# --- inputs


def problem(op: str, shape: Shape, num_tokens: int, dtype: torch.dtype, device: str, seed: int) -> Problem:
    """Random inputs of one op; rope's row holds documents like those of reasoning traces."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=random).to(dtype)

    item, D, F_ = dtype.itemsize, shape.hidden, shape.ffn
    if op == "rms_norm":
        inputs = (normal(num_tokens, D), normal(num_tokens, D), normal(D))
        grads = (normal(num_tokens, D), normal(num_tokens, D))
        row = (
            num_tokens * D * item
        )  # in: x, residual; out: sum, normed; backward: sum, two gradients, one out
        return Problem(_leaves(inputs), (), grads, 4.0 * row, 4.0 * row)
    if op == "swiglu":
        row = num_tokens * F_ * item
        inputs, grads = (normal(num_tokens, 2 * F_),), (normal(num_tokens, F_),)
        return Problem(_leaves(inputs), (), grads, 3.0 * row, 5.0 * row)
    sizes = [(num_tokens, n, shape.head_dim) for n in (shape.num_heads, shape.num_kv_heads)]
    inputs, grads = tuple(normal(*size) for size in sizes), tuple(normal(*size) for size in sizes)
    tables = rotary_tables(documents("lognormal", num_tokens), shape.head_dim, device)
    moved = 2.0 * sum(x.numel() for x in inputs) * item + sum(t.numel() for t in tables) * 4
    return Problem(_leaves(inputs), tables, grads, moved, moved)


def _leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.requires_grad_() for x in tensors)


def outputs(function: Function, given: Problem, mode: str) -> tuple[Tensor, ...]:
    """The forward's outputs, or the gradients of the inputs."""
    if mode == "forward":
        with torch.no_grad():
            return function(*given.inputs, *given.constants)
    outs = function(*given.inputs, *given.constants)
    return torch.autograd.grad(outs, given.inputs, given.grads)


def errors(
    run: suite.Run, op: str, shape: Shape, dtype: torch.dtype, mode: str, said: set[str]
) -> dict[str, float]:
    """Errors of all implementations on 256 tokens against float64; missing and wrong ones are left out."""
    given = problem(op, shape, ERROR_TOKENS, dtype, run.device, seed=1)
    exact = Problem(
        _leaves(tuple(x.detach().double() for x in given.inputs)),
        tuple(x.double() for x in given.constants),
        tuple(x.double() for x in given.grads),
        0.0,
        0.0,
    )
    truth = outputs(EAGER[op], exact, mode)

    def measured(name: str) -> float:
        return measure.checked_error(outputs(IMPLEMENTATIONS[name](op, run.device), given, mode), truth)

    return suite.gather(run, {name: partial(measured, name) for name in IMPLEMENTATIONS}, said)


def main() -> int:
    """All ops, modes and sizes asked for."""
    parser = suite.parser(__doc__)
    parser.add_argument("--ops", nargs="+", choices=tuple(EAGER), default=list(EAGER))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options = parser.parse_args()
    run = suite.start("elementwise", options)
    shape = SHAPES[run.shape]
    dtype = torch.bfloat16 if run.device == "cuda" else torch.float32
    said: set[str] = set()
    for op in options.ops:
        for mode in options.modes:
            right = errors(run, op, shape, dtype, mode, said)
            functions = {name: IMPLEMENTATIONS[name](op, run.device) for name in right}
            for num_tokens in options.tokens:
                given = problem(op, shape, num_tokens, dtype, run.device, seed=0)
                moved = given.forward_bytes + (given.backward_bytes if mode != "forward" else 0.0)
                sets = [given]
                for seed in range(1, measure.rotations(moved, run.device)):
                    sets.append(problem(op, shape, num_tokens, dtype, run.device, seed))
                what = suite.Comparison(
                    op=op,
                    mode=mode,
                    case="packed" if op == "rope" else "rows",
                    dtype=str(dtype).removeprefix("torch."),
                    shape="x".join(str(n) for n in given.inputs[0].shape[1:]),
                    tokens=num_tokens,
                    flops=0.0,
                    bytes=moved,
                    against=("compile", "eager"),
                    errors=right,
                )
                print(f"{op} {mode}, {num_tokens:,} tokens")
                suite.compare(run, what, calls(functions, sets, mode))
    suite.finish(run)
    return 0


def calls(
    functions: dict[str, Function], sets: list[Problem], mode: str
) -> dict[str, Callable[[int], tuple[Tensor, ...]]]:
    """Timed calls over the rotated inputs."""

    def timed(function: Function) -> Callable[[int], tuple[Tensor, ...]]:
        return lambda i: outputs(function, sets[i % len(sets)], mode)

    return {name: timed(function) for name, function in functions.items()}


if __name__ == "__main__":
    sys.exit(main())
