"""Does a configuration fit the GPUs it is meant for? The question a launcher asks before it queues a job."""

from __future__ import annotations

from dataclasses import dataclass

from phi4r.configs.stages import RLConfig, SFTConfig
from phi4r.plan.memory import FRAGMENTATION, GIB, Memory, worst_stage


@dataclass(frozen=True)
class PlanVerdict:
    """`fits`: the run can be submitted. `reason`: one line that says why, or why not and by how much.

    needed_gib and usable_gib are of the fullest GPU (usable: its memory less the margin for fragmentation);
    both are 0 where the number of GPUs or an unknown vocabulary settles or prevents the answer.
    """

    fits: bool
    reason: str
    needed_gib: float = 0.0
    usable_gib: float = 0.0
    memory: Memory | None = None


def check(config: SFTConfig | RLConfig, *, gpus: int, gpu_memory_gib: float) -> PlanVerdict:
    """Whether `config` runs on `gpus` GPUs of `gpu_memory_gib` GiB each.

    The layout must use exactly that many ranks. A vocabulary that only the tokenizer knows
    (`model.vocab_size` = 0) is a model small enough to fit anywhere: said, not computed.
    """
    parallel = config.parallel
    if parallel.world_size != gpus:
        return PlanVerdict(
            False,
            f"parallel: tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {parallel.dp} ="
            f" {parallel.world_size} ranks, but there are {gpus} GPUs",
        )
    if config.model.vocab_size == 0:
        return PlanVerdict(True, "model.vocab_size is taken from the tokenizer: memory was not computed")
    memory = worst_stage(config)
    needed, usable = memory.total / GIB, gpu_memory_gib * (1 - FRAGMENTATION)
    where = f" on pipeline stage {memory.pp_rank}" if parallel.pp > 1 else ""
    what = f"{needed:.1f} GiB per GPU{where}"
    room = f"{usable:.1f} of {gpu_memory_gib:.1f} GiB"
    if needed <= usable:
        return PlanVerdict(True, f"fits: {what}, {room} usable", needed, usable, memory)
    largest, size = max(memory.lines(), key=lambda line: line[1])
    reason = f"does not fit: {what}, {room} usable, {needed - usable:.1f} GiB too much"
    return PlanVerdict(False, f"{reason} (most of it {largest}: {size:.1f} GiB)", needed, usable, memory)
