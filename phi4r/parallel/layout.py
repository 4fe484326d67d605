"""Process groups and this rank's place in the layout (TP x PP x CP x DP), over megatron-core's
parallel_state.

megatron-core owns the groups; phi4r asks it through `Layout`, a frozen picture of this rank's coordinates.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from phi4r.configs.sections import ParallelConfig
from phi4r.core.errors import UserError
from phi4r.parallel import cpu


@dataclass(frozen=True)
class Layout:
    """This rank's coordinates. `replica` counts data-parallel x context-parallel ranks (used by rollouts,
    which need no CP)."""

    rank: int
    world_size: int
    device: torch.device
    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    vpp: int
    cp: int
    cp_rank: int
    dp: int
    dp_rank: int
    sp: bool
    copy_ranks: tuple[int, ...]
    """Global ranks that hold this copy of the model (TP x PP), stage by stage."""
    copy_group: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def is_main(self) -> bool:
        """The rank that writes files and the console."""
        return self.rank == 0

    @property
    def reports(self) -> bool:
        """True on one rank per (dp, cp) coordinate: the one whose per-token results are counted in
        reductions."""
        return self.is_last_stage and self.tp_rank == 0

    @property
    def next_stage(self) -> int:
        """Global rank of this TP rank's peer on the next pipeline stage; after the last stage comes the
        first."""
        return self._peer((self.pp_rank + 1) % self.pp)

    @property
    def previous_stage(self) -> int:
        """Global rank of this TP rank's peer on the previous pipeline stage."""
        return self._peer((self.pp_rank - 1) % self.pp)

    @property
    def head_rank(self) -> int:
        """Global rank of TP rank 0 on the last stage of this copy of the model: it draws tokens and
        reports."""
        return self.copy_ranks[-self.tp]

    def _peer(self, stage: int) -> int:
        return self.copy_ranks[stage * self.tp + self.tp_rank]

    @property
    def replica(self) -> int:
        return self.dp_rank * self.cp + self.cp_rank

    @property
    def num_replicas(self) -> int:
        return self.dp * self.cp


def init_distributed(threads: int = 1, timeout_s: int = 600) -> torch.device:
    """Join the job's process group (gloo on CPU, NCCL on CUDA) and return this rank's device.

    Rank, world size and address come from the environment the launcher set; alone, a one-rank group is made.
    threads: CPU threads of this rank; results on CPU are bit-reproducible only at one thread count.
    """
    warnings.filterwarnings("ignore", module="megatron")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.set_num_threads(threads)
    cpu.install()
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    return device


def _destroy_groups() -> None:
    """End every group but the world. Megatron forgets its groups without ending them, and each gloo group
    keeps a thread that wakes a hundred times a second."""
    world = dist.group.WORLD
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not world:
            dist.destroy_process_group(group)


def init_layout(parallel: ParallelConfig, seed: int = 0) -> Layout:
    """Make megatron-core's groups for `parallel` and return this rank's `Layout`. Groups of the same sizes
    are kept, those of another layout are ended.

    Raises UserError where the number of started ranks is not tp * pp * cp * dp.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    device = init_distributed(parallel.threads, parallel.timeout_s)
    world_size = dist.get_world_size()
    if world_size != parallel.world_size:
        raise UserError(
            f"parallel: {world_size} ranks were started, but tp {parallel.tp} x pp {parallel.pp}"
            f" x cp {parallel.cp} x dp {parallel.dp} needs {parallel.world_size}"
        )
    vpp = parallel.vpp if parallel.vpp > 1 else None
    if mpu.is_initialized() and (parallel.tp, parallel.pp, vpp, parallel.cp) != (
        mpu.get_tensor_model_parallel_world_size(),
        mpu.get_pipeline_model_parallel_world_size(),
        mpu.get_virtual_pipeline_model_parallel_world_size(),
        mpu.get_context_parallel_world_size(),
    ):
        mpu.destroy_model_parallel()
        _destroy_groups()
    if not mpu.is_initialized():
        mpu.initialize_model_parallel(
            parallel.tp,
            parallel.pp,
            virtual_pipeline_model_parallel_size=vpp,
            context_parallel_size=parallel.cp,
            distributed_timeout_minutes=max(1, parallel.timeout_s // 60),
            create_gloo_process_groups=device.type == "cuda",
        )
    # Phi-4 has no dropout, so no RNG stream has to be forked; recomputation still saves and restores states.
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 1, inference_rng_tracker=True)
    return Layout(
        rank=dist.get_rank(),
        world_size=world_size,
        device=device,
        tp=parallel.tp,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp=parallel.pp,
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        vpp=parallel.vpp,
        cp=parallel.cp,
        cp_rank=mpu.get_context_parallel_rank(),
        dp=parallel.dp,
        dp_rank=mpu.get_data_parallel_rank(),
        sp=parallel.sp,
        copy_ranks=tuple(dist.get_process_group_ranks(mpu.get_model_parallel_group())),
        copy_group=mpu.get_model_parallel_group(),
    )


@contextmanager
def distributed_session() -> Iterator[None]:
    """Ends the process group on a clean exit; after an exception the launcher ends the other ranks
    instead."""
    from megatron.core import parallel_state as mpu

    yield
    if dist.is_initialized():
        dist.barrier()
        mpu.destroy_model_parallel()  # a later session of this process must not meet groups that are gone
        dist.destroy_process_group()


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Rank `source`'s picklable `value` on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]
