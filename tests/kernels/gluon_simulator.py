"""Runs the Hopper forward's own Python code on numpy: its partitions as threads, its barriers as barriers.

What Gluon names is replaced: shared memory is an array; an asynchronous copy poisons its target with NaN, is
carried out later by another thread and only then tells its barrier; an asynchronous product reads its
operands when it is waited for, the latest moment a GPU could. So a wrong parity, slot, count, coordinate or
mask gives a wrong result, a NaN, or a wait that never ends (an error after DEADLINE_S). Not simulated:
layouts, registers, how the threads of a warpgroup share one barrier, and the memory model.
"""

from __future__ import annotations

import random
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DEADLINE_S = 60


class Int(int):
    """A scalar of a kernel: arithmetic stays in it, `to` does nothing."""

    def to(self, dtype: object) -> Int:
        return self


def _stays(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def operation(self: Int, other: Any) -> Any:
        result = plain(self, other)
        return Int(result) if isinstance(result, int) else result

    return operation


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "and", "xor"):
    setattr(Int, f"__{_name}__", _stays(f"__{_name}__"))


class Values(np.ndarray):
    """A block of registers."""

    def to(self, dtype: Any) -> Values:
        return self.astype(dtype)


def values(x: Any) -> Values:
    return np.asarray(x).view(Values)


class Pointer:
    """An address in a flat array."""

    def __init__(self, memory: np.ndarray, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.memory, self.offset + by)


class Shared:
    """A buffer in shared memory or a view of one."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.data[i])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.data[start : start + length])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.transpose(order))


class Barrier:
    """An mbarrier: a phase ends when everybody arrived and every announced byte came."""

    changed = threading.Condition()

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def index(self, i: int) -> Barrier:
        raise AssertionError("a single barrier has no index")

    def arrive(self, count: int = 0, num_bytes: int = 0) -> None:
        with self.changed:
            assert self.count, "used before init"
            self.missing -= count
            self.bytes += num_bytes
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
            self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase & 1 != parity, DEADLINE_S):
                raise TimeoutError(f"phase {self.phase} never ended for one who waits for parity {parity}")


class Barriers(list):
    def index(self, i: int) -> Barrier:  # type: ignore[override]
        return self[i]


class Descriptor:
    """A 2-D tensor seen in blocks; what is outside reads as 0."""

    def __init__(self, tensor: np.ndarray, block: Sequence[int]) -> None:
        self.tensor, self.block, self.dtype, self.layout = tensor, block, tensor.dtype, None
        self.block_type = types.SimpleNamespace(nbytes=int(np.prod(block)) * tensor.itemsize)

    def read(self, row: int, column: int) -> np.ndarray:
        found = np.zeros(self.block, self.dtype)
        inside = self.tensor[row : row + self.block[0], column : column + self.block[1]]
        found[: inside.shape[0], : inside.shape[1]] = inside
        return found


class Product:
    """a b + c, not yet carried out."""

    def __init__(self, a: Any, b: Shared, c: np.ndarray | None) -> None:
        self.a, self.b, self.c = a, b, c

    def value(self) -> Values:
        a = self.a.data if isinstance(self.a, Shared) else self.a
        product = a.astype(np.float32) @ self.b.data.astype(np.float32)
        return values(product if self.c is None else product + self.c)


def _copy(desc: Descriptor, at: Sequence[int], barrier: Barrier, target: Shared) -> None:
    target.data[...] = np.nan

    def arrive() -> None:
        time.sleep(random.random() * 2e-3)
        target.data[...] = desc.read(*at)
        barrier.arrive(num_bytes=-desc.block_type.nbytes)

    threading.Thread(target=arrive, daemon=True).start()


def _mma(a: Any, b: Shared, c: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    return Product(a, b, c if use_acc else None)


def _mma_wait(outstanding: int, deps: Sequence[Any]) -> Any:
    done = tuple(dep.value() if isinstance(dep, Product) else dep for dep in deps)
    return done if len(done) > 1 else done[0]


def _specialize(partitions: Sequence[tuple[Any, tuple[Any, ...]]], warps: object, registers: object) -> None:
    errors: list[BaseException] = []

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except (AssertionError, TimeoutError, TypeError, ValueError, IndexError) as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _store(at: Pointer, what: np.ndarray, mask: np.ndarray) -> None:
    where = np.broadcast_to(mask, at.offset.shape)
    at.memory[at.offset[where]] = what[where]


def _allocate(dtype: Any, shape: Sequence[int], layout: object) -> Any:
    if layout != "barrier":
        return Shared(np.full(shape, np.nan, dtype))
    return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))


def _scalar_or(function: Callable[..., Any]) -> Callable[..., Any]:
    def either(*arguments: Any) -> Any:
        if any(isinstance(a, np.ndarray) for a in arguments):
            return values(function(*arguments))
        return Int(function(*arguments))

    return either


def launch(kernel: Any, num_programs: int, *arguments: Any, **constexprs: Any) -> None:
    """`kernel` (a Gluon function), once for every program, one after another."""
    program = [0]

    def nothing(*arguments: Any, **options: Any) -> None:
        return None

    gl = types.SimpleNamespace(
        int64=np.int64, float32=np.float32, constexpr=None,
        num_programs=lambda axis: Int(num_programs), program_id=lambda axis: Int(program[0]),
        where=_scalar_or(np.where), maximum=_scalar_or(np.maximum), minimum=_scalar_or(np.minimum),
        cdiv=lambda a, b: Int(-(-a // b)), static_range=range,
        load=lambda at: Int(at.memory[at.offset]), store=_store,
        arange=lambda begin, end, layout: values(np.arange(begin, end)),
        zeros=lambda shape, dtype, layout: values(np.zeros(shape, dtype)),
        full=lambda shape, value, dtype, layout: values(np.full(shape, value, dtype)),
        max=lambda x, axis: values(x.max(axis)), sum=lambda x, axis: values(x.sum(axis)),
        exp2=lambda x: values(np.exp2(x)), log2=lambda x: values(np.log2(x)),
        convert_layout=lambda x, layout: x, allocate_shared_memory=_allocate, warp_specialize=_specialize,
        NVMMADistributedLayout=nothing, BlockedLayout=nothing, SliceLayout=nothing, DotOperandLayout=nothing,
    )  # fmt: skip
    mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: "barrier", wait=lambda barrier, parity: barrier.wait(parity),
        arrive=lambda barrier, count: barrier.arrive(count),
        expect=lambda barrier, num_bytes: barrier.arrive(1, num_bytes),
        init=lambda barrier, count: barrier.__dict__.update(count=count, missing=count),
    )  # fmt: skip
    names = {
        "gl": gl, "mbarrier": mbarrier, "tma": types.SimpleNamespace(async_copy_global_to_shared=_copy),
        "warpgroup_mma": _mma, "warpgroup_mma_wait": _mma_wait, "fence_async_shared": nothing,
    }  # fmt: skip
    for name, value in kernel.fn.__globals__.items():
        if hasattr(value, "is_gluon"):
            names[name] = types.FunctionType(value.fn.__code__, names)
        elif hasattr(value, "value"):
            names[name] = value.value
    for program[0] in range(num_programs):
        names[kernel.fn.__name__](*arguments, **constexprs)
