"""The recipes of Phi-4-mini fit the machines they name, and its layouts are those of 8 KV heads."""

from __future__ import annotations

import pytest

from phi4r.configs.load import load_stage
from phi4r.configs.sections import ModelConfig, ParallelConfig
from phi4r.configs.stages import check_layout
from phi4r.core.errors import ConfigError
from phi4r.plan.hardware import GPUS
from phi4r.plan.memory import FRAGMENTATION, GIB, worst_stage
from phi4r.plan.states import rank_chunks

ONE_H100 = ("parallel.dp=1", "optimizer.moments=bf16")
FEW_PROMPTS = ("parallel.dp=1", "rollout.prompts_per_step=8")
MACHINES = [
    ("sft", "phi4_mini_sft", "h100", ()),
    ("sft", "phi4_mini_sft", "h100", ONE_H100),
    ("sft", "phi4_mini_sft", "h200", ("parallel.dp=1",)),
    ("rl", "phi4_mini_grpo", "h100", ()),
    ("rl", "phi4_mini_grpo", "h100", (*ONE_H100, "rollout.prompts_per_step=8", "sampling.num_slots=8")),
    ("rl", "phi4_mini_grpo", "h200", FEW_PROMPTS),
]


@pytest.mark.parametrize(("stage", "recipe", "gpu", "words"), MACHINES)
def test_a_recipe_fits_the_machines_of_its_header(
    stage: str, recipe: str, gpu: str, words: tuple[str, ...]
) -> None:
    config = load_stage(stage, recipe, words).config
    needed = worst_stage(config).total / GIB
    assert needed < GPUS[gpu].memory_gib * (1 - FRAGMENTATION), f"{needed:.1f} GiB"


def test_one_h100_without_bf16_moments_is_too_small() -> None:
    config = load_stage("sft", "phi4_mini_sft", ["parallel.dp=1"]).config
    assert worst_stage(config).total / GIB > GPUS["h100"].memory_gib * (1 - FRAGMENTATION)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_phi4_mini_can_be_cut_into_eight(tp: int) -> None:
    model = ModelConfig.from_preset("phi4_mini")
    check_layout(model, ParallelConfig(tp=tp))
    with pytest.raises(ConfigError, match="Phi-4-mini has 8 KV heads, so TP is 1, 2, 4 or 8"):
        check_layout(model, ParallelConfig(tp=3))


@pytest.mark.parametrize("preset", ["phi4_mini", "qwen3_4b", "qwen3_8b", "phi4"])
def test_a_plan_counts_weights_once_and_a_tied_table_twice_over_stages(preset: str) -> None:
    model = ModelConfig.from_preset(preset)
    one = sum(map(sum, rank_chunks(model, ParallelConfig(), 0)))
    assert one == model.num_parameters
    two = [sum(map(sum, rank_chunks(model, ParallelConfig(pp=2), rank))) for rank in (0, 1)]
    extra = model.vocab_size * model.hidden_size if model.tie_embeddings else 0
    assert sum(two) == model.num_parameters + extra


def test_samples_may_not_cross_the_length_at_which_longrope_changes() -> None:
    with pytest.raises(ConfigError, match=r"8,192 tokens pass model.original_max_position"):
        load_stage("rl", "phi4_mini_grpo", ["model.preset=phi4_mini"])
    load_stage("rl", "phi4_mini_grpo", ["model.preset=phi4_mini", "sampling.max_new_tokens=3072"])
