"""A family of one's own, by import path: a recipe names it, and phi4r is not touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phi4r.configs.load import load_stage
from phi4r.configs.sections import ModelConfig
from phi4r.convert.live import served_model
from phi4r.core.errors import ConfigError
from phi4r.families.family import Family
from phi4r.families.hf_config import hf_config
from phi4r.families.qwen3 import QWEN3
from phi4r.models.names import hf_tensors, parts, random_weights, read, weight_table

TOY: Family = replace(QWEN3, title="Toy", presets={}, architecture="ToyForCausalLM", model_type="toy")
NAME = "tests.families.test_own_family:TOY"
NOT_A_FAMILY = {"title": "Toy"}

RECIPE = f"""
[model]
family = "{NAME}"
num_layers = 2
hidden_size = 40
ffn_hidden_size = 44
num_attention_heads = 4
num_query_groups = 2
head_dim = 16
tie_embeddings = true
"""


def test_a_recipe_takes_a_family_by_import_path(tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_text(RECIPE)
    model = replace(load_stage("sft", path).config.model, vocab_size=97)
    assert model.description is TOY
    get_tensor = random_weights(model, 0)
    assert "lm_head.weight" not in hf_tensors(model)
    for weight in weight_table(model):
        joined = read(weight, get_tensor)
        assert joined.shape == weight.shape
        for name, part in parts(weight, joined):
            assert torch.equal(part, get_tensor(name))
    assert sum(get_tensor(name).numel() for name in hf_tensors(model)) == model.num_parameters
    written = hf_config(served_model(model), {}, (), None)
    assert (written["architectures"], written["tie_word_embeddings"]) == (["ToyForCausalLM"], True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.families.test_own_family:NOT_A_FAMILY", "is not a family: expected a phi4r.families"),
        ("tests.families.test_own_family:TOYS", "defines no 'TOYS', did you mean 'TOY'"),
        ("tests.families.nowhere:TOY", "there is no module 'tests.families.nowhere'"),
        ("phi5", "unknown family 'phi5', did you mean 'phi4'"),
    ],
)
def test_a_family_that_is_none_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(family=name)
    assert caught.value.key == "model.family"
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"tie_embeddings": True}, "model.tie_embeddings"),
        ({"rotary_fraction": 0.5}, "model.rotary_fraction"),
        (
            {
                "rope_short_factors": ",".join(["1.0"] * 16),
                "rope_long_factors": ",".join(["2.0"] * 16),
                "original_max_position_embeddings": 64,
            },
            "model.rope_long_factors",
        ),
        ({"original_max_position_embeddings": 64}, "model.original_max_position_embeddings"),
    ],
)
def test_phi4_refuses_what_its_models_do_not_have(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**changes)  # type: ignore[arg-type]
    assert caught.value.key == key
