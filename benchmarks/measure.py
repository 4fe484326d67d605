"""How everything here is measured: time, memory, error and the machine's two ceilings.

Implementations are compared inside one process, interleaved: every round calls each of them once, in an order
that turns, and ratios are medians of the rounds' own ratios, so that a clock that drifts or a neighbour that
comes by touches both sides. On a GPU the L2 cache is overwritten before every sample and inputs rotate, times
come from device events, and short calls are repeated inside a sample until it is long against the clock.
Inputs are random: products of zeros run faster than any real ones.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor

from benchmarks.rows import provenance

Call = Callable[[int], Any]
"""The i-th call of something; i chooses among rotated inputs."""

SAMPLE_S = 0.002
FLUSH_BYTES = 256 * 2**20
WRONG = 0.05


class WrongResultError(Exception):
    """An implementation that computes something else than the reference."""


# --- the machine


def default_device() -> str:
    """ "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def driver_version() -> str:
    """The NVIDIA kernel driver's version, "" without one."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        words = []
    for word in words:
        if word.count(".") >= 1 and word.replace(".", "").isdigit():
            return word
    if torch.cuda.is_available():
        import shutil
        import subprocess

        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            ended = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
            return ended.stdout.strip().splitlines()[0] if ended.stdout.strip() else ""
    return ""


@cache
def versions(device: str) -> dict[str, str]:
    """What a time depends on besides the sources: device, driver, cuda, cudnn, torch, triton, python."""
    on_gpu = device == "cuda"
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "driver": driver_version() if on_gpu else "",
        "cuda": (torch.version.cuda or "") if on_gpu else "",
        "cudnn": str(torch.backends.cudnn.version() or "") if on_gpu else "",
        "torch": torch.__version__,
        "triton": triton.__version__ if triton is not None else "",
        "python": platform.python_version(),
    }


def synchronize(device: str) -> None:
    """Wait until the device has done everything it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def compile_exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the very shapes that come, as often as new ones come."""
    # Past this limit dynamo goes back to eager code, with no more than a warning.
    torch._dynamo.config.recompile_limit = 64
    # Backwards are repeated on one graph here, which buffers given away by the first would forbid.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


# --- time


@dataclass(frozen=True)
class Timing:
    """Times of one implementation, one sample per round, in ms."""

    times_ms: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """The time that `share` of the samples do not exceed, between samples linearly."""
        ordered = sorted(self.times_ms)
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    @property
    def p50(self) -> float:
        """The median."""
        return self.quantile(0.5)


def ratio(a: Timing, b: Timing) -> float:
    """How many times longer `a` takes than `b`: the median over rounds of a / b in the same round."""
    pairs = zip(a.times_ms, b.times_ms, strict=True)
    return statistics.median(x / y for x, y in pairs)


def orders(names: Sequence[str], round_number: int) -> list[str]:
    """The names in the order of one round: turned by one each round, and backwards in every other turn."""
    turn = round_number % len(names)
    turned = [*names[turn:], *names[:turn]]
    return turned[::-1] if (round_number // len(names)) % 2 else turned


def interleave(
    calls: Mapping[str, Call],
    seconds: float,
    device: str,
    *,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time `calls` side by side for about `seconds` in all: (timings, why others fell out).

    Every call is first made twice, to compile and to estimate; one that raises falls out with its reason.
    Then come `min_rounds` rounds, and more until the time is over or `max_rounds` is reached.
    """
    repeats: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, call in calls.items():
        try:
            call(0)
            synchronize(device)
            start = time.perf_counter()
            call(1)
            synchronize(device)
        except Exception as error:  # noqa: BLE001  (a peer may fail in any way: that is a result)
            failed[name] = one_line(error)
            if device == "cuda":
                torch.cuda.empty_cache()
            continue
        elapsed = time.perf_counter() - start
        repeats[name] = max(1, min(50, round(SAMPLE_S / max(elapsed, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in repeats}
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if device == "cuda" else None
    deadline = time.perf_counter() + seconds
    counter = 0
    for round_number in range(max_rounds if repeats else 0):
        if round_number >= min_rounds and time.perf_counter() > deadline:
            break
        samples = {}
        for name in orders(list(repeats), round_number):
            samples[name] = _sample(calls[name], counter, repeats[name], flush)
            counter += repeats[name]
        synchronize(device)
        for name, read in samples.items():
            times[name].append(read() / repeats[name])
    return {name: Timing(tuple(samples)) for name, samples in times.items()}, failed


def _sample(call: Call, first: int, repeats: int, flush: Tensor | None) -> Callable[[], float]:
    """Start `repeats` calls; the returned function gives their time in ms once the device is done."""
    if flush is None:
        start = time.perf_counter()
        for i in range(repeats):
            call(first + i)
        elapsed = (time.perf_counter() - start) * 1e3
        return lambda: elapsed
    # The flush also keeps the device busy while the host gets the first call ready.
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for i in range(repeats):
        call(first + i)
    end.record()
    return lambda: begin.elapsed_time(end)


def rotations(num_bytes: float, device: str) -> int:
    """Copies of inputs of `num_bytes` needed so that no call finds its own in the cache: 2 to 8."""
    cached = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    return max(2, min(8, math.ceil(2 * cached / max(num_bytes, 1))))


def one_line(error: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


# --- memory and error


def peak_bytes(call: Call, device: str) -> int | None:
    """Memory one call takes beyond what was there before it, its outputs included; None without a GPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call(0)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def relative_error(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """max over outputs of |out - ref| / |ref| (2-norms, in float64); NaN and Inf give infinity."""
    worst = 0.0
    for out, ref in zip(outputs, references, strict=True):
        if out.shape != ref.shape:
            raise WrongResultError(f"shape {tuple(out.shape)}, the reference has {tuple(ref.shape)}")
        exact = ref.double()
        norm = torch.linalg.vector_norm(exact).item()
        error = torch.linalg.vector_norm(out.double() - exact).item() / (norm or 1.0)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def checked_error(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """`relative_error`; WrongResultError above 5%, which no rounding to bf16 explains."""
    error = relative_error(outputs, references)
    if error > WRONG:
        raise WrongResultError(f"differs from float64 by {error:.3g} of its norm: a wrong result")
    return error


# --- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches now: bf16 (on CPU fp32) matrix product in TFLOP/s, copy in GB/s (read plus
    written)."""

    gemm_tflops: float
    copy_gb_s: float

    def best_ms(self, flops: float, num_bytes: float) -> float:
        """The least time for that work: the larger of its arithmetic and its traffic."""
        return max(flops / self.gemm_tflops / 1e9, num_bytes / self.copy_gb_s / 1e6)


@cache
def ceilings(device: str, seconds: float = 1.0) -> Ceilings:
    """Measured once per process: a product of random 8,192^3 matrices through the library (512^3 fp32 on
    CPU), and a copy of 2 GiB (16 MiB on CPU)."""
    on_gpu = device == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    source = torch.randint(-(2**31), 2**31 - 1, (2**28 if on_gpu else 2**21,), device=device)
    target = torch.empty_like(source)
    timings, failed = interleave(
        {"gemm": lambda i: torch.mm(a, b, out=out), "copy": lambda i: target.copy_(source)}, seconds, device
    )
    assert not failed, failed
    copied = 2 * source.numel() * source.element_size()
    return Ceilings(2 * size**3 / timings["gemm"].p50 / 1e9, copied / timings["copy"].p50 / 1e6)


def describe(device: str) -> dict[str, Any]:
    """The columns of a row that say where and with what it was measured."""
    found = versions(device)
    names = ("device", "driver", "cuda", "cudnn", "torch", "triton")
    return provenance("kernels", "benchmarks") | {name: found[name] for name in names}
