"""The name table: every weight has one place in both worlds, and every rearrangement has an exact inverse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4r.configs.sections import ModelConfig
from phi4r.configs.stages import vocab_rows
from phi4r.core.errors import UserError
from phi4r.models.names import (
    Weight,
    from_mcore,
    hf_tensors,
    random_weights,
    shard,
    to_mcore,
    unshard,
    weight_table,
)

PHI4 = ModelConfig.from_preset("phi4")


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A small model and a tensor-parallel size that divides what it has to."""
    tp = draw(st.integers(1, 3))
    groups = tp * draw(st.integers(1, 2))
    head_dim = 2 * draw(st.integers(1, 2))
    model = ModelConfig(
        num_layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 6)),
        ffn_hidden_size=tp * draw(st.integers(1, 4)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=draw(st.integers(tp * tp, 10 * tp)),  # at least tp^2: the last rank has rows of its own
    )
    return model, tp


def numbered(weight: Weight) -> torch.Tensor:
    """A tensor whose every element is different, so that any misplaced row shows."""
    return torch.arange(math.prod(weight.shape), dtype=torch.float64).reshape(weight.shape)


@given(models())
@settings(max_examples=60, deadline=None)
def test_the_way_back_to_hugging_face_form_is_exact(case: tuple[ModelConfig, int]) -> None:
    for weight in weight_table(case[0]):
        tensor = numbered(weight)
        assert torch.equal(from_mcore(weight, to_mcore(weight, tensor)), tensor)
        assert torch.equal(to_mcore(weight, from_mcore(weight, tensor)), tensor)


@given(models())
@settings(max_examples=60, deadline=None)
def test_shards_of_all_ranks_make_the_whole_tensor_again(case: tuple[ModelConfig, int]) -> None:
    model, tp = case
    for weight in weight_table(model):
        tensor = numbered(weight)
        shards = [shard(weight, tensor, rank, tp) for rank in range(tp)]
        assert torch.equal(unshard(weight, shards), tensor)
        rows = vocab_rows(model.vocab_size, tp)
        if weight.is_vocabulary:
            assert {part.shape for part in shards} == {(rows, model.hidden_size)}
            assert not torch.cat(shards)[model.vocab_size :].any()
        elif weight.shard_dim is not None:
            assert sum(part.numel() for part in shards) == tensor.numel()


def test_qkv_rows_are_interleaved_by_kv_group() -> None:
    model = ModelConfig(
        num_layers=1, hidden_size=1, num_attention_heads=4, num_query_groups=2, head_dim=2, vocab_size=1
    )
    weight = next(w for w in weight_table(model) if w.kind == "qkv")
    # two rows a head: query heads 0-3 are rows 0-7, keys of the two groups 8-11, values 12-15
    order = to_mcore(weight, numbered(weight)).flatten().tolist()
    assert order == [0, 1, 2, 3, 8, 9, 12, 13] + [4, 5, 6, 7, 10, 11, 14, 15]


def test_gate_and_up_are_cut_separately() -> None:
    model = ModelConfig(num_layers=1, hidden_size=1, ffn_hidden_size=4, vocab_size=1)
    weight = next(w for w in weight_table(model) if w.kind == "gate_up")
    second = shard(weight, numbered(weight), 1, 2).flatten().tolist()
    assert second == [2, 3, 6, 7]  # the upper halves of gate (0-3) and of up (4-7)


def test_phi4_has_the_243_tensors_of_its_model_card() -> None:
    shapes = hf_tensors(PHI4)
    assert len(shapes) == 243
    assert sum(math.prod(shape) for shape in shapes.values()) == PHI4.num_parameters == 14_659_507_200
    assert shapes["model.layers.39.self_attn.qkv_proj.weight"] == (5120 + 2 * 1280, 5120)
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (2 * 17920, 5120)
    assert len({weight.mcore for weight in weight_table(PHI4)}) == 243


@pytest.mark.parametrize(("kind", "what"), [("qkv", "10 KV heads"), ("gate_up", "17920")])
def test_a_size_that_tensor_parallelism_cannot_cut_is_named(kind: str, what: str) -> None:
    weight = next(w for w in weight_table(PHI4) if w.kind == kind and w.shard_dim is not None)
    with pytest.raises(UserError, match=what):
        shard(weight, torch.empty(weight.shape, device="meta"), 0, 3 if kind != "qkv" else 4)


def test_random_weights_depend_on_seed_and_name_only() -> None:
    model = ModelConfig(vocab_size=64)
    name = "model.layers.1.mlp.down_proj.weight"
    first, again, other = random_weights(model, 1), random_weights(model, 1), random_weights(model, 2)
    first("lm_head.weight")  # what was drawn before must not matter
    assert torch.equal(first(name), again(name))
    assert not torch.equal(first(name), other(name))
    assert not torch.equal(first(name), first("model.layers.2.mlp.down_proj.weight"))


@pytest.mark.parametrize(
    ("scheme", "name", "std"),
    [
        ("normal", "model.embed_tokens.weight", 0.02),
        ("normal", "model.layers.0.self_attn.qkv_proj.weight", 0.02),
        ("normal", "model.layers.0.self_attn.o_proj.weight", 0.02 / math.sqrt(2 * 3)),
        ("normal", "model.layers.0.mlp.down_proj.weight", 0.02 / math.sqrt(2 * 3)),
        ("fan_in", "lm_head.weight", 0.02),
        ("fan_in", "model.layers.0.mlp.gate_up_proj.weight", 128**-0.5),
        ("fan_in", "model.layers.0.mlp.down_proj.weight", 448**-0.5 / 2),
    ],
)
def test_random_weights_have_the_documented_spread(scheme: str, name: str, std: float) -> None:
    model = ModelConfig(vocab_size=320, init_scheme=scheme)  # type: ignore[arg-type]
    tensor = random_weights(model, 0)(name)
    # Of n normals the deviation has relative standard error 1/sqrt(2n), the mean std/sqrt(n); five of each.
    assert abs(tensor.std().item() / std - 1) < 5 / math.sqrt(2 * tensor.numel())
    assert abs(tensor.mean().item()) < 5 * std / math.sqrt(tensor.numel())


def test_norms_start_as_ones() -> None:
    get_tensor = random_weights(ModelConfig(vocab_size=64), 0)
    assert get_tensor("model.norm.weight").eq(1).all()
