"""The `vllm` section: the servers behind `sampling.engine = "vllm"`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from phi4r.core.checks import at_least, positive, require
from phi4r.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VLLMConfig:
    """vLLM servers that sample for the trainer: started by it, found at given addresses, or in a registry."""

    num_servers: int = 1
    """Servers to start on the machine of rank 0 (while `addresses` is empty), or to wait for in
    `registry`."""
    addresses: str = ""
    """Servers that run already, comma between, as in "http://node7:8000" ("": start `num_servers`). They need
    VLLM_SERVER_DEV_MODE=1, --tokens-only, --logprobs-mode processed_logprobs, and `weights_dir`."""
    registry: str = ""
    """Shared folder in which `num_servers` servers started by `phi4r serve` announce themselves ("": none).
    launch/rl_vllm.sbatch sets it."""
    python: str = ""
    """Interpreter of the environment that has vLLM ("": $PHI4R_VLLM_PYTHON, else .venv-vllm/bin/python)."""
    devices: str = ""
    """CUDA_VISIBLE_DEVICES of each started server, semicolon between, as in "4,5;6,7" ("": as inherited)."""
    options: str = ""
    """More command-line options for the servers that are started, as in "--tensor-parallel-size 2"."""
    transfer: Literal["files", "gloo", "nccl"] = "files"
    """How weights get to the servers after each step: "files" = through `weights_dir`; broadcast from rank
    0's memory, past the disk: "gloo" = by TCP, "nccl" = from GPU to GPU."""
    weights_dir: str = ""
    """Folder that trainer and servers share, for what servers are started with and, with transfer "files",
    the weights of each step ("": RUN/weights)."""
    start_timeout_s: float = 600.0
    """Seconds for a server to start, or to come back."""
    sync_timeout_s: float = 600.0
    """Seconds for a server to load the weights of a step."""
    max_restarts: int = 3
    """Times a server may fail in one run; each time a started one is replaced, then it is given up."""
    probe_tolerance: float = 0.0
    """Largest mean difference, in nats, between a server's log-probs after loading weights and the trainer's
    (0: 0.001, or 0.05 in bf16)."""

    def __post_init__(self) -> None:
        at_least("vllm", self, num_servers=1, max_restarts=0, probe_tolerance=0)
        positive("vllm", self, "start_timeout_s", "sync_timeout_s")
        for address in self.address_list:
            require(
                address.startswith(("http://", "https://")),
                "vllm.addresses",
                f"expected http://HOST:PORT, got {address!r}",
            )
        require(
            not (self.addresses and self.registry),
            "vllm.registry",
            "and vllm.addresses both say where the servers are: give one",
        )
        require(
            not self.devices or bool(self.addresses) or len(self.device_list) == self.num_servers,
            "vllm.devices",
            f"is for {len(self.device_list)} servers, but vllm.num_servers is {self.num_servers}",
        )
        try:
            shlex.split(self.options)
        except ValueError as error:
            raise ConfigError("vllm.options", f"cannot be split into words: {error}") from None

    @property
    def address_list(self) -> list[str]:
        """The given addresses, one each."""
        return [part.strip().rstrip("/") for part in self.addresses.split(",") if part.strip()]

    @property
    def device_list(self) -> list[str]:
        """CUDA_VISIBLE_DEVICES of each server to start ([]: as inherited)."""
        return [part.strip() for part in self.devices.split(";")] if self.devices else []
