"""Weights over the network (`vllm.transfer` "gloo" or "nccl"), from rank 0's memory to a server's workers.

Rank 0 gathers the weights of a step into host memory, tensor by tensor, and keeps them until the next step:
every server is sent the same copy as soon as it can take it, also one that comes up later, and no server
holds up the trainer's ranks or another server. For each transfer trainer and workers meet in a group of their
own, through vLLM's endpoints:

    POST /init_weight_transfer_engine   the workers join the group (inside/phi4r_transfer.py)
    POST /start_weight_update           layers wait for weights
    POST /update_weights                names and shapes; meanwhile the tensors are broadcast, one by one
    POST /finish_weight_update          repacking is finished

Phi-4 in bf16 is 27 GiB of host memory, twice that while the next step's weights come in.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from phi4r.configs.sections import ModelConfig
from phi4r.convert.live import SERVED
from phi4r.models.names import hf_tensors
from phi4r.sampling.vllm.client import Client, ServerError
from phi4r.sampling.vllm.inside.phi4r_wire import Wire, are_here, open_store, own_address

Result = TypeVar("Result")

POLL_S = 0.01
"""Seconds between looks whether the workers have come."""
LAST_WORDS_S = 5.0
"""Seconds for a server's own error, after the connection to it broke."""


class Snapshot:
    """The weights of one step in host memory, under their Hugging Face names. Filled once, in table order,
    while threads read behind."""

    def __init__(self, model: ModelConfig) -> None:
        self.dtype = SERVED[model.dtype]
        self.shapes = hf_tensors(model)
        self._tensors: dict[str, Tensor] = {}
        self._changed = threading.Condition()
        self._is_broken = False

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy all `weights`; who reads is told if they end early."""
        try:
            for name, tensor in weights:
                copied = tensor.to(self.dtype).clone(memory_format=torch.contiguous_format)
                with self._changed:
                    self._tensors[name] = copied
                    self._changed.notify_all()
            assert list(self._tensors) == list(self.shapes), "not all weights came, or in another order"
        except BaseException:
            with self._changed:
                self._is_broken = True
                self._changed.notify_all()
            raise

    def get_tensor(self, name: str, timeout_s: float = 0.0) -> Tensor:
        """The tensor, once it is there. RuntimeError if it does not come in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_broken or name in self._tensors, timeout_s):
                raise RuntimeError(f"waited {timeout_s:.0f} s for the trainer's ranks to hand over {name}")
            if self._is_broken:
                raise RuntimeError(f"the trainer's ranks could not hand over {name}")
            return self._tensors[name]


async def send(snapshot: Snapshot, client: Client, backend: str, device: torch.device) -> None:
    """Have the server load the weights of `snapshot`. device: rank 0's, for NCCL. ServerError where it fails
    or takes longer than vllm.sync_timeout_s."""
    limit_s = client.config.sync_timeout_s
    until = time.monotonic() + limit_s
    size = 1 + await client.num_workers()
    try:
        address = own_address(urlsplit(client.url).hostname or "")
    except OSError as error:
        raise ServerError(f"{client.url}: there is no way to it: {error}") from error
    store = open_store()
    init = {"address": address, "port": store.port, "size": size, "backend": backend, "timeout_s": limit_s}

    async def meet() -> Wire:
        while not are_here(store, range(1, size)):
            if time.monotonic() > until:
                raise ServerError(f"{client.url}: its workers did not come within {limit_s:g} s")
            await asyncio.sleep(POLL_S)
        try:
            return await asyncio.to_thread(Wire, store, 0, size, backend, address, device, limit_s)
        except RuntimeError as error:
            raise ServerError(f"could not be met at {address}: {_first_line(error)}") from error

    wire = await _together(client.init_transfer(init), meet())
    try:
        await client.start_update()
        shapes = {"names": list(snapshot.shapes), "shapes": list(snapshot.shapes.values())}
        update = client.update_weights({**shapes, "dtype": str(snapshot.dtype).removeprefix("torch.")})
        await _together(update, asyncio.to_thread(_broadcast, snapshot, wire, until))
        await client.finish_update()
    finally:
        wire.close()


def _broadcast(snapshot: Snapshot, wire: Wire, until: float) -> None:
    """All tensors, one by one, until the time `until` (monotonic)."""
    for name in snapshot.shapes:
        tensor = snapshot.get_tensor(name, until - time.monotonic()).to(wire.device)
        try:
            wire.broadcast(tensor, max(until - time.monotonic(), 0.001))
        except RuntimeError as error:
            raise ServerError(f"did not take {name}: {_first_line(error)}") from error


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or [""])[0]


async def _together(theirs: Coroutine[Any, Any, None], ours: Coroutine[Any, Any, Result]) -> Result:
    """The result of `ours`, done while the server does `theirs`. Where both fail the server's own error is
    raised: the connection broke because of it."""
    call, own = asyncio.create_task(theirs), asyncio.create_task(ours)
    try:
        await asyncio.wait({call, own}, return_when=asyncio.FIRST_EXCEPTION)
        await asyncio.wait({call}, timeout=LAST_WORDS_S)
        if call.done():
            call.result()
        return await own
    finally:
        for task in (call, own):
            task.cancel()
        await asyncio.gather(call, own, return_exceptions=True)
