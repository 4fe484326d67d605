"""The process group in which a trainer's rank 0 broadcasts weights to the workers of one vLLM server.

Imported by the trainer and by vLLM's interpreter, so only torch. Rank 0 is the trainer, which also holds the
store where all meet; worker i is rank 1 + i. Over gloo tensors lie in host memory, over NCCL on the GPU. The
group stands beside torch's default one and is made for one transfer: nothing is left to go stale between two.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

JOIN_S = 60.0
"""Seconds for the members of a group to find each other, once all said that they are there."""


def own_address(towards: str) -> str:
    """The address by which this machine reaches `towards`. Nothing is sent; OSError where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return str(probe.getsockname()[0])


def open_store() -> dist.TCPStore:
    """The trainer's store, at a port that is free (`.port`)."""
    return dist.TCPStore(
        "127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=JOIN_S), wait_for_workers=False
    )


def reach_store(address: str, port: int, rank: int) -> dist.TCPStore:
    """A worker's way to the trainer's store, in which it says that it is there."""
    store = dist.TCPStore(address, port, None, is_master=False, timeout=timedelta(seconds=JOIN_S))
    store.set(f"here/{rank}", "1")
    return store


def are_here(store: dist.TCPStore, ranks: Iterable[int]) -> bool:
    """Whether the workers `ranks` have reached the store."""
    return bool(store.check([f"here/{rank}" for rank in ranks]))


class Wire:
    """Rank `rank` of the `size` in the group. backend: "gloo" or "nccl"; address: this machine's, by which
    the others reach it; device: this rank's; timeout_s: for a whole transfer."""

    def __init__(
        self,
        store: dist.TCPStore,
        rank: int,
        size: int,
        backend: str,
        address: str,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.backend = backend
        self.device = device if backend == "nccl" else torch.device("cpu")
        self._group: Any  # torch describes these classes only in part
        if backend == "nccl":
            nccl: Any = dist.ProcessGroupNCCL
            options = nccl.Options()
            # NCCL's own watchdog ends the process: it must not come before the deadline of each broadcast.
            options._timeout = timedelta(seconds=10 * timeout_s)
            self._group = nccl(store, rank, size, options)
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=address)]
            options._timeout = timedelta(seconds=JOIN_S)
            self._group = gloo(store, rank, size, options)

    def broadcast(self, tensor: Tensor, timeout_s: float) -> None:
        """Rank 0's `tensor`, contiguous, to all. RuntimeError where a member is gone or the time is over."""
        assert self._group is not None
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=timeout_s)
        self._group.broadcast([tensor], options).wait(timedelta(seconds=timeout_s))

    def close(self) -> None:
        """Leave; who waits for this member is told so."""
        if self._group is not None and self.backend == "nccl":
            self._group.abort()
        self._group = None
