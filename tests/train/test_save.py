"""Saving beside the training: what is written, when it is seen, what stays when it fails, what damage
does."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from phi4r.cli.main import main
from phi4r.core.errors import UserError
from phi4r.train import folders
from phi4r.train.checkpoint import DamagedError, load_checkpoint, load_model
from phi4r.train.folders import all_steps, checkpoints_folder, damage, find_latest, read_manifest
from phi4r.train.retention import Retention
from phi4r.train.save import CheckpointError, CheckpointSaver
from tests.train import checkpoint_ranks as ranks
from tests.train.test_loop import TINY, metrics

TP1: dict[str, Any] = {}


def saver_of(engine: Any, run_dir: Path, **options: Any) -> CheckpointSaver:
    return CheckpointSaver(run_dir, engine.chunks, engine.optimizer, model_cfg=engine.model_config, **options)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in checkpoints_folder(run_dir).iterdir())


# --- in the background


def test_a_background_checkpoint_holds_the_step_at_which_it_was_begun(
    tmp_path: Path,
) -> None:
    engine = ranks.make_engine(TP1)
    ranks.train(engine, 0, ranks.SAVE_AT)
    saver = saver_of(engine, tmp_path, background=True)
    saver.begin(ranks.SAVE_AT, {"data": {"position": ranks.SAVE_AT}})
    expected = ranks.train(engine, ranks.SAVE_AT, ranks.STEPS)  # weights and Adam's state change meanwhile
    saver.wait()
    assert ranks.resume(tmp_path, TP1) == expected
    # and again, now with the plan and the buffers of the first time
    engine = ranks.make_engine(TP1)
    saver = saver_of(engine, tmp_path / "again", background=True)
    saver.begin(0, {})
    saver.wait()
    ranks.train(engine, 0, ranks.SAVE_AT)
    saver.begin(ranks.SAVE_AT, {"data": {"position": ranks.SAVE_AT}})
    ranks.train(engine, ranks.SAVE_AT, ranks.STEPS)
    saver.wait()
    assert ranks.resume(tmp_path / "again", TP1) == expected


class LateSaver(CheckpointSaver):
    """A saver whose thread writes when it is told to."""

    go = threading.Event()

    def _write(self, pending: Any) -> None:
        assert self.go.wait(60)
        super()._write(pending)


def test_weights_changed_before_they_are_written_are_saved_as_they_were(tmp_path: Path) -> None:
    engine = ranks.make_engine(TP1)
    saver = LateSaver(
        tmp_path, engine.chunks, engine.optimizer, model_cfg=engine.model_config, background=True
    )
    parameters = list(engine.models[0].parameters())
    expected = [p.detach().clone() for p in parameters]
    saver.begin(0, {})
    ranks.train(engine, 0, 1)
    assert any(not torch.equal(p, value) for p, value in zip(parameters, expected, strict=True))
    saver.go.set()
    saved = saver.wait()
    assert saved is not None
    load_model(saved.folder, engine.chunks)
    assert all(torch.equal(p, value) for p, value in zip(parameters, expected, strict=True))


def test_nothing_is_visible_before_all_of_it_is_written(tmp_path: Path) -> None:
    engine = ranks.make_engine(TP1)
    saver = saver_of(engine, tmp_path, background=True)
    saver.begin(1, {})
    assert names(tmp_path) == [".tmp-step_000001"]
    [writer] = [thread for thread in threading.enumerate() if thread.name == "checkpoint"] or [None]
    if writer is not None:
        writer.join(60)
    assert names(tmp_path) == [".tmp-step_000001"], "the manifest comes last, from the training thread"
    assert find_latest(tmp_path) is None
    saved = saver.poll()
    assert saved is not None
    assert names(tmp_path) == ["latest", "step_000001"]
    assert saved.num_bytes == sum(path.stat().st_size for path in saved.folder.rglob("*.distcp"))
    assert saver.poll() is None
    assert saver.pending is None


def test_weights_and_optimizer_have_their_own_files_written_once(tmp_path: Path) -> None:
    engine = ranks.make_engine(TP1)
    folder = ranks.save(engine, tmp_path)
    num_parameters = sum(p.numel() for p in engine.models[0].parameters())
    for name, bytes_each in (("weights", 4), ("optimizer", 12)):  # fp32: the weight; its copy and two moments
        size = (folder / "dist" / f"__0_{name}.distcp").stat().st_size
        num_tensors = bytes_each // 4 * 50
        assert bytes_each * num_parameters <= size <= bytes_each * num_parameters + num_tensors * 2000
    assert sorted(path.name for path in (folder / "dist").glob("*.distcp")) == [
        "__0_optimizer.distcp",
        "__0_weights.distcp",
    ]


# --- retention


def test_the_newest_every_nth_and_the_best_are_kept() -> None:
    loss = {step: {"loss": 3.0 - 0.01 * step if step <= 50 else 3.5} for step in range(10, 101, 10)}
    loss[60]["accuracy"] = 0.9
    loss[50]["accuracy"] = loss[70]["accuracy"] = float("nan")
    for retention, kept in (
        (Retention(2), {90, 100}),
        (Retention(0), set(loss)),
        (Retention(1, keep_every=40), {40, 80, 100}),
        (Retention(1, best_metric="loss"), {50, 100}),
        (Retention(1, best_metric="loss", best_mode="max"), {60, 100}),  # of equals the earliest
        (Retention(1, best_metric="accuracy", best_mode="max"), {60, 100}),
        (Retention(1, best_metric="absent"), {100}),
    ):
        assert set(loss) - set(retention.to_retire(loss)) == kept, retention


def test_a_run_keeps_the_best_checkpoint_and_retires_the_others(tmp_path: Path) -> None:
    engine = ranks.make_engine(TP1)
    retention = Retention(1, keep_every=4, best_metric="heldout_loss")
    saver = saver_of(engine, tmp_path, retention=retention, background=True)
    for step, loss in enumerate([5.0, 2.0, 3.0, 4.0, 6.0, 2.5], start=1):
        saver.begin(step, {}, {"heldout_loss": loss})
        saver.wait()
    saver.close()
    assert names(tmp_path) == ["latest", "step_000002", "step_000004", "step_000006"]
    assert read_manifest(checkpoints_folder(tmp_path) / "step_000002").metrics == {"heldout_loss": 2.0}


# --- a disk that takes no more


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """Every file that grows beyond `num_bytes` is refused: to this process a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[None]:
    """A file system of its own at `folder`, if this user may mount one."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={num_bytes}".encode()) != 0:
        pytest.skip(f"cannot mount a small disk: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.umount2(str(folder).encode(), 2)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(background: bool, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 4_000_000):
        engine = ranks.make_engine(TP1)
        saver = saver_of(engine, disk, background=background, retention=Retention(5))
        saver.begin(1, {})
        saver.wait()
        (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - 100_000))
        saver.begin(2, {})
        with pytest.raises(
            CheckpointError, match=r"step 2: .*\.distcp: No space left on device \(rank 0\)"
        ) as e:
            saver.wait()
        assert "the newest whole one is" in str(e.value)
        assert "step_000001" in str(e.value)
        assert names(disk) == ["latest", "step_000001"], "what was half written is gone"
        assert not damage(checkpoints_folder(disk) / "step_000001")
        (disk / "filler").unlink()
        saver.begin(3, {})  # and when there is space again the next one succeeds
        saved = saver.wait()
        assert saved is not None
        assert not damage(saved.folder)


def test_a_file_that_cannot_grow_is_an_error_of_the_disk_and_not_of_torch(tmp_path: Path) -> None:
    saver = saver_of(ranks.make_engine(TP1), tmp_path)
    for limit in (20_000, 1_000, 0):  # amid the tensors, amid the first, before anything
        with small_files(limit):
            saver.begin(1, {})
            with pytest.raises(CheckpointError, match="File too large"):
                saver.wait()
        assert names(tmp_path) == []


def run(*words: str) -> int:
    """The command in this process; returns the exit code."""
    with pytest.raises(SystemExit) as ended:
        main([*TINY, "--optimizer.decay", "constant", *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_run_stops_or_goes_on_when_it_cannot_save_as_configured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run-dir", str(tmp_path), "--checkpoint.every", "2"]
    assert run(*words, "--train.num_steps", "2") == 0
    with small_files(40_000):
        assert run(*words, "--train.num_steps", "8") == 2
        assert "error: checkpoint of step 4: " in capsys.readouterr().err
        assert metrics(tmp_path)[-1]["step"] in (4, 5, 6)
        words += ["--checkpoint.on_error", "continue"]
        assert run(*words, "--train.num_steps", "7", "--checkpoint.save_final", "false") == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "resuming" in out
        assert "after step 2" in out
        assert "going on without it (checkpoint.on_error = continue, failure 2 of this run)" in out
        assert run(*words, "--train.num_steps", "8") == 2, "a run that ends without its result has failed"
    assert list(all_steps(tmp_path)) == [2]
    assert run(*words, "--train.num_steps", "8") == 0
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 9))
    assert list(all_steps(tmp_path)) == [6, 8]


# --- damage


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("trained")
    assert run("--run-dir", str(run_dir), "--checkpoint.every", "2", "--train.num_steps", "4") == 0
    return run_dir


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def flip(path: Path, position: int) -> None:
    """Turn one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


@pytest.mark.proves("A flipped bit in a checkpoint is found", how="CRC-32 of every file")
def test_a_flipped_bit_anywhere_is_found_and_its_file_named(copy: Path) -> None:
    folder = find_latest(copy)
    assert folder is not None
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) >= 7
    assert damage(folder) == []
    for path in files:
        for position in (0, path.stat().st_size // 3, path.stat().st_size - 2):
            flip(path, position)
            found = damage(folder)
            assert len(found) == 1, (path, position)
            assert str(path) in found[0]
            flip(path, position)
    manifest = folder / folders.MANIFEST
    for position in range(manifest.stat().st_size - 1):  # of the manifest any bit, whatever it means
        flip(manifest, position)
        assert folders.incompleteness(folder), position
        flip(manifest, position)
    assert damage(folder) == []


def test_ranks_share_the_reading_and_miss_nothing(copy: Path) -> None:
    folder = find_latest(copy)
    assert folder is not None
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            flip(path, 0)
            found = [len(damage(folder, part, 3)) for part in range(3)]
            assert sum(found) == 1 or path.name == folders.MANIFEST, path
            flip(path, 0)


@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_a_damaged_checkpoint_stops_and_an_older_one_is_offered(
    harm: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = checkpoints_folder(copy) / "step_000004" / "dist" / "__0_optimizer.distcp"
    if harm == "flip":
        flip(shard, shard.stat().st_size // 2)
    else:
        os.truncate(shard, shard.stat().st_size - 1)
    before = (copy / "metrics.jsonl").read_text()
    words = ["--run-dir", str(copy), "--train.num_steps", "6", "--checkpoint.every", "2"]
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert f"{shard}: " in error
    assert f"{checkpoints_folder(copy) / 'step_000002'} is whole" in error
    assert "--checkpoint.on_damaged older" in error
    assert (copy / "metrics.jsonl").read_text() == before
    assert list(all_steps(copy)) == [2, 4]

    assert run(*words, "--checkpoint.on_damaged", "older") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "set aside, going on from" in out
    assert "after step 2" in out
    assert [row["step"] for row in metrics(copy)] == list(range(1, 7))
    assert "damaged-step_000004" in names(copy)
    assert list(all_steps(copy)) == [4, 6]
    losses = [row["loss"] for row in metrics(copy)]
    assert losses[:4] == [json.loads(line)["loss"] for line in before.splitlines()]


def test_without_an_older_checkpoint_there_is_nothing_to_offer(copy: Path) -> None:
    engine = ranks.make_engine(TP1)
    folder = ranks.save(engine, copy / "alone")
    flip(folder / "dist" / "__0_weights.distcp", 100)
    with pytest.raises(DamagedError, match=r"__0_weights\.distcp: its checksum is not the one"):
        load_checkpoint(folder, engine.chunks, engine.optimizer)
    assert folders.older_whole(folder) is None


def test_an_older_checkpoint_that_is_damaged_too_is_not_offered(copy: Path) -> None:
    middle = checkpoints_folder(copy) / "step_000003"
    shutil.copytree(checkpoints_folder(copy) / "step_000002", middle)
    flip(middle / "dist" / "common.pt", 50)
    newest = checkpoints_folder(copy) / "step_000004"
    assert folders.older_whole(newest) == checkpoints_folder(copy) / "step_000002"


# --- phi4r checkpoint


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_checkpoints_are_listed_verified_removed_and_exported(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("ls", str(copy), "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["step"], row["problem"]) for row in rows] == [
        ("step_000002", 2, ""),
        ("step_000004", 4, ""),
    ]
    assert rows[1]["metrics"]["loss"] == metrics(copy)[-1]["loss"]
    assert command("verify", str(copy)) == 0
    assert capsys.readouterr().out.count(": whole (") == 2

    flip(checkpoints_folder(copy) / "step_000004" / "dist" / "common.pt", 9)
    assert command("verify", str(copy)) == 2
    error = capsys.readouterr().err
    assert "step_000004/dist/common.pt: its checksum is not the one it was written with" in error
    assert f"the newest whole one is {checkpoints_folder(copy) / 'step_000002'}" in error

    assert command("rm", str(copy), "4") == 0
    assert names(copy) == ["latest", "step_000002"]
    assert (checkpoints_folder(copy) / "latest").read_text() == "step_000002\n"
    capsys.readouterr()
    assert command("rm", str(copy), "4") == 2
    assert "there are: step_000002" in capsys.readouterr().err

    assert command("export", str(copy), str(tmp_path / "hf")) == 0
    assert (tmp_path / "hf" / "config.json").exists()
    assert command("ls", str(tmp_path)) == 2
    with pytest.raises(UserError, match="no such checkpoint"):
        folders.remove(copy, 77)
