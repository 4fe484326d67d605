"""The rollout engine that a run asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from phi4r.configs.stages import RLConfig
from phi4r.sampling.embedded import EmbeddedEngine, RolloutEngine
from phi4r.sampling.vllm.engine import VLLMEngine
from phi4r.train.engine import Engine

NUM_PROBES = 4


@contextmanager
def open_sampler(
    cfg: RLConfig, policy: Engine, stop_ids: Sequence[int], prompts: Sequence[tuple[int, ...]], run_dir: Path
) -> Iterator[RolloutEngine]:
    """The engine named by `rollout.engine`, sampling with the weights of `policy`; servers that it starts end
    with the block. prompts: of the run; the first few serve as probes."""
    if cfg.rollout.engine == "embedded":
        yield EmbeddedEngine(policy, stop_ids, cfg.rollout.num_slots)
        return
    engine = VLLMEngine(
        policy,
        stop_ids,
        cfg.vllm,
        run_dir,
        max_model_len=cfg.rollout.max_prompt_tokens + cfg.rollout.max_new_tokens,
        probe_prompts=prompts[:NUM_PROBES],
        temperature=cfg.rollout.temperature,
    )
    try:
        yield engine
    finally:
        engine.close()
