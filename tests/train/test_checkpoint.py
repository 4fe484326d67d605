"""Checkpoints: a resumed run is the run that was not interrupted, in the same layout to the bit, in others to
rounding.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from phi4r.configs.sections import ParallelConfig
from phi4r.convert.hf import phi4r_to_hf
from phi4r.core.errors import UserError
from phi4r.data.tokenizer import Tokenizer
from phi4r.models.huggingface import HFWeights
from phi4r.models.names import from_mcore, local_weights
from phi4r.parallel.launch import run_ranks
from phi4r.train import folders
from phi4r.train.checkpoint import WORK_ROUNDS, load_checkpoint, load_model
from phi4r.train.folders import (
    checkpoints_folder,
    find_latest,
    read_manifest,
    read_model_config,
    remove_leftovers,
    resolve_checkpoint,
    tokenizer_folder,
)
from phi4r.train.retention import Retention
from phi4r.train.save import CheckpointError, CheckpointSaver
from tests.train import checkpoint_ranks as ranks

Work = tuple[str, str, dict[str, Any], str]

TP1: dict[str, Any] = {}
PLAIN = {"distributed_optimizer": False}
# The six layouts of the matrix: each one's checkpoint is resumed in every other.
MATRIX: dict[str, dict[str, Any]] = {
    "tp1": TP1,
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2pp2": {"tp": 2, "pp": 2},
    "dp2": {"dp": 2},
    "cp2": {"cp": 2},
}
# Further runs, resumed in their own layout and in one more: name -> (layout, dtype, the other layout)
OTHERS: dict[str, tuple[dict[str, Any], str, dict[str, Any] | None]] = {
    "tp1_plain": (PLAIN, "fp32", {"tp": 2, **PLAIN}),
    "dp2_bf16": ({"dp": 2}, "bf16", None),
    "dp2_fp64": ({"dp": 2}, "fp64", None),
    "dp2_overlap": ({"dp": 2, "overlap": True}, "fp32", TP1),
    "tp2_sp": ({"tp": 2, "sp": True}, "fp32", {"pp": 2}),
    "pp2_vpp2": ({"pp": 2, "vpp": 2}, "fp32", {"cp": 2}),
    "pp2_plain": ({"pp": 2, **PLAIN}, "fp32", PLAIN),
}
SAVED = {name: (sizes, "fp32") for name, sizes in MATRIX.items()}
SAVED |= {name: (sizes, dtype) for name, (sizes, dtype, _) in OTHERS.items()}
RESHARDED = [(run, sizes) for run in MATRIX for name, sizes in MATRIX.items() if name != run]
RESHARDED += [(run, other) for run, (_, _, other) in OTHERS.items() if other is not None]

Losses = dict[tuple[str, str, str], list[float]]


def key(verb: str, run: str, sizes: dict[str, Any]) -> tuple[str, str, str]:
    return verb, run, json.dumps(sizes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def losses(runs: Path) -> Losses:
    """What every run, resumed run and evaluation gave, in three launches and two parts in this process."""
    parts = [save_work(1), save_work(2), save_work(4) + resume_work(4), resume_work(2), resume_work(1)]
    parts[3] += [("fail", "unwritable", {"tp": 2}, "fp32")]
    parts[3] += [("evaluate", "tp1", {"tp": 2}, "fp32"), ("evaluate", "tp1", {"pp": 2}, "bf16")]
    parts[4] += [("evaluate", run, TP1, "fp32") for run in ("tp1", "dp2_overlap", "pp2_vpp2")]
    found: Losses = {}
    for world_size, work in zip((1, 2, 4, 2, 1), parts, strict=True):
        out = runs / "out.json"
        payload = {"folder": str(runs), "work": work, "out": str(out)}
        run_ranks("tests.train.checkpoint_ranks:run", payload, world_size, runs / "job")
        for (verb, run, sizes, _), result in zip(work, json.loads(out.read_text()), strict=True):
            found[key(verb, run, sizes)] = result
    return found


def num_ranks(sizes: dict[str, Any]) -> int:
    return ParallelConfig(**sizes).world_size


def save_work(world_size: int) -> list[Work]:
    return [("save", run, *how) for run, how in SAVED.items() if num_ranks(how[0]) == world_size]


def resume_work(world_size: int) -> list[Work]:
    own = [("resume", run, *how) for run, how in SAVED.items() if num_ranks(how[0]) == world_size]
    return own + [("resume", r, sizes, "fp32") for r, sizes in RESHARDED if num_ranks(sizes) == world_size]


def close(found: list[float], expected: list[float]) -> None:
    # fp32 sums in another order: a few ulps of the loss after some steps
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.multiprocess
@pytest.mark.slow  # a quarter of an hour where other jobs run
@pytest.mark.parametrize("run", SAVED)
@pytest.mark.proves(
    "Resuming in the same layout is bit-identical",
    how="losses of an uninterrupted run, equal",
)
def test_resuming_in_the_same_layout_is_bit_identical(losses: Losses, run: str) -> None:
    sizes = SAVED[run][0]
    assert losses[key("resume", run, sizes)] == losses[key("save", run, sizes)][ranks.SAVE_AT :]


@pytest.mark.multiprocess
@pytest.mark.slow  # a quarter of an hour where other jobs run
@pytest.mark.parametrize(("run", "sizes"), RESHARDED, ids=str)
@pytest.mark.proves("A checkpoint loads in another layout", how="losses after loading")
def test_resuming_in_another_layout_goes_on_with_the_same_losses(
    losses: Losses, run: str, sizes: dict
) -> None:
    expected = losses[key("save", "tp1", TP1)]
    assert max(expected) - min(expected) > 0.1  # equality of a flat line would say nothing
    close(losses[key("resume", run, sizes)], expected[ranks.SAVE_AT :])


@pytest.mark.multiprocess
@pytest.mark.slow  # a quarter of an hour where other jobs run
def test_weights_alone_load_in_any_layout_and_dtype(losses: Losses) -> None:
    [expected] = losses[key("evaluate", "tp1", TP1)]
    for run, sizes in (("tp1", {"tp": 2}), ("dp2_overlap", TP1), ("pp2_vpp2", TP1)):
        close(losses[key("evaluate", run, sizes)], [expected])
    [rounded] = losses[key("evaluate", "tp1", {"pp": 2})]
    assert rounded != expected
    assert rounded == pytest.approx(expected, rel=2**-7)  # bf16 keeps 8 bits


@pytest.mark.multiprocess
@pytest.mark.slow  # a quarter of an hour where other jobs run
@pytest.mark.parametrize("run", ["dp2_bf16", "dp2_overlap", "tp2_sp", "pp2_vpp2", "tp2pp2"])
def test_a_trained_checkpoint_of_any_layout_exports_the_weights_it_holds(
    losses: Losses, runs: Path, run: str, tmp_path: Path
) -> None:
    dtype = SAVED[run][1]
    phi4r_to_hf(runs / run, tmp_path / "hf")
    exported = HFWeights(tmp_path / "hf")
    assert exported.dtype == dtype
    engine = ranks.make_engine(TP1, dtype)
    load_model(runs / run, engine.chunks)
    for weight, parameter in local_weights(engine.chunks, ranks.MODEL):
        assert torch.equal(exported.get_tensor(weight.hf), from_mcore(weight, parameter)), weight.hf
    # and an HF folder can start a run
    other = ranks.make_engine(TP1, dtype)
    load_model(tmp_path / "hf", other.chunks)
    for (_, mine), (weight, theirs) in zip(
        local_weights(engine.chunks, ranks.MODEL), local_weights(other.chunks, ranks.MODEL), strict=True
    ):
        assert torch.equal(mine, theirs), weight.hf


@pytest.mark.multiprocess
@pytest.mark.slow  # a quarter of an hour where other jobs run
def test_an_error_of_writing_on_one_rank_is_raised_on_all(losses: Losses) -> None:
    assert losses[key("fail", "unwritable", {"tp": 2})] == []


# --- the work-rounds


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run saved at SAVE_AT by one process, and its later losses."""
    run_dir = tmp_path_factory.mktemp("run")
    engine = ranks.make_engine(TP1)
    ranks.train(engine, 0, ranks.SAVE_AT)
    ranks.save(engine, run_dir, tokenizer=Tokenizer.builtin(), layout={"tp": 1})
    return run_dir, ranks.train(engine, ranks.SAVE_AT, ranks.STEPS)


def test_without_filled_adam_state_a_fresh_optimizer_cannot_be_loaded(
    saved: tuple[Path, list[float]],
) -> None:
    with pytest.raises(AssertionError):
        ranks.resume(saved[0], TP1, leave_out=("fill_adam_state",))


def test_with_shared_steps_the_resumed_run_silently_differs(saved: tuple[Path, list[float]]) -> None:
    losses = ranks.resume(saved[0], TP1, leave_out=("unshare_steps",))
    assert losses[0] == saved[1][0]
    assert losses[1] != pytest.approx(saved[1][1], rel=1e-4)


def test_with_all_work_rounds_the_resumed_run_is_the_same(saved: tuple[Path, list[float]]) -> None:
    assert ranks.resume(saved[0], TP1) == saved[1]
    assert set(WORK_ROUNDS) == {"fill_adam_state", "unshare_steps"}


@pytest.mark.parametrize("sizes", [TP1, PLAIN], ids=["distributed", "plain"])
def test_a_run_saved_before_its_first_step_can_be_resumed(sizes: dict[str, Any], tmp_path: Path) -> None:
    engine = ranks.make_engine(sizes)
    folder = ranks.save(engine, tmp_path, step=0)
    expected = ranks.train(engine, 0, 3)
    engine = ranks.make_engine(sizes)
    ranks.train(engine, 1, 2)
    load_checkpoint(folder, engine.chunks, engine.optimizer)
    assert ranks.train(engine, 0, 3) == expected


# --- saving

STARTED: list[str] = []
sys.addaudithook(lambda event, _: STARTED.append(event) if event in ("subprocess.Popen", "os.fork") else None)


def test_saving_starts_no_process(saved: tuple[Path, list[float]], tmp_path: Path) -> None:
    engine = ranks.make_engine(TP1)
    STARTED.clear()
    ranks.save(engine, tmp_path)
    assert not STARTED


def test_a_run_folder_that_was_lost_is_not_made_anew(tmp_path: Path) -> None:
    """A run of an hour's work would end with a folder that holds one checkpoint and no metrics."""
    engine, run_dir = ranks.make_engine(TP1), tmp_path / "run"
    saver = CheckpointSaver(run_dir, engine.chunks, engine.optimizer, model_cfg=engine.model_config)
    run_dir.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="No such file or directory"):
        saver.begin(1, {})
    assert not run_dir.exists()


def test_a_checkpoint_needs_none_of_the_original_files(
    saved: tuple[Path, list[float]],
) -> None:
    folder = find_latest(saved[0])
    assert folder is not None
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.optimizer, manifest.layout) == (ranks.SAVE_AT, "distributed", {"tp": 1})
    assert read_model_config(saved[0]) == ranks.MODEL
    assert tokenizer_folder(saved[0]) == folder / "tokenizer"
    assert Tokenizer.load(folder / "tokenizer").encode("1+2") == Tokenizer.builtin().encode("1+2")
    assert (checkpoints_folder(saved[0]) / "latest").read_text() == folder.name + "\n"


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    engine = ranks.make_engine(TP1)
    kept = []
    for step in (1, 2, 3):
        ranks.save(engine, tmp_path, step=step, retention=Retention(2))
        kept.append(sorted(path.name for path in checkpoints_folder(tmp_path).iterdir()))
    assert kept[1] == ["latest", "step_000001", "step_000002"]
    assert kept[2] == ["latest", "step_000002", "step_000003"]
    ranks.save(engine, tmp_path, step=3, retention=Retention(1))  # saving a step again replaces it
    assert sorted(path.name for path in checkpoints_folder(tmp_path).iterdir()) == ["latest", "step_000003"]


# --- what is refused


@pytest.fixture
def copy(saved: tuple[Path, list[float]], tmp_path: Path) -> Path:
    """A copy of the run folder, to be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def test_another_model_is_refused_and_named(saved: tuple[Path, list[float]]) -> None:
    folder = find_latest(saved[0])
    assert folder is not None
    for changes, message in (
        ({"vocab_size": 128}, r"lm_head.weight is \[64, 32\]|embed_tokens.weight is \[64, 32\]"),
        ({"ffn_hidden_size": 96}, r"layers.0.mlp.gate_up_proj.weight is \[128, 32\]"),
        ({"num_layers": 2}, "a model of 4 layers, expected 2"),
    ):
        engine = ranks.make_engine(TP1, model=replace(ranks.MODEL, **changes))
        with pytest.raises(UserError, match=message):
            load_checkpoint(folder, engine.chunks)


def test_another_kind_of_optimizer_is_refused(saved: tuple[Path, list[float]], tmp_path: Path) -> None:
    engine = ranks.make_engine(PLAIN)
    folder = find_latest(saved[0])
    assert folder is not None
    with pytest.raises(UserError, match="distributed_optimizer = true, resumed with false"):
        load_checkpoint(folder, engine.chunks, engine.optimizer)
    engine = ranks.make_engine(TP1)
    optimizer, engine.optimizer = engine.optimizer, None
    folder = ranks.save(engine, tmp_path)
    with pytest.raises(UserError, match="holds weights only"):
        load_checkpoint(folder, engine.chunks, optimizer)


def test_a_damaged_checkpoint_is_passed_over_and_named(copy: Path) -> None:
    newest = find_latest(copy)
    assert newest is not None
    older = newest.with_name("step_000001")
    shutil.copytree(newest, older)
    data = next((newest / "dist").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert find_latest(copy) == older
    with pytest.raises(UserError, match=rf"{data.name}: \d+ bytes, expected \d+: the checkpoint is damaged"):
        resolve_checkpoint(newest)
    data.unlink()
    with pytest.raises(UserError, match=f"{data.name}: missing from the checkpoint"):
        resolve_checkpoint(newest)
    (newest / "phi4r.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a phi4r checkpoint's phi4r\.json"):
        resolve_checkpoint(newest)


def test_a_path_may_be_a_checkpoint_or_a_run_and_anything_else_is_refused(copy: Path, tmp_path: Path) -> None:
    newest = find_latest(copy)
    assert newest is not None
    assert resolve_checkpoint(newest) == resolve_checkpoint(copy) == ("phi4r", newest)
    shutil.rmtree(newest)
    (tmp_path / "empty").mkdir()
    for path, message in (
        (copy, "a run folder without a whole checkpoint"),
        (tmp_path / "empty", "neither a phi4r checkpoint"),
        (tmp_path / "nowhere", "no such checkpoint"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            resolve_checkpoint(path)
        assert "\n" not in str(caught.value)


# --- kill -9

KILLED_SAVES = """
import os, signal, sys
from pathlib import Path
from phi4r.configs.sections import ModelConfig
from phi4r.train import folders
from phi4r.train.retention import Retention

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")

def save(run_dir, step, keep_last):
    temporary = folders.begin(run_dir, step)
    for name in ("dist/data", "dist/more"):
        (temporary / name).write_text(str(step) * 1000)
    folders.write_manifest(temporary, folders.Manifest(step, ModelConfig()))
    folders.publish(run_dir, step, temporary, Retention(keep_last))

def child(run_dir, last_event):
    count = 0
    def hook(event, args):
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == last_event:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    for step in (2, 3, 3):  # a new one, one that retires another, one that replaces itself
        save(run_dir, step, 1 if step == 3 else 2)
    os._exit(0)

base = Path(sys.argv[1])
event = 0
while True:
    event += 1
    run_dir = base / f"killed_at_{event}"
    run_dir.mkdir()
    save(run_dir, 1, 2)
    pid = os.fork()
    if pid == 0:
        child(run_dir, event)
    if os.waitpid(pid, 0)[1] == 0:
        break
print(event)
"""


def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_SAVES, str(tmp_path)]
    moments = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert moments > 40
    steps = set()
    for event in range(1, moments + 1):
        run_dir = tmp_path / f"killed_at_{event}"
        remove_leftovers(run_dir)
        newest = find_latest(run_dir)
        assert newest is not None, event
        steps.add(newest.name)
        assert {(newest / "dist" / name).read_text() for name in ("data", "more")} == {
            str(read_manifest(newest).step) * 1000
        }
        named = (checkpoints_folder(run_dir) / "latest").read_text().strip()
        assert newest.with_name(named).is_dir(), (event, named)
        left = {path.name for path in checkpoints_folder(run_dir).iterdir()}
        assert all(name == "latest" or not folders.incompleteness(newest.with_name(name)) for name in left), (
            event,
            left,
        )
    assert steps == {"step_000001", "step_000002", "step_000003"}
