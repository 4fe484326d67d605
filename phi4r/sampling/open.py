"""Opening what a section `sampling` asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from phi4r.configs.stages import RLConfig
from phi4r.sampling.embedded import EmbeddedEngine
from phi4r.sampling.types import RolloutEngine
from phi4r.sampling.vllm.engine import VLLMEngine
from phi4r.train.engine import Engine

NUM_PROBES = 4


@contextmanager
def open_rollout_engine(
    cfg: RLConfig, policy: Engine, stop_ids: Sequence[int], prompts: Sequence[tuple[int, ...]], run_dir: Path
) -> Iterator[RolloutEngine]:
    """The engine of an RL run, sampling with the weights of `policy`; servers that it starts end with the
    block. prompts: of the run; the first few serve as probes."""
    if cfg.sampling.engine == "embedded":
        yield EmbeddedEngine(policy, stop_ids, cfg.sampling.num_slots)
        return
    engine = VLLMEngine(
        policy,
        stop_ids,
        cfg.vllm,
        cfg.sampling,
        run_dir,
        max_model_len=cfg.rollout.max_prompt_tokens + cfg.sampling.max_new_tokens,
        probe_prompts=prompts[:NUM_PROBES],
    )
    try:
        yield engine
    finally:
        engine.close()
