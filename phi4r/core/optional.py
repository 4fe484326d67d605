"""The one place that finds optional packages and says how to install what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from phi4r.core.errors import UserError


class Optional(NamedTuple):
    """A package phi4r can use but does not need."""

    module: str
    distribution: str
    purpose: str
    install: str


COMPILES = "compiles CUDA code: needs nvcc"

TABLE: dict[str, Optional] = {
    entry.module: entry
    for entry in (
        Optional("transformers", "transformers", "Hugging Face models as a check", "make test-deps"),
        Optional("wandb", "wandb", "log.wandb", "make install EXTRAS=wandb"),
        Optional("tensorboard", "tensorboard", "log.tensorboard", "make install EXTRAS=tensorboard"),
        Optional("triton", "triton", "GPU kernels", "make install EXTRAS=triton"),
        Optional(
            "flash_attn",
            "flash-attn",
            "model.attention_backend = flash_attn",
            f"make install EXTRAS=flash-attn ({COMPILES})",
        ),
        Optional(
            "transformer_engine",
            "transformer-engine",
            "train.layers = transformer_engine, train.fp8, optimizer.moments and optimizer.offload",
            f"make install EXTRAS=te ({COMPILES})",
        ),
        Optional(
            "nvidia.dali",
            "nvidia-dali-cuda130",
            "data.loader = dali",
            "make install EXTRAS=dali",
        ),
        Optional(
            "vllm",
            "vllm",
            "vLLM rollouts",
            "`make vllm-deps` makes an environment of its own, or set vllm.python to one that has it",
        ),
    )
}
"""Module name -> what it is for and how to get it. `phi4r doctor` prints this."""


def available(name: str) -> bool:
    """Whether the optional module can be found. It is not imported (its parent package is, for dotted
    names)."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def version(name: str) -> str:
    """The installed version of an optional package ("" where it is missing or does not say)."""
    try:
        return importlib.metadata.version(TABLE[name].distribution if name in TABLE else name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def require(name: str) -> ModuleType:
    """Import an optional module; raises UserError with the install line where it is missing or broken."""
    entry = TABLE[name]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        # "nvidia" alone may be there: other packages share the name
        missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        what = "is not installed" if missing else f"cannot be imported ({error})"
        raise UserError(
            f"{entry.purpose} needs {entry.distribution}, which {what}: {entry.install}"
        ) from error


PROGRAMS = {
    "bwrap": "task code runs programs in bubblewrap: apt-get install bubblewrap (dnf install bubblewrap)",
    "prlimit": "task code limits programs with prlimit: apt-get install util-linux",
}
"""Programs phi4r can use but does not need, with what for and how to get them."""


def program(name: str) -> str:
    """Path of an optional program; raises UserError with the install line where it is missing."""
    found = shutil.which(name)
    if found is None:
        raise UserError(f"{name} is not installed; {PROGRAMS[name]}")
    return found


VLLM_PYTHON = "PHI4R_VLLM_PYTHON"


def vllm_python(given: str = "") -> str:
    """The interpreter that has vLLM, which needs an environment of its own: `given`, else what the variable
    PHI4R_VLLM_PYTHON names, else .venv-vllm beside phi4r. Raises UserError where it is not there."""
    beside = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
    chosen = given or os.environ.get(VLLM_PYTHON) or str(beside)
    found = shutil.which(chosen)
    if found is None:
        raise UserError(f"{chosen}: no Python interpreter with vLLM here; {TABLE['vllm'].install}")
    return found
