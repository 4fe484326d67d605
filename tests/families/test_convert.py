"""Conversion of every family there and back, and what its config.json may say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from phi4r.configs.sections import ModelConfig
from phi4r.convert.hf import hf_to_phi4r, phi4r_to_hf
from phi4r.core.errors import UserError
from phi4r.families.hf_config import hf_config, model_config
from phi4r.families.registry import presets
from phi4r.models.huggingface import read_hf_config
from phi4r.train.folders import read_model_config
from tests.families.models import CASES, SIZES, make

transformers_logging.disable_progress_bar()


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_bit_identical_and_transformers_loads_it(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make(case, tmp_path / "hf", dtype)
    hf_to_phi4r(tmp_path / "hf", tmp_path / "phi4r")
    phi4r_to_hf(tmp_path / "phi4r", tmp_path / "back", max_shard_bytes=30_000)
    before, after = stored(tmp_path / "hf"), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    models = [
        AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype="auto", attn_implementation="eager"
        ).eval()
        for name in ("hf", "back")
    ]
    rope = [{**model.config.rope_parameters, "type": None} for model in models]
    assert rope[0] == rope[1]
    ids = torch.arange(60)[None] % SIZES["vocab_size"]
    with torch.no_grad():
        for length in (11, 60):  # longrope's factors before and after the switch
            assert torch.equal(*(model(ids[:, :length]).logits for model in models))
    assert read_hf_config(tmp_path / "back") == read_model_config(tmp_path / "phi4r")


@pytest.mark.parametrize("preset", [name for name in presets() if not name.startswith("tiny")])
def test_a_preset_survives_its_own_config_json(preset: str) -> None:
    model = ModelConfig.from_preset(preset)
    raw = json.loads(json.dumps(hf_config(model, {}, (), None)))
    read = model_config(raw, "config.json")
    assert read == ModelConfig(**{**presets()[preset], "preset": ""})


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        ("phi4", 14_659_507_200),
        ("phi4_mini", 3_836_021_760),
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
    ],
)
def test_a_preset_has_as_many_weights_as_published(preset: str, size: int) -> None:
    assert ModelConfig.from_preset(preset).num_parameters == size


MINI = presets()["phi4_mini"]
SHORT, LONG = ([float(n) for n in MINI[f"rope_{kind}_factors"].split(",")] for kind in ("short", "long"))
PUBLISHED_MINI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False,
    "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 199_999, "embd_pdrop": 0.0,
    "eos_token_id": 199_999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072,
    "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
    "max_position_embeddings": 131_072, "mlp_bias": False, "num_attention_heads": 24, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "pad_token_id": 199_999,
    "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10_000.0,
    "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
    "sliding_window": 262_144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 200_064,
}  # fmt: skip
"""The keys of Phi-4-mini's config.json, as transformers 4 spells them."""


def test_both_spellings_of_phi4_mini_are_the_preset() -> None:
    four = PUBLISHED_MINI
    five = {key: value for key, value in four.items() if key not in ("rope_theta", "rope_scaling")}
    five["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
        "short_factor": SHORT, "long_factor": LONG,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    expected = ModelConfig(**{**presets()["phi4_mini"], "preset": ""})
    assert model_config(four, "config.json") == model_config(five, "config.json") == expected


def changed(**changes: Any) -> dict[str, Any]:
    return PUBLISHED_MINI | changes


def scaling(**changes: Any) -> dict[str, Any]:
    return changed(rope_scaling={**PUBLISHED_MINI["rope_scaling"], **changes})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "yarn": (scaling(type="yarn"), "RoPE scaling 'yarn' is not supported"),
    "attention factor": (scaling(attention_factor=1.5), "RoPE's attention_factor is not supported"),
    "mscale": (scaling(short_mscale=1.0), "RoPE's short_mscale is not supported"),
    "too few factors": (scaling(short_factor=[1.0] * 47), "expected 48 numbers above 0"),
    "factors that are none": (scaling(long_factor="1.0"), "longrope needs short_factor and long_factor"),
    "no original context": (
        changed(original_max_position_embeddings=None),
        "longrope needs original_max_position_embeddings, a whole number, got None",
    ),
    "half a pair": (changed(partial_rotary_factor=0.7), "(half of the 89 values that turn)"),
    "rotary text": (changed(partial_rotary_factor="most"), "partial_rotary_factor 'most' is not a number"),
    "sliding window": (changed(sliding_window=2047), "sliding_window 2047 is smaller than max_position"),
    "head bias": (changed(lm_head_bias=True), "lm_head_bias True is not supported"),
    "tied or not": (
        changed(tie_word_embeddings="yes"),
        "tie_word_embeddings 'yes' is neither true nor false",
    ),
    "Qwen3 with a bias": (
        changed(architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=True),
        "attention_bias True is not supported",
    ),
    "Qwen2": (
        changed(architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
        "is a Qwen2ForCausalLM, expected Phi3ForCausalLM or Qwen3ForCausalLM",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_family_does_not_cover_is_refused_by_name(case: str) -> None:
    raw, message = REFUSED[case]
    with pytest.raises(UserError) as caught:
        model_config(raw, "FOLDER/config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("FOLDER/config.json: ")
    assert "\n" not in str(caught.value)


def test_a_window_that_is_switched_off_is_none() -> None:
    raw = json.loads(json.dumps(hf_config(ModelConfig.from_preset("qwen3_8b"), {}, (), None)))
    off = raw | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
    assert model_config(off, "config.json") == model_config(raw, "config.json")
    with pytest.raises(UserError, match="sliding_window 4096 is smaller"):
        model_config(off | {"use_sliding_window": True}, "config.json")
    with pytest.raises(UserError, match="layer_types sliding_attention is not supported"):
        model_config(raw | {"layer_types": ["full_attention", "sliding_attention"]}, "config.json")


def test_a_tied_head_in_the_files_must_be_the_embedding(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    make("qwen3_tied", folder)
    tensors = stored(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    hf_to_phi4r(folder, tmp_path / "phi4r")
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor lm_head.weight differs from model.embed_tokens.weight"):
        hf_to_phi4r(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


WRONG = ("x", -1, 0, 0.5, True, [], {}, [1], [None], {"a": 1}, None, math.inf, {"rope_type": [1]})


@pytest.mark.parametrize("preset", ["phi4", "phi4_mini", "qwen3_4b"])
def test_a_value_of_any_kind_is_read_or_refused_in_one_line(preset: str) -> None:
    raw = json.loads(json.dumps(hf_config(ModelConfig.from_preset(preset), {}, (), None)))
    keys = [*raw, "layer_types", "quantization_config", "use_sliding_window", "dtype"]
    cases = [raw | {key: value} for key in keys for value in WRONG]
    for section in ("rope_parameters", "rope_scaling"):
        rope = raw["rope_parameters"]
        cases += [raw | {section: rope | {key: value}} for key in rope for value in WRONG]
    messages = []
    for case in cases:
        try:
            model_config(case, "FOLDER/config.json")
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > len(cases) / 4
    assert all(text.startswith("FOLDER/config.json: ") and "\n" not in text for text in messages)
