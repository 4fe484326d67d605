"""The mended interpreter against torch's own bfloat16 arithmetic on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from phi4r_kernels import interpreter  # noqa: E402
from phi4r_kernels.interpreter import bfloat16_to_float32, float32_to_bfloat16  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

ROWS, COLUMNS = 32, 64
KERNELS = str(Path(__file__).parents[2] / "kernels")


@pytest.fixture(autouse=True)
def _mended() -> None:
    interpreter.install()


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr, OP: tl.constexpr):
    cells = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + cells), tl.load(y_ptr + cells)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "max":
        out = tl.maximum(x, y)
    elif OP == "where":
        out = tl.where(x > y, x, -y)
    elif OP == "scale":
        out = x * 0.375
    else:
        out = tl.full([BLOCK], 1.5, tl.bfloat16) + x
    tl.store(out_ptr + cells, out)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    cells = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + cells, tl.load(x_ptr + cells).to(out_ptr.dtype.element_ty))


@triton.jit
def _take_larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr, OP: tl.constexpr):
    rows, columns = tl.arange(0, R), tl.arange(0, C)
    x = tl.load(x_ptr + rows[:, None] * C + columns[None, :])
    if OP == "sum":
        out = tl.sum(x, 1)
    elif OP == "max":
        out = tl.max(x, 1)
    elif OP == "argmax":
        out = tl.argmax(x, 1)
    elif OP == "custom":
        out = tl.reduce(x, 1, _take_larger)
    else:
        out = tl.sum(tl.cumsum(x, 1), 1)
    tl.store(out_ptr + rows, out)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b.T))


@triton.jit
def _loop_kernel(count_ptr, out_ptr):
    total = 0
    for i in range(0, tl.load(count_ptr)):
        total += i
    tl.store(out_ptr, total)


@triton.jit
def _add_twice_kernel(sum_desc, R: tl.constexpr, C: tl.constexpr):
    sum_desc.atomic_add([R // 2, 0], tl.full([R, C], 1.25, tl.float32))
    sum_desc.atomic_add([0, 0], tl.full([R, C], 1.0, tl.float32))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add", lambda x, y: x + y),
        ("sub", lambda x, y: x - y),
        ("mul", lambda x, y: x * y),
        ("max", torch.maximum),
        ("where", lambda x, y: torch.where(x > y, x, -y)),
        ("scale", lambda x, y: x * 0.375),
        ("constant", lambda x, y: x + 1.5),
    ],
)
def test_elementwise_arithmetic_in_bfloat16_is_that_of_torch(
    op: str, expected: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    x, y, out = normal(256), normal(256), torch.full((256,), float("nan"), dtype=torch.bfloat16)
    _elementwise_kernel[(2,)](x, y, out, BLOCK=128, OP=op)
    assert torch.equal(out, expected(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_casts_to_bfloat16_round_to_nearest_even(dtype: torch.dtype) -> None:
    x = (torch.randn(4096) * 1000).to(dtype)
    if dtype == torch.float32:
        # Ties, the last finite values, infinity, subnormal numbers.
        ties = torch.arange(0x3F808000, 0x3F908000, 0x10000, dtype=torch.int32).view(torch.float32)
        edges = torch.tensor([3.3953e38, 3.4e38, float("inf"), -float("inf"), 1e-40, -0.0, 0.0])
        x = torch.cat([x, ties, edges])[-4096:]
    out = torch.empty_like(x, dtype=torch.bfloat16)
    _cast_kernel[(x.numel() // 128,)](x, out, BLOCK=128)
    assert torch.equal(out, x.bfloat16())


def test_a_nan_stays_a_nan_as_bfloat16() -> None:
    # Rounding the bits of a NaN with a full mantissa would carry into the sign.
    x = torch.tensor([0x7FFFFFFF, 0x7F800001] * 64, dtype=torch.int32).view(torch.float32)
    out = torch.zeros(128, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, BLOCK=128)
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_casts_from_bfloat16_are_those_of_torch(dtype: torch.dtype) -> None:
    x, out = normal(128) * 50, torch.zeros(128, dtype=dtype)
    _cast_kernel[(1,)](x, out, BLOCK=128)
    assert torch.equal(out, x.to(dtype))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        # tl.sum adds in float32 here and rounds once; the float64 sum differs from it by less than an ulp of
        # float32 times the row length, far below bfloat16's last place save on a tie.
        ("sum", lambda x: x.float().sum(1).bfloat16()),
        ("max", lambda x: x.float().amax(1)),
        ("argmax", lambda x: x.float().argmax(1).int()),
        ("custom", lambda x: x.amax(1)),
    ],
)
def test_reductions_take_bfloat16_for_its_value(
    op: str, expected: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    # Multiples of 1/64 below 4: every partial sum is exact in float32, whatever the order.
    x = (torch.randint(-255, 255, (ROWS, COLUMNS)) / 64).bfloat16()
    answer = expected(x)
    out = torch.zeros(ROWS, dtype=answer.dtype)
    _reduce_kernel[(1,)](x, out, R=ROWS, C=COLUMNS, OP=op)
    assert torch.equal(out, answer)


def test_scans_take_bfloat16_for_its_value() -> None:
    x, out = torch.ones(ROWS, 16).bfloat16(), torch.zeros(ROWS)
    _reduce_kernel[(1,)](x, out, R=ROWS, C=16, OP="cumsum")
    assert torch.equal(out, torch.full((ROWS,), 136.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_of_narrow_operands_sums_exact_products_in_float32(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 64).to(dtype), torch.randn(32, 64).to(dtype)
    out = torch.full((16, 32), float("nan"))
    _dot_kernel[(1,)](a, b, out, M=16, N=32, K=64)
    exact = a.double() @ b.double().T
    # 64 roundings of float32 of partial sums no larger than sum |a||b|.
    budget = 64 * 2**-24 * (a.double().abs() @ b.double().abs().T)
    assert ((out - exact).abs() <= budget).all()


def test_bfloat16_bits_survive_a_round_trip() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = bfloat16_to_float32(bits)
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(float32_to_bfloat16(values)[finite], bits[finite])
    torch.testing.assert_close(
        torch.from_numpy(values), torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float(),
        rtol=0, atol=0, equal_nan=True,
    )  # fmt: skip


def test_loop_bounds_may_be_loaded_at_run_time() -> None:
    count, out = torch.tensor([5], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _loop_kernel[(1,)](count, out)
    assert out.item() == 10


def test_a_descriptor_adds_to_memory_and_leaves_alone_what_is_outside() -> None:
    sums = torch.zeros(12, 16)
    # The descriptor sees the first 10 rows; the upper block reaches beyond them.
    seen = TensorDescriptor(sums, [10, 16], [16, 1], [8, 16])
    _add_twice_kernel[(1,)](seen, R=8, C=16)
    expected = torch.zeros(12, 16)
    expected[:8] += 1.0
    expected[4:10] += 1.25
    assert torch.equal(sums, expected)


def run_in_child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [KERNELS, os.environ.get("PYTHONPATH")]))}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=variables | paths | environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_process_that_compiles_kernels_is_refused() -> None:
    code = """
        import os, triton
        os.environ["TRITON_INTERPRET"] = "1"  # too late
        from phi4r_kernels import interpreter
        interpreter.install()
        """
    done = run_in_child(code)
    assert "RuntimeError: set TRITON_INTERPRET=1 before triton is imported" in done.stderr


def test_another_version_of_triton_is_refused_with_its_number() -> None:
    done = run_in_child(
        """
        import triton
        from phi4r_kernels import interpreter
        triton.__version__ = "9.9.1"
        interpreter.install()
        """,
        TRITON_INTERPRET="1",
    )
    assert "RuntimeError: triton 9.9.1: this mends the interpreter of triton 3.6.0 and 3.7.1" in done.stderr


def test_auto_leaves_the_kernels_to_tested_versions_of_triton() -> None:
    done = run_in_child(
        """
        import triton
        from phi4r.models.backends import why_not_auto
        from phi4r_kernels.triton_version import untested
        print(repr(why_not_auto(128, "bf16")))
        untested.cache_clear()
        triton.__version__ = "9.9.1"
        print(why_not_auto(128, "bf16"))
        print(why_not_auto(128, "bf16"))
        """,
        TRITON_INTERPRET="1",
    )
    reason = "the kernels are tested with triton 3.6.0 and 3.7.1, this is 9.9.1"
    assert done.stdout.splitlines() == ["''", reason, reason], done.stderr
    assert done.stderr.count("not used by 'auto'") == 1
