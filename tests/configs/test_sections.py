"""What the sections and stages refuse, the exact sizes of the presets, and that every setting is
documented."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from phi4r.configs.load import all_sections
from phi4r.configs.schema import check_hint, docs_of, fields_of, reference, sections_of
from phi4r.configs.sections import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    TrainConfig,
)
from phi4r.configs.stages import STAGES, RLConfig, SFTConfig, check_layout, vocab_rows
from phi4r.core.errors import ConfigError
from phi4r.families.registry import presets

PHI4 = ModelConfig.from_preset("phi4")


def test_phi4_has_exactly_as_many_parameters_as_published() -> None:
    assert PHI4.num_parameters == 14_659_507_200
    assert ModelConfig.from_preset("phi4_reasoning").num_parameters == 14_659_507_200
    one_layer = dataclasses.replace(PHI4, num_layers=41).num_parameters - PHI4.num_parameters
    assert one_layer == 340_797_440


def test_the_reasoning_preset_changes_rope_base_and_context_alone() -> None:
    before, after = presets()["phi4"], presets()["phi4_reasoning"]
    assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {
        "rope_theta": (250_000.0, 500_000.0),
        "max_position_embeddings": (16_384, 32_768),
    }


def test_every_preset_builds_and_changes_win_over_it() -> None:
    for name in presets():
        assert ModelConfig.from_preset(name).preset == name
    assert ModelConfig.from_preset("tiny", num_layers=6).num_layers == 6


def test_the_size_is_not_guessed_before_the_vocabulary_is_known() -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size"):
        _ = ModelConfig.from_preset("tiny").num_parameters


@pytest.mark.parametrize("tp", [1, 2, 5, 10])
def test_phi4_fits_tensor_parallel_sizes_that_divide_its_heads(tp: int) -> None:
    check_layout(PHI4, ParallelConfig(tp=tp))


@pytest.mark.parametrize("tp", [3, 4, 8, 20])
def test_phi4_refuses_other_tensor_parallel_sizes_with_the_reason(tp: int) -> None:
    with pytest.raises(ConfigError, match="Phi-4 has 10 KV heads, so TP is 1, 2, 5 or 10") as caught:
        check_layout(PHI4, ParallelConfig(tp=tp))
    assert caught.value.key == "parallel.tp"


def test_the_vocabulary_of_phi4_is_padded_where_tp_does_not_divide_it() -> None:
    assert [vocab_rows(PHI4.vocab_size, tp) * tp - PHI4.vocab_size for tp in (1, 2, 5, 10)] == [
        0,
        0,
        128,
        128,
    ]
    for tp in range(1, 9):
        for size in range(1, 400):
            rows = vocab_rows(size, tp)
            assert size <= rows * tp < size + tp * 64
            assert size % tp or rows * tp == size


def test_a_vocabulary_too_small_for_its_ranks_is_refused() -> None:
    model = dataclasses.replace(PHI4, vocab_size=11)
    with pytest.raises(ConfigError, match=r"5 ranks cannot each hold a part of model.vocab_size \(11\)"):
        check_layout(model, ParallelConfig(tp=5))


# What is refused: how to make it, the key that is named, and a piece of the reason.
FP8 = TrainConfig(layers="transformer_engine", fp8="tensorwise")
REFUSED: list[tuple[Any, str, str]] = [
    (lambda: ModelConfig(num_layers=0), "model.num_layers", "greater than 0"),
    (lambda: ModelConfig(head_dim=31), "model.head_dim", "even"),
    (lambda: ModelConfig(num_attention_heads=5), "model.num_attention_heads", "5 heads cannot share 2"),
    (lambda: ModelConfig(preset="fhi4"), "model.preset", "phi4_reasoning"),
    (lambda: ParallelConfig(sp=True), "parallel.sp", "tp > 1"),
    (lambda: ParallelConfig(vpp=2), "parallel.vpp", "pp > 1"),
    (lambda: ParallelConfig(dp=0), "parallel.dp", "at least 1"),
    (lambda: DataConfig(seq_length=1), "data.seq_length", "at least 8"),
    (lambda: OptimizerConfig(beta2=1.0), "optimizer.beta2", "below 1"),
    (lambda: OptimizerConfig(lr=-1e-3), "optimizer.lr", "at least 0"),
    (lambda: TrainConfig(num_steps=0), "train.num_steps", "at least 1"),
    (lambda: SamplingConfig(top_p=0.0), "sampling.top_p", "greater than 0"),
    (lambda: RewardConfig(max_tokens=10, positive_tokens=10), "reward.positive_tokens", "below"),
    (lambda: ObjectiveConfig(dual_clip=0.5), "objective.dual_clip", "greater than 1"),
    (lambda: ObjectiveConfig(clip_low=1.1), "objective.clip_low", "at most 1"),
    (
        lambda: ObjectiveConfig(surrogate="cispo", dual_clip=3.0),
        "objective.dual_clip",
        "cispo does not read it",
    ),
    (lambda: ObjectiveConfig(surrogate="ppo"), "objective.surrogate", "must be one of clip, cispo"),
    (lambda: ObjectiveConfig(surrogate="gmpo", ratio="sequence"), "objective.ratio", "gmpo does not read it"),
    (lambda: ObjectiveConfig(constant=8), "objective.constant", "only normalization"),
    (lambda: ObjectiveConfig(importance_mode="mask"), "objective.importance_cap", "above 0"),
    (lambda: ObjectiveConfig(importance_cap=1, importance_floor=2), "objective.importance_floor", "at most"),
    (lambda: ObjectiveConfig(kl_in_reward=True), "objective.kl_in_reward", "needs kl_reference"),
    (lambda: ObjectiveConfig(kl_ratio=True, kl_coef=0), "objective.kl_ratio", "no KL penalty"),
    (lambda: ObjectiveConfig(entropy_mean="token", entropy_coef=0), "objective.entropy_mean", "no entropy"),
    (lambda: ObjectiveConfig(baseline="rloo"), "objective.advantage_norm", 'with baseline = "rloo"'),
    (lambda: ObjectiveConfig(cov_low=5), "objective.cov_low", "clip does not read it"),
    (lambda: ObjectiveConfig(top_entropy=0), "objective.top_entropy", "greater than 0"),
    (lambda: SFTConfig(seed=-1), "seed", "at least 0"),
    (
        lambda: SFTConfig(parallel=ParallelConfig(pp=4)),
        "parallel.pp",
        "4 pipeline stages need as many layers",
    ),
    (
        lambda: SFTConfig(model=ModelConfig(num_layers=6), parallel=ParallelConfig(pp=2, vpp=2)),
        "parallel.vpp",
        "2 x 2 does not divide model.num_layers (6)",
    ),
    (lambda: SFTConfig(parallel=ParallelConfig(dp=3)), "train.global_batch_size", "shared evenly"),
    (
        lambda: SFTConfig(
            model=ModelConfig(num_layers=4),
            parallel=ParallelConfig(pp=2, vpp=2),
            train=TrainConfig(global_batch_size=3),
        ),
        "train.global_batch_size",
        "multiple of parallel.pp = 2",
    ),
    (
        lambda: SFTConfig(data=DataConfig(seq_length=250), parallel=ParallelConfig(cp=2)),
        "data.seq_length",
        "multiple of 4",
    ),
    (lambda: SFTConfig(data=DataConfig(seq_length=1024)), "data.seq_length", "max_position_embeddings (512)"),
    (lambda: RLConfig(rollout=RolloutConfig(group_size=1)), "rollout.group_size", "at least 2"),
    (lambda: ParallelConfig(pp=2, stage_layers="2,1,1"), "parallel.stage_layers", "2 numbers of at least 1"),
    (lambda: ParallelConfig(pp=2, stage_layers="3,0"), "parallel.stage_layers", "got '3,0'"),
    (lambda: ParallelConfig(pp=2, stage_layers="two,one"), "parallel.stage_layers", "got 'two,one'"),
    (
        lambda: SFTConfig(parallel=ParallelConfig(pp=2, stage_layers="2,2")),
        "parallel.stage_layers",
        "2,2 are 4 layers, and model.num_layers is 3",
    ),
    (lambda: OptimizerConfig(offload=1.5), "optimizer.offload", "between 0 and 1"),
    (lambda: OptimizerConfig(offload=0.5, moments="bf16"), "optimizer.moments", "must be fp32"),
    (lambda: SFTConfig(optimizer=OptimizerConfig(offload=0.5)), "optimizer.offload", "model.dtype = bf16"),
    (lambda: SFTConfig(optimizer=OptimizerConfig(moments="bf16")), "optimizer.moments", "model.dtype = bf16"),
    (
        lambda: RLConfig(
            model=ModelConfig(dtype="bf16"),
            optimizer=OptimizerConfig(moments="bf16"),
            parallel=ParallelConfig(distributed_optimizer=False),
        ),
        "optimizer.moments",
        "parallel.distributed_optimizer = true",
    ),
    (lambda: TrainConfig(fp8="tensorwise"), "train.fp8", "needs train.layers = transformer_engine"),
    (lambda: SFTConfig(train=FP8), "train.fp8", "needs model.dtype = bf16, which is fp32"),
    (
        lambda: SFTConfig(train=FP8, model=ModelConfig(dtype="bf16", ffn_hidden_size=440)),
        "model.ffn_hidden_size",
        "this gives 440",
    ),
    (
        lambda: SFTConfig(
            train=FP8, model=ModelConfig(dtype="bf16", head_dim=8), parallel=ParallelConfig(tp=2)
        ),
        "model.head_dim",
        "at parallel.tp = 2 this gives 8",
    ),
    (
        lambda: SFTConfig(
            train=FP8,
            model=ModelConfig(dtype="bf16"),
            data=DataConfig(seq_length=48),
            parallel=ParallelConfig(cp=2),
        ),
        "data.seq_length",
        "gives 24",
    ),
    (lambda: RLConfig(train=FP8, model=ModelConfig(dtype="bf16")), "train.fp8", "is for SFT"),
    (lambda: RLConfig(sampling=SamplingConfig(top_p=0.9)), "sampling.top_p", "biases the ratio"),
    (lambda: RLConfig(sampling=SamplingConfig(top_k=50)), "sampling.top_k", "biases the ratio"),
    (lambda: RLConfig(sampling=SamplingConfig(max_new_tokens=500)), "sampling.max_new_tokens", "564"),
    (
        lambda: RLConfig(reward=RewardConfig(positive_tokens=64)),
        "reward.positive_tokens",
        "below reward.max_tokens (64)",
    ),
]


@pytest.mark.parametrize(("make", "key", "reason"), REFUSED, ids=[key for _, key, _ in REFUSED])
def test_an_impossible_value_or_combination_is_refused_with_its_key(make: Any, key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        make()
    assert caught.value.key == key


def test_reward_lengths_keep_the_papers_proportions() -> None:
    paper = RewardConfig().resolved(31_744)
    assert (paper.max_tokens, paper.positive_tokens, paper.negative_tokens) == (31_744, 25_600, 3702)
    tiny = RewardConfig().resolved(64)
    # 64 x 25,600 / 31,744 = 51.6 and 64 x 3,702 / 31,744 = 7.46
    assert (tiny.max_tokens, tiny.positive_tokens, tiny.negative_tokens) == (64, 52, 7)
    own = RewardConfig(max_tokens=100, positive_tokens=50, negative_tokens=10).resolved(64)
    assert (own.max_tokens, own.positive_tokens, own.negative_tokens) == (100, 50, 10)


def test_every_setting_is_documented_and_fits_a_command_line() -> None:
    for cls in [*all_sections().values(), *STAGES.values()]:
        for name, field in fields_of(cls).items():
            assert len(docs_of(cls).get(name, "")) > 10, f"{cls.__name__}.{name} has no documentation"
            assert check_hint(field.hint), f"{cls.__name__}.{name}: {field.hint}"


def test_a_section_name_means_the_same_dataclass_in_every_stage() -> None:
    for stage in STAGES.values():
        for name, cls in sections_of(stage).items():
            assert all_sections()[name] is cls


def test_the_reference_lists_every_key_once_with_its_default() -> None:
    entries = {entry.key: entry for _, _, chapter in reference(SFTConfig) for entry in chapter}
    assert entries["optimizer.lr"].default == OptimizerConfig().lr
    assert entries["optimizer.decay"].type_text == "constant|cosine|linear"
    assert entries["parallel.sp"].type_text == "true|false"
    count = sum(len(dataclasses.fields(cls)) for cls in sections_of(SFTConfig).values()) + 1
    assert len(entries) == count
