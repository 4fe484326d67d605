"""Conversion between Hugging Face folders and checkpoints: nothing changes, nothing is lost, errors name the
culprit.
"""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.utils import logging as transformers_logging

from phi4r.configs.sections import ModelConfig
from phi4r.convert.hf import hf_to_phi4r, main, phi4r_to_hf
from phi4r.core.errors import UserError
from phi4r.families.hf_config import hf_config
from phi4r.models.huggingface import (
    INDEX,
    HFWeights,
    ShardWriter,
    plan_shards,
    read_hf_config,
    shard_names,
)
from phi4r.models.names import hf_tensors, random_weights
from phi4r.parallel.launch import run_ranks
from phi4r.train.folders import read_manifest, read_model_config, resolve_checkpoint, tokenizer_folder

transformers_logging.disable_progress_bar()

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}


def make_hf(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Phi3ForCausalLM:
    """A random Phi3ForCausalLM, saved in several shards; norms are not ones, so that a mix-up of two
    shows.
    """
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**{**CONFIG, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Phi3ForCausalLM]:
    folder = tmp_path_factory.mktemp("hf")
    return folder, make_hf(folder)


@pytest.fixture(scope="module")
def checkpoint(hf: tuple[Path, Phi3ForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "converted"
    main("hf-to-phi4r", hf[0], folder)
    return folder


# --- same model


@pytest.mark.multiprocess
@pytest.mark.proves("Logits equal those of transformers", how="converted folders", layouts="tp 1, tp 2, pp 2")
def test_logits_equal_those_of_transformers_in_every_layout(
    hf: tuple[Path, Phi3ForCausalLM], checkpoint: Path, tmp_path: Path
) -> None:
    ids = torch.randint(0, 96, (48,), generator=torch.Generator().manual_seed(1))
    torch.save(ids, tmp_path / "ids.pt")
    with torch.no_grad():
        expected = hf[1](ids[None]).logits[0]
    payload = {"ids": str(tmp_path / "ids.pt"), "out": str(tmp_path)}
    target = "tests.convert.parity_ranks:run"
    run_ranks(target, payload | {"folder": str(checkpoint), "layouts": {"tp1": {}}}, 1)
    run_ranks(target, payload | {"folder": str(hf[0]), "layouts": {"hf_tp1": {}}}, 1)
    layouts = {"tp2": {"tp": 2}, "pp2": {"pp": 2}}
    run_ranks(target, payload | {"folder": str(checkpoint), "layouts": layouts}, 2, tmp_path)
    for name in ("tp1", "hf_tp1", "tp2", "pp2"):
        logits = torch.load(tmp_path / f"{name}.pt")
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.proves(
    "Hugging Face -> phi4r -> Hugging Face is bit-identical", how="every tensor, fp32 and bf16"
)
def test_there_and_back_is_bit_identical_and_transformers_loads_it(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_hf(tmp_path / "hf", dtype)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    hf_to_phi4r(tmp_path / "hf", tmp_path / "phi4r")
    phi4r_to_hf(tmp_path / "phi4r", tmp_path / "back", max_shard_bytes=15_000)
    shards = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(shards) > 3
    stored: dict[str, Tensor] = {}
    for shard in shards:
        stored |= load_file(shard)
    expected = model.state_dict()
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert stored[name].dtype == dtype
        assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8)), name
    before, after = (
        Phi3ForCausalLM.from_pretrained(tmp_path / name, dtype="auto").eval() for name in ("hf", "back")
    )
    assert after.dtype == dtype
    assert after.config.rope_parameters == before.config.rope_parameters
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(after(ids).logits, before(ids).logits)


def test_a_head_dim_of_its_own_survives(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", head_dim=16, num_hidden_layers=1)
    hf_to_phi4r(tmp_path / "hf", tmp_path / "phi4r")
    phi4r_to_hf(tmp_path / "phi4r", tmp_path / "back")
    assert read_model_config(tmp_path / "phi4r").head_dim == 16
    assert read_hf_config(tmp_path / "back").head_dim == 16
    Phi3ForCausalLM.from_pretrained(tmp_path / "back")
    # also where no original config says it: a model that was trained here
    (tmp_path / "config.json").write_text(
        json.dumps(hf_config(read_model_config(tmp_path / "phi4r"), {}, (), None))
    )
    assert read_hf_config(tmp_path) == read_model_config(tmp_path / "phi4r")


def test_tokenizer_generation_config_and_chat_template_travel(
    hf: tuple[Path, Phi3ForCausalLM], tmp_path: Path
) -> None:
    source = shutil.copytree(hf[0], tmp_path / "hf")
    texts = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "chat_template.jinja": "{{ x }}",
        "generation_config.json": '{"temperature": 0.8}',
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    hf_to_phi4r(source, tmp_path / "phi4r")
    phi4r_to_hf(tmp_path / "phi4r", tmp_path / "back")
    for name, text in texts.items():
        assert (tmp_path / "back" / name).read_text() == text
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert tokenizer_folder(tmp_path / "phi4r") == tmp_path / "phi4r" / "tokenizer"


def test_a_folder_without_a_tokenizer_converts_with_a_note(
    hf: tuple[Path, Phi3ForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main("hf-to-phi4r", hf[0], tmp_path / "phi4r")
    assert "no tokenizer files" in capsys.readouterr().out
    assert read_manifest(tmp_path / "phi4r").tokenizer == ()
    assert resolve_checkpoint(tmp_path / "phi4r") == ("phi4r", tmp_path / "phi4r")


# --- what is refused, each in one line that names the culprit


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_shard(change: Callable[[dict[str, Tensor]], None], tensor: str) -> Callable[[Path], None]:
    """Rewrites the shard that holds `tensor`; the index goes along with added and removed names."""

    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        file = index["weight_map"][tensor]
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)
        kept = {name: place for name, place in index["weight_map"].items() if place != file}
        index["weight_map"] = kept | dict.fromkeys(tensors, file)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def truncate(folder: Path) -> None:
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"]["lm_head.weight"]
    path.write_bytes(path.read_bytes()[:-100])


def lose_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[2].unlink()


def lose_index_entry(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    files = index["weight_map"]
    files["model.norm.weight"] = files["model.embed_tokens.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def spoil_header(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(struct.pack("<Q", 20) + b"not json at all, no!" + path.read_bytes())


QKV = "model.layers.2.self_attn.qkv_proj.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensor": (edit_shard(lambda t: t.__delitem__(QKV), QKV), f"tensor {QKV} is missing"),
    "extra tensor": (
        edit_shard(lambda t: t.update({"model.extra.weight": torch.zeros(2)}), QKV),
        "tensor model.extra.weight has no place",
    ),
    "wrong shape": (
        edit_shard(lambda t: t.update({QKV: torch.zeros(64, 31)}), QKV),
        f"tensor {QKV} has shape [64, 31], expected [64, 32]",
    ),
    "mixed dtype": (
        edit_shard(lambda t: t.update({QKV: t[QKV].bfloat16()}), QKV),
        f"tensor {QKV} is BF16, but others",
    ),
    "fp16": (
        edit_shard(lambda t: t.update({QKV: t[QKV].half()}), QKV),
        f"tensor {QKV} is F16, expected BF16, F32 or F64",
    ),
    "truncated shard": (truncate, "truncated: tensor"),
    "lost shard": (lose_shard, "model-00003-of-"),
    "tensor not where the index says": (lose_index_entry, "tensor model.norm.weight is missing"),
    "not a safetensors file": (spoil_header, "not a safetensors file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "another model": (
        edit_config(architectures=["LlamaForCausalLM"], model_type="llama"),
        "is a LlamaForCausalLM",
    ),
    "longrope": (
        edit_config(rope_scaling={"type": "longrope", "short_factor": []}),
        "rope_type is given twice: 'default' and 'longrope'",
    ),
    "longrope, transformers 5": (
        edit_config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        "longrope needs short_factor and long_factor, lists of numbers",
    ),
    "two thetas": (edit_config(rope_theta=1e4), "rope_theta is given twice: 250000.0 and 10000.0"),
    "partial rotary": (edit_config(partial_rotary_factor=0.75), "partial_rotary_factor is given twice"),
    "sliding window": (
        edit_config(sliding_window=32),
        "sliding_window 32 is smaller than max_position_embeddings 64",
    ),
    "tied embeddings": (edit_config(tie_word_embeddings=True), "tensor lm_head.weight differs from"),
    "float16": (edit_config(dtype="float16"), "dtype 'float16'"),
    "two reasons at once": (edit_config(mlp_bias=True, sliding_window=1), "64; mlp_bias True"),
    "size missing": (edit_config(hidden_size=None), "hidden_size: missing"),
    "context missing": (
        edit_config(max_position_embeddings=None, sliding_window=16),
        "max_position_embeddings: missing",
    ),
    "size of another type": (edit_config(hidden_size="32"), "hidden_size '32' is not a whole number above 0"),
    "bias": (edit_config(attention_bias=True), "attention_bias True is not supported (expected False)"),
    "dropout": (edit_config(attention_dropout=0.1), "attention_dropout 0.1 is not supported"),
    "quantized": (edit_config(quantization_config={"bits": 4}), "quantized weights"),
    "heads that cannot share": (edit_config(num_key_value_heads=3), "4 heads cannot share 3 KV heads"),
    "unknown key": (
        edit_config(logits_soft_cap=30.0),
        "the key 'logits_soft_cap' (30.0) is not known and may change what is computed",
    ),
    "RoPE that is no object": (edit_config(rope_scaling="linear"), "RoPE is described by 'linear'"),
    "unknown key of RoPE": (
        edit_config(rope_parameters={"rope_theta": 1e4, "factor": 2.0}),
        "RoPE's factor is not supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_or_unsupported_folder_is_refused_in_one_line(
    case: str, hf: tuple[Path, Phi3ForCausalLM], tmp_path: Path
) -> None:
    break_it, message = REFUSED[case]
    source = shutil.copytree(hf[0], tmp_path / "hf")
    break_it(source)
    with pytest.raises(UserError) as caught:
        main("hf-to-phi4r", source, tmp_path / "phi4r")
    assert message in str(caught.value)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]  # nothing half-written stays


def test_configs_of_transformers_4_and_5_mean_the_same(
    hf: tuple[Path, Phi3ForCausalLM], tmp_path: Path
) -> None:
    five = json.loads((hf[0] / "config.json").read_text())
    assert "rope_parameters" in five
    four = {key: value for key, value in five.items() if key not in ("rope_parameters", "dtype")}
    four |= {"rope_theta": 250000.0, "rope_scaling": None, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(four))
    assert read_hf_config(tmp_path) == read_hf_config(hf[0])


def test_an_existing_destination_is_left_alone(
    hf: tuple[Path, Phi3ForCausalLM], checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    for direction, source in (("hf-to-phi4r", hf[0]), ("phi4r-to-hf", checkpoint)):
        with pytest.raises(UserError, match="exists already"):
            main(direction, source, tmp_path)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


WATCHED: list[Path] = []
SEEN: list[bool] = []
sys.addaudithook(lambda event, _: SEEN.extend(path.exists() for path in WATCHED) if event == "open" else None)


def test_the_destination_is_not_there_before_it_is_whole(
    hf: tuple[Path, Phi3ForCausalLM], checkpoint: Path, tmp_path: Path
) -> None:
    for direction, source in (("hf-to-phi4r", hf[0]), ("phi4r-to-hf", checkpoint)):
        SEEN.clear()
        WATCHED[:] = [tmp_path / direction]
        main(direction, source, tmp_path / direction)  # type: ignore[arg-type]
        WATCHED.clear()
        assert len(SEEN) > 4  # looked whenever a file was opened
        assert not any(SEEN)
        assert (tmp_path / direction).is_dir()


def test_a_conversion_that_runs_out_of_disk_leaves_nothing_behind(
    hf: tuple[Path, Phi3ForCausalLM], checkpoint: Path, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for direction, source in (("hf-to-phi4r", hf[0]), ("phi4r-to-hf", checkpoint)):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
            with pytest.raises(UserError, match=r"new: cannot be written: .*File too large") as caught:
                main(direction, source, tmp_path / "new")  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    data = copy / "dist" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"__0_0\.distcp: .* the checkpoint is damaged"):
        main("phi4r-to-hf", copy, tmp_path / "back")


def test_a_hugging_face_folder_is_not_exported(hf: tuple[Path, Phi3ForCausalLM], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a Hugging Face folder, expected a phi4r checkpoint"):
        main("phi4r-to-hf", hf[0], tmp_path / "back")


# --- memory

BIG = ModelConfig(
    num_layers=8,
    hidden_size=1024,
    ffn_hidden_size=2816,
    num_attention_heads=16,
    num_query_groups=4,
    head_dim=64,
    vocab_size=4096,
)

MEASURE = """
import sys, torch
from pathlib import Path
import phi4r.convert.hf, phi4r.convert.stream, phi4r.models.names
# not ru_maxrss, which starts at the peak of the process that started this one
def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
getattr(phi4r.convert.hf, sys.argv[1])(Path(sys.argv[2]), Path(sys.argv[3]))
print("grew by", peak() - before)
"""


def test_conversion_needs_memory_for_a_tensor_and_not_for_the_model(tmp_path: Path) -> None:
    shapes, get_tensor = list(hf_tensors(BIG).items()), random_weights(BIG, 0)
    (tmp_path / "hf").mkdir()
    # One shard only: memory must not follow the shard either.
    [shard] = plan_shards(shapes, "fp32", 10**12)
    with ShardWriter(tmp_path / "hf" / shard_names(1)[0], shard, "fp32") as writer:
        for name, _ in shard:
            writer.write(name, get_tensor(name))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf_config(BIG, {}, (), None)))
    largest = max(torch.Size(shape).numel() for _, shape in shapes) * 4
    total = BIG.num_parameters * 4
    assert total > 15 * largest
    for direction, source, target in (("hf_to_phi4r", "hf", "phi4r"), ("phi4r_to_hf", "phi4r", "back")):
        command = [sys.executable, "-c", MEASURE, direction, str(tmp_path / source), str(tmp_path / target)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        grew = int(out.split("grew by")[1])
        # The tensor, its rearrangement, and small change (Python, the index): far below the model.
        assert grew < 4 * largest + 16 * 2**20, (
            f"{direction}: {grew / 2**20:.0f} MiB of {total / 2**20:.0f} MiB"
        )
    assert HFWeights(tmp_path / "back").entries.keys() == dict(shapes).keys()
    stored = sum(path.stat().st_size for path in (tmp_path / "phi4r").rglob("*.distcp"))
    assert stored < 1.01 * total  # a view that is stored with all that lies behind it would double a part
