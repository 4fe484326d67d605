"""Mends Triton's interpreter so that tests can trust it: `install()`.

Triton keeps bfloat16 as uint16 bit patterns in numpy and, in 3.6 and 3.7, computes on the patterns: `tl.dot`,
`+`, `*`, `tl.sum` give garbage without an error, and float32 -> bfloat16 cuts bits off instead of rounding.
After `install()`

- arithmetic, comparisons, `tl.dot`, reductions and scans take bfloat16 for its value; results are rounded
  once, to nearest even (`tl.sum` of bfloat16 adds in float32 and rounds at the end, a GPU after every step);
- casts to bfloat16 round to nearest even, NaN stays NaN;
- `tensor_descriptor.atomic_add` (a TMA reduction on a GPU) exists for float32;
- triton.language is patched once in a process and not at every call of every helper, which is most of the
  interpreter's time on small tiles; so nothing can be compiled in such a process, which TRITON_INTERPRET=1
  rules out anyway;
- run-time loop bounds work with numpy 2.4.

It replaces private parts of Triton, hence only the versions of `triton_version.TESTED`. Not seen by any
interpreter: races, missing barriers, the order of atomics, shared memory and launch limits, wrong alignment
hints.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from phi4r_kernels.triton_version import TESTED

Array = npt.NDArray[Any]

_installed = False


def float32_to_bfloat16(x: Array) -> npt.NDArray[np.uint16]:
    """Bit patterns of x rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


def bfloat16_to_float32(bits: Array) -> npt.NDArray[np.float32]:
    """The values of bfloat16 bit patterns."""
    return (np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Mend the interpreter of this process; again is free. RuntimeError where Triton compiles
    (TRITON_INTERPRET=1 was not set before its import) or is of another version than those."""
    global _installed
    if _installed:
        return
    import triton

    version = triton.__version__.split("+")[0]
    if version not in TESTED:
        raise RuntimeError(
            f"triton {triton.__version__}: this mends the interpreter of triton {' and '.join(TESTED)}; "
            "install that one, or test kernels on a GPU"
        )
    from triton.runtime import interpreter

    # What Triton chose when it was imported, whatever the environment says now.
    if not isinstance(triton.language.sum, interpreter.InterpretedFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported: this process compiles kernels")
    _mend_casts(interpreter)
    _mend_arithmetic(interpreter)
    _mend_reductions(interpreter)
    _add_descriptor_reduce(interpreter)
    _patch_language_once(interpreter)
    _installed = True


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar.name == "bf16"


def _mend_casts(interpreter: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    float32, bfloat16 = interpreter.tl.float32, interpreter.tl.bfloat16
    stock_cast, stock_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if source == bfloat16:
            values = handle(bfloat16_to_float32(src.data), float32)
            return values if target == float32 else stock_cast(self, values, dst_type)
        if target == bfloat16:
            return handle(float32_to_bfloat16(src.data.astype(np.float32)), bfloat16)
        return stock_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        to_nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        widths = src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth
        if to_nearest and 8 not in widths:
            return self.cast_impl(src, dst_type)
        return stock_fp_to_fp(self, src, dst_type, rounding_mode)

    def get_bf16(self: Any, value: float) -> Any:
        return handle(float32_to_bfloat16(np.array([value], dtype=np.float32)), bfloat16)

    builder.cast_impl, builder.create_fp_to_fp, builder.get_bf16 = cast_impl, create_fp_to_fp, get_bf16


def _mend_arithmetic(interpreter: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    float32, bfloat16 = interpreter.tl.float32, interpreter.tl.bfloat16
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)

    def as_float(x: Any) -> Any:
        return handle(bfloat16_to_float32(x.data), float32) if _is_bfloat16(x) else x

    def wrap(stock: Callable[..., Any], num_operands: int) -> Callable[..., Any]:
        """`stock` on the values of bfloat16 operands; a float32 answer goes back to bfloat16, a truth value
        stays one."""

        def mended(self: Any, *args: Any) -> Any:
            operands, rest = args[:num_operands], args[num_operands:]
            if not any(map(_is_bfloat16, operands)) or (rest and rest[0] in bitwise):
                return stock(self, *args)
            result = stock(self, *map(as_float, operands), *rest)
            if result.data.dtype == np.float32:
                return handle(float32_to_bfloat16(result.data), bfloat16)
            return result

        return mended

    builder.unary_op = wrap(builder.unary_op, 1)
    builder.binary_op = wrap(builder.binary_op, 2)
    builder.ternary_op = wrap(builder.ternary_op, 3)
    builder.create_fma = wrap(builder.create_fma, 3)
    builder.create_rsqrt = wrap(builder.create_rsqrt, 1)
    stock_dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        result = stock_dot(self, as_float(a), as_float(b), as_float(d), *options)
        return handle(float32_to_bfloat16(result.data), bfloat16) if _is_bfloat16(d) else result

    builder.create_dot = create_dot


def _mend_reductions(interpreter: Any) -> None:
    handle, tl = interpreter.TensorHandle, interpreter.tl

    def retyped(tensor: Any, scalar: Any, data: Array) -> Any:
        type_ = tl.block_type(scalar, list(tensor.shape)) if tensor.type.is_block() else scalar
        return tl.core.tensor(handle(data, scalar), type_)

    def widened(tensor: Any) -> Any:
        return retyped(tensor, tl.float32, bfloat16_to_float32(tensor.handle.data))

    def narrowed(tensor: Any) -> Any:
        return retyped(tensor, tl.bfloat16, float32_to_bfloat16(tensor.handle.data))

    def wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
        """`stock` on float32 in place of bfloat16; what comes back as float32 is narrowed, indices stay."""

        def apply_impl(self: Any, tensors: tuple[Any, ...]) -> Any:
            narrow = [tensor.dtype == tl.bfloat16 for tensor in tensors]
            if not any(narrow):
                return stock(self, tensors)
            results = stock(self, tuple(widened(t) if n else t for t, n in zip(tensors, narrow)))
            # An index comes along as a second result of one input.
            results = results if isinstance(results, (list, tuple)) else (results,)
            return tuple(
                narrowed(result) if was_narrow and result.dtype == tl.float32 else result
                for result, was_narrow in zip_longest(results, narrow[: len(results)], fillvalue=False)
            )

        return apply_impl

    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = wrap(operation.apply_impl)


def _add_descriptor_reduce(interpreter: Any) -> None:
    ir, handle = interpreter._ir, interpreter.TensorHandle

    def create_descriptor_reduce(self: Any, kind: Any, desc: Any, value: Any, indices: Any) -> None:
        if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD or value.data.dtype != np.float32:
            raise NotImplementedError("the interpreter's descriptor reductions: atomic_add of float32 only")
        pointers, mask = desc.materialize_pointers(indices)
        inside = handle(mask, interpreter.tl.int1)
        data = handle(np.ascontiguousarray(np.broadcast_to(value.data, mask.shape)), value.dtype)
        self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, data, inside, ir.MEM_SEMANTIC.RELAXED, None)

    interpreter.InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce


def _patch_language_once(interpreter: Any) -> None:
    tl, builder = interpreter.tl, interpreter.interpreter_builder
    kept, nothing_to_undo = interpreter._LangPatchScope(), interpreter._LangPatchScope()
    for module in (tl, tl.core):
        interpreter._patch_builtin(module, builder, kept)
        interpreter._patch_builtin(module.tensor, builder, kept)
        interpreter._patch_lang_tensor(module.tensor, kept)
        interpreter._patch_lang_core(module, kept)
    interpreter._patch_builtin(tl.math, builder, kept)
    interpreter._patch_builtin(tl.core.tensor_descriptor_base, builder, kept)
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    interpreter._patch_lang = lambda fn: nothing_to_undo
