"""Compiling kernels ahead of time, for a device that is not there, and what the compiler says about them.

`report(variant)` runs Triton's compiler and ptxas as a launch would and keeps what bounds a kernel before it
ever runs: registers, spills, shared memory, which matrix and copy instructions. `problems(report)` holds it
against the device. No GPU and no driver are needed; TRITON_INTERPRET must not be set.

    python -m phi4r_kernels.aot MODULE...

is a worker: it reads names of variants from standard input, one a line, and answers each with a line of JSON.
The compiler aborts the process on its own errors, so whoever asks (`benchmarks.compile_check`) keeps several
workers and loses one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory one program may ask for: A100, H100 and H200, B200."""

REGISTER_FILE = 65_536
"""Registers of one multiprocessor; a program's threads must fit at once."""


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched. signature: argument -> Triton type for all that is not a constexpr (Gluon
    descriptors name their layout); aligned: arguments divisible by 16."""

    name: str
    arch: int
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Report:
    """What became of a variant. registers: per thread at entry (with warp specialisation they are dealt out
    again inside); num_warps: of the whole program; spill_bytes: stores and loads; has_dot, has_copies: the
    source multiplies matrices, loads by descriptor; mma, wgmma, tcgen05, tma, tma_reduce, atomics:
    instructions in the PTX; scratch_bytes: global memory per program; error: the compiler's last words, or
    ""."""

    name: str
    arch: int
    registers: int = 0
    spill_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    scratch_bytes: int = 0
    num_warps: int = 0
    has_dot: bool = False
    has_copies: bool = False
    mma: int = 0
    wgmma: int = 0
    tcgen05: int = 0
    tma: int = 0
    tma_reduce: int = 0
    atomics: int = 0
    warning: str = ""
    error: str = ""
    seconds: float = 0.0


def variants_of(modules: Sequence[str]) -> Iterator[Variant]:
    """What `variants()` of every named module yields; ValueError if two have one name."""
    seen: set[str] = set()
    for module in modules:
        for variant in importlib.import_module(module).variants():
            if variant.name in seen:
                raise ValueError(f"two variants are called {variant.name!r}")
            seen.add(variant.name)
            yield variant


def _source(variant: Variant) -> Any:
    from triton.compiler.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = variant.kernel
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    names = kernel.arg_names
    signature = {n: "constexpr" if n in variant.constexprs else variant.signature[n] for n in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    constexprs = {(names.index(name),): value for name, value in variant.constexprs.items()}
    return kind(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)


def _cache_key(variant: Variant, source: Any) -> str:
    """Changes with the kernel's source and helpers, how it is compiled, the compiler and what is measured."""
    from triton.runtime.cache import triton_key

    parts = [
        source.hash(), variant.arch, variant.num_warps, variant.num_stages, variant.name, triton_key(),
        *map(inspect.getsource, (Report, report, _counts)),
    ]  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _counts(ptx: str) -> dict[str, int]:
    bulk = re.findall(r"cp(\.reduce)?\.async\.bulk", ptx)
    return {
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "tma_reduce": sum(bool(reduce) for reduce in bulk),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
    }


def report(variant: Variant, cache: Path | None = None) -> Report:
    """Compile one variant; from `cache` (a folder of JSON files) where the same was compiled before. What the
    compiler raises ends up in `error`."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    source = _source(variant)
    file = cache / f"{_cache_key(variant, source)}.json" if cache else None
    if file and file.exists():
        return Report(**json.loads(file.read_text(encoding="utf-8")))
    start, log = time.perf_counter(), io.StringIO()
    # ptxas tells of spills in its log only, and only when it runs.
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        try:
            kernel = triton.compile(
                source,
                target=GPUTarget("cuda", variant.arch, 32),
                options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
            )
        except Exception as error:  # noqa: BLE001 - any compiler error is a finding about this variant
            words = " ".join(f"{type(error).__name__}: {error}".split())
            return Report(variant.name, variant.arch, error=words[-400:], seconds=time.perf_counter() - start)
    text = log.getvalue()
    stack, stores, loads = _numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
    )
    (registers,) = _numbers(r"Used (\d+) registers", text)
    serialized = [line.strip() for line in text.splitlines() if re.search(r"\(C75\d\d\)|warning", line)]
    written = kernel.asm.get("ttir", "") + kernel.asm["ttgir"]
    done = Report(
        name=variant.name,
        arch=variant.arch,
        registers=registers,
        spill_bytes=stores + loads,
        stack_bytes=stack,
        shared_bytes=kernel.metadata.shared,
        scratch_bytes=kernel.metadata.global_scratch_size,
        num_warps=kernel.metadata.num_warps,
        has_dot=bool(re.search(r"\btt\.dot\b|warp_group_dot", written)),
        has_copies=bool(re.search(r"\btt\.descriptor_load|async_tma_copy_global", written)),
        warning=serialized[0][:200] if serialized else "",
        seconds=round(time.perf_counter() - start, 2),
        **_counts(kernel.asm["ptx"]),
    )
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_suffix(f".{os.getpid()}")
        whole.write_text(json.dumps(asdict(done)), encoding="utf-8")
        whole.replace(file)
    return done


def _numbers(pattern: str, log: str) -> tuple[int, ...]:
    found = re.search(pattern, log)
    assert found, f"ptxas did not say {pattern!r}: {log[-400:]!r}"
    return tuple(map(int, found.groups()))


def problems(report: Report) -> list[str]:
    """What is wrong with a shipped kernel, one phrase each; empty if nothing is."""
    if report.error:
        return [f"does not compile: {report.error}"]
    found = []
    if report.spill_bytes or report.stack_bytes:
        found.append(f"spills {report.spill_bytes} bytes, stack {report.stack_bytes}")
    if report.shared_bytes > SHARED_LIMIT[report.arch]:
        found.append(f"{report.shared_bytes:,} bytes of shared memory of {SHARED_LIMIT[report.arch]:,}")
    if report.registers * report.num_warps * 32 > REGISTER_FILE:
        found.append(f"{report.registers} registers x {report.num_warps * 32} threads of {REGISTER_FILE:,}")
    if report.has_dot and not report.mma + report.wgmma + report.tcgen05:
        found.append("no MMA instruction for its dots")
    if report.has_dot and report.arch == 90 and not report.wgmma:
        found.append(f"{report.mma} mma.sync and no wgmma")
    if report.has_copies and report.arch >= 90 and not report.tma:
        found.append("loads by descriptor without TMA")
    if report.warning:
        found.append(report.warning)
    return found


def main(arguments: Sequence[str]) -> int:
    """The worker: `[--cache FOLDER] MODULE...`, see the module."""
    cache = None
    if arguments and arguments[0] == "--cache":
        cache, arguments = Path(arguments[1]), arguments[2:]
    known = {variant.name: variant for variant in variants_of(arguments)}
    for line in sys.stdin:
        print(json.dumps(asdict(report(known[line.rstrip("\n")], cache))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
