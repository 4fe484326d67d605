"""`phi4r doctor`: what this machine has, what would be used, and how to get what is missing."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import warnings
from importlib import metadata

import phi4r
from phi4r.core import optional
from phi4r.core.console import print_table, say
from phi4r.core.errors import UserError

CORE = (
    "torch",
    "megatron-core",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "math-verify",
    "pyarrow",
    "safetensors",
)


def _versions() -> list[tuple[str, str, str]]:
    rows = [
        ("phi4r", phi4r.__version__, os.path.dirname(phi4r.__file__)),
        ("Python", platform.python_version(), sys.executable),
    ]
    for name in CORE:
        try:
            rows.append((name, metadata.version(name), ""))
        except metadata.PackageNotFoundError:
            rows.append((name, "missing", "run `make install`"))
    return rows


def _devices() -> list[tuple[str, str]]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [("CPU cores", str(cores))]
    if hasattr(os, "sysconf"):
        rows.append(("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"))
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no device is visible"
        return [*rows, ("GPUs", f"none ({why}); ranks run on the CPU over gloo")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"sm_{device.major}{device.minor}"
        rows.append((f"GPU {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}"))
    return rows


def _used() -> list[tuple[str, str]]:
    from phi4r.data import native
    from phi4r.models import backends

    try:
        attention = backends.select_backend("auto")
        if attention != "triton" and (reason := backends.why_not_auto(128, "bf16")):
            attention = f"{attention}; triton is not used: {reason}"
    except UserError as error:
        attention = f"none ({error})"
    if native.backend() == "native":
        host = "C++ (phi4r_kernels._native)"
    else:
        compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        fix = (
            "run `make install` again"
            if compiler
            else "install a C++ compiler, then run `make install` again"
        )
        host = f"Python, slower: {native.reason()}; {fix}"
    from phi4r_kernels.triton_version import TESTED, untested

    kernels = untested() or f"tested with this triton (of {' and '.join(TESTED)})"
    return [
        ("attention backend (auto)", attention),
        ("Triton kernels", kernels),
        ("packing and n-gram statistics", host),
    ]


STACK = (
    "torch",
    "triton",
    "nvidia-nccl-cu13",
    "megatron-core",
    "numpy",
    "transformers",
    "transformer-engine",
)
"""What the line for bug reports names beside phi4r, Python and the system."""


def stack_line() -> str:
    """Versions, system and GPU in one line that can be pasted into a bug report."""
    import torch

    parts = [f"phi4r {phi4r.__version__}", f"Python {platform.python_version()}"]
    for name in STACK:
        with contextlib.suppress(metadata.PackageNotFoundError):
            parts.append(f"{name} {metadata.version(name)}")
    if torch.version.cuda is not None:
        parts.append(f"CUDA {torch.version.cuda}")
    parts += [f"{sys.platform} {platform.machine()}", f"libc {platform.libc_ver()[1] or 'unknown'}"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    else:
        parts.append("no GPU")
    return ", ".join(parts)


def main() -> None:
    """Print versions, devices, what would be used, and the optional packages with install lines for missing
    ones."""
    warnings.simplefilter(
        "ignore"
    )  # megatron-core names absent packages on import; the table below says it better
    print_table("Versions", ("package", "version", ""), _versions())
    print_table("Machine", ("", ""), _devices())
    print_table("In use", ("", ""), _used())
    rows = []
    for name, entry in optional.TABLE.items():
        found = optional.available(name)
        state = optional.version(name) or "yes" if found else "missing"
        rows.append((entry.distribution, state, entry.purpose, "" if found else entry.install))
    print_table("Optional packages", ("package", "version", "for", "install"), rows)
    say(f"stack: {stack_line()}")
    missing = [name for name, version, _ in _versions() if version == "missing"]
    if missing:
        raise UserError(f"required packages are missing: {', '.join(missing)}; run `make install`")
    say("Everything that is required is here.")
