"""Runs that do not go wrong quietly: drift, hangs, deaths, spikes, and steps to do again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from phi4r.cli.main import main
from phi4r.configs.stages import SFTConfig
from phi4r.parallel import launch
from phi4r.parallel.launch import RankError, run_ranks
from phi4r.train.folders import replay_folder
from phi4r.train.health import fingerprints, load_batch, save_batch
from phi4r.train.log import HISTORY, SpikeWatch
from phi4r.train.watchdog import verdict
from tests.train import checkpoint_ranks as ranks

# --- replicas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_changes_with_any_single_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).to(dtype)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    [before] = fingerprints([tensor]).tolist()
    for element in range(tensor.numel()):
        for bit in range(8 * tensor.element_size()):
            other = tensor.clone()
            bits = other.view(-1)[element : element + 1].view(kind)
            bits ^= torch.tensor(1).to(kind) << bit
            assert fingerprints([other]).tolist() != [before], (element, bit)
    assert fingerprints([tensor.flip(0)]).tolist() != [before], "the order counts"
    assert fingerprints([tensor.clone()]).tolist() == [before]


def test_a_long_parameter_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    long = torch.randn((1 << 24) + 3)
    bits = long.view(torch.int32).long()
    expected = int((bits * (2 * torch.arange(len(bits)) + 1)).sum())
    assert fingerprints([long]).tolist() == [expected]


# --- jobs with a rank that goes wrong


def job(how: str, tmp_path: Path, dp: int = 2, timeout_s: int = 200) -> str:
    """The error of such a job."""
    payload = {"how": how, "folder": str(tmp_path), "dp": dp, "timeout_s": timeout_s}
    with pytest.raises(RankError) as caught:
        run_ranks("tests.train.health_ranks:run", payload, dp, tmp_path)
    return str(caught.value)


def steps(tmp_path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.multiprocess
@pytest.mark.proves(
    "A replica that drifted by one bit stops the run", how="a bit flipped in one rank", layouts="dp 3"
)
def test_a_replica_that_drifted_by_one_bit_stops_the_run_and_is_named(tmp_path: Path) -> None:
    message = job("drift", tmp_path, dp=3)
    assert "step 3: the copies of the model have drifted apart (train.check_replicas_every)" in message
    assert "rank 1: module.embedding.word_embeddings.weight" in message
    assert steps(tmp_path)[-1] == 3


@pytest.mark.multiprocess
def test_of_two_replicas_that_differ_both_are_named(tmp_path: Path) -> None:
    message = job("nan", tmp_path)
    assert "copies of the model have drifted apart" in message
    assert "rank 0, 1: module.embedding" in message, "of two nobody can say which one is right"


@pytest.mark.multiprocess
def test_the_rank_that_hangs_is_the_error_and_the_stacks_of_all_are_kept(tmp_path: Path) -> None:
    message = job("hang", tmp_path, timeout_s=20)
    assert "rank 1 on " in message
    assert "health_ranks.py" in message
    assert "in hang_here; 1 other ranks wait for it: no progress for" in message
    assert "gloo" not in message
    stacks = [(tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert "hang_here" in stacks[1]
    assert "hang_here" not in stacks[0]
    assert "train_step" in stacks[0]
    assert all("no progress for" in stack and "most recent call first" in stack for stack in stacks)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_rank_that_is_stopped_does_not_answer_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.5)  # a stopped process does not end when asked
    message = job("stop", tmp_path, timeout_s=20)
    assert "rank 1 does not answer (stopped, or its machine is gone)" in message


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("how", "cause"), [("kill", "killed by SIGKILL"), ("raise", "ValueError: the cause")]
)
def test_the_death_of_a_rank_is_the_error_and_not_what_others_see(
    how: str, cause: str, tmp_path: Path
) -> None:
    message = job(how, tmp_path)
    assert message.startswith("rank 1 failed")
    assert cause in message


def said(collective: str, place: str) -> dict[str, str]:
    return {"collective": collective, "place": place, "node": "n"}


def test_the_cause_of_a_hang_is_a_rank_missing_busy_or_out_of_step() -> None:
    waits, busy = said("all_reduce", "a.py:1 in f"), said("", "b.py:2 in g")
    assert verdict({0: waits, 2: waits}, 3) == (0, "rank 1 does not answer (stopped, or its machine is gone)")
    assert verdict({0: waits, 1: busy, 2: waits}, 3) == (
        1, "rank 1 on n hangs at b.py:2 in g; 2 other ranks wait for it"
    )  # fmt: skip
    who, what = verdict({0: waits, 1: said("barrier", "c.py:3 in h"), 2: waits}, 3)
    calls = "rank 0, 2 in all_reduce at a.py:1 in f; rank 1 in barrier at c.py:3 in h"
    assert (who, what) == (0, f"all ranks wait for each other: {calls}")


# --- spikes


def test_a_loss_far_above_the_last_ones_is_a_spike_and_is_not_remembered() -> None:
    random = np.random.default_rng()
    watch = SpikeWatch(10)
    assert not any(watch.is_spike(float(loss)) for loss in 2 + 0.1 * random.standard_normal(200))
    found = [watch.is_spike(loss) for loss in (5.0, 5.0, 2.1, float("nan"), 1.0)]
    assert found == [True, True, False, False, False]
    assert not any(SpikeWatch(0).is_spike(loss) for loss in [1.0] * 100 + [1e9]), "0: never"
    falling = SpikeWatch(10)
    assert not any(falling.is_spike(10 * math.exp(-step / 20)) for step in range(300)), (
        "a falling loss is none"
    )


def test_a_resumed_run_flags_the_steps_that_an_uninterrupted_one_does(tmp_path: Path) -> None:
    random = np.random.default_rng()
    losses = [float(x) for x in 2 + 0.1 * random.standard_normal(3 * HISTORY)]
    for step in (50, 51, 180, 290):
        losses[step] = 9.0
    whole = SpikeWatch(10)
    flags = [whole.is_spike(loss) for loss in losses]
    assert sum(flags) == 4
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": i + 1, "loss": x, **({"loss_spike": 1} if flags[i] else {})} for i, x in enumerate(losses)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    resumed = SpikeWatch.resumed(10, path, 185)
    assert [resumed.is_spike(loss) for loss in losses[185:]] == flags[185:]


# --- replay


def test_a_batch_is_kept_as_it_was(tmp_path: Path) -> None:
    rows = ranks.rows(0)
    rows[0].extras["advantages"] = np.linspace(0, 1, ranks.LENGTH, dtype=np.float32)
    save_batch(tmp_path, rows, {"stage": "sft", "step": 3, "temperature": 1.0})
    found, info = load_batch(tmp_path)
    assert info["step"] == 3
    assert len(found) == len(rows)
    for ours, theirs in zip(found, rows, strict=True):
        for name in ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens", "doc_index"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
            assert getattr(ours, name).dtype == getattr(theirs, name).dtype
        assert ours.extras.keys() == theirs.extras.keys()
        assert all(np.array_equal(ours.extras[name], theirs.extras[name]) for name in theirs.extras)


def command(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_run_that_gives_up_can_be_replayed_row_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from phi4r.configs.load import prepare_run_dir
    from phi4r.configs.sections import CheckpointConfig, TrainConfig
    from phi4r.data.tokenizer import Tokenizer
    from phi4r.train.loop import open_loop

    config = SFTConfig(
        train=TrainConfig(max_nonfinite_steps=0), checkpoint=CheckpointConfig(save_final=False)
    )
    prepare_run_dir(config, tmp_path)
    engine = ranks.make_engine({})
    rows = ranks.rows(0)
    others = np.concatenate([row.input_ids for row in (rows[0], *rows[2:])])
    bad_token = np.setdiff1d(rows[1].input_ids, others)[0]
    with open_loop(config, tmp_path, engine, Tokenizer.builtin(), "sft") as loop:
        engine.models[0].embedding.word_embeddings.weight.data[int(bad_token)] = float("inf")
        engine.sync_optimizer()
        result = engine.train_step(rows, ranks.sft_loss, 1e-3)
        told = r"step 8: .*`phi4r replay .*` does the step again, row by row"
        with pytest.raises(RuntimeError, match=told):
            loop.check_finite(7, result, rows)

    assert command(["replay", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "not finite: row 1\n" in out
    report = json.loads((replay_folder(tmp_path) / "report.json").read_text())
    assert [row["finite"] for row in report["rows"]] == [index != 1 for index in range(len(rows))]
    assert report["rows"][1]["first_nonfinite"] == "embedding.word_embeddings (rank 0)"
    assert report["rows"][0]["first_nonfinite"] == ""
    assert not report["whole"]["finite"]
    assert report["step"] == 8


def test_there_is_nothing_to_replay_in_a_run_that_did_not_give_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["replay", str(tmp_path)]) == 2
    assert "nothing to replay" in capsys.readouterr().err
