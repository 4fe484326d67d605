"""vLLM's side of `vllm.transfer = "gloo"` and `"nccl"`: receives weights that the trainer broadcasts. Runs in
vLLM's workers, which import it for `--worker-extension-cls phi4r_transfer.Extension`.

vLLM's own "nccl" engine talks through a communicator of vLLM's, for which the trainer would need vLLM and a
GPU. This one is registered beside it under the name "phi4r", is driven through the same endpoints, and speaks
torch.distributed on both sides.
"""

from dataclasses import dataclass

import torch
from phi4r_wire import Wire, own_address, reach_store  # type: ignore[import-not-found]
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How to reach the trainer: its store at `address`:`port`, in a group of `size` over `backend`."""

    address: str
    port: int
    size: int
    backend: str
    timeout_s: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """What comes, in this order. dtype: torch's name of all tensors' type."""

    names: list[str]
    shapes: list[list[int]]
    dtype: str


class BroadcastEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives full tensors under their Hugging Face names, one after the other, and loads each as a
    checkpoint's (cut over the ranks of the server, repacked for its kernels)."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    wire: Wire | None = None
    timeout_s = 0.0

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the trainer's group, and leave the one before."""
        self.shutdown()
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = reach_store(init_info.address, init_info.port, rank)
        self.timeout_s = init_info.timeout_s
        own = own_address(init_info.address)
        self.wire = Wire(store, rank, init_info.size, init_info.backend, own, self.device, self.timeout_s)

    def start_weight_update(self) -> None:
        """From now on layers wait for new weights."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Repack what is left, and put back what was not sent."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict) -> None:
        """Receive and load all weights. (vLLM's own waits for an accelerator, which a CPU has not.)"""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self.finish_weight_update()  # no layer is left waiting for weights of this update
            self.shutdown()
            raise
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """As announced, tensor by tensor."""
        if self.wire is None:
            raise RuntimeError("init_weight_transfer_engine comes before update_weights")
        dtype = getattr(torch, update_info.dtype)
        for name, shape in zip(update_info.names, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=dtype, device=self.wire.device)
            self.wire.broadcast(tensor, self.timeout_s)
            self.model.load_weights([(name, tensor)])

    def shutdown(self) -> None:
        """Leave the group."""
        if self.wire is not None:
            self.wire.close()
            self.wire = None


WeightTransferEngineFactory.register_engine("phi4r", BroadcastEngine)


class Extension:
    """What a vLLM worker gets from this module: nothing but its import."""
