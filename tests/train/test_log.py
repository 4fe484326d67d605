"""metrics.jsonl holds every step once, whatever was killed and resumed; the other sinks get the same
numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from phi4r.configs.sections import LogConfig
from phi4r.core.errors import UserError
from phi4r.train.log import MetricsLogger, truncate_metrics


def steps_in(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_on_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, LogConfig()) as log:
        log.log(1, {"loss": 0.1 + 0.2, "num_valid_tokens": 7, "note": "x"})
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.1 + 0.2, "num_valid_tokens": 7, "note": "x"}]  # to the last bit


def test_resuming_drops_the_steps_beyond_the_checkpoint(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, LogConfig()) as log:
        for step in range(1, 6):
            log.log(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with MetricsLogger(tmp_path, LogConfig(), resume_step=3) as log:
        assert steps_in(tmp_path) == [1, 2, 3]
        log.log(4, {"loss": 2.0})
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_fresh_run_in_an_old_folder_starts_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsLogger(tmp_path, LogConfig()).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_the_kept_lines_are_kept_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1,  "loss": 1e-3}\n{"step": 2}\n')
    assert truncate_metrics(path, 1) == 1
    assert path.read_text() == '{"step": 1,  "loss": 1e-3}\n'


def test_a_line_that_is_no_metrics_row_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2"):
        MetricsLogger(tmp_path, LogConfig(), resume_step=5)
    assert path.read_text() == '{"step": 1}\nhello\n'


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, LogConfig()) as log:
        log.log(1, {"loss": float("nan"), "grad_norm": float("inf")})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": "nan", "grad_norm": "inf"}


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with MetricsLogger(tmp_path, LogConfig(tensorboard=True)) as log:
        log.log(1, {"loss": 1.0})
    assert os.listdir(tmp_path) == []


def test_tensorboard_forgets_steps_beyond_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLogger(tmp_path, LogConfig(tensorboard=True)) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": step / 4, "note": "text is for the file only"})
    with MetricsLogger(tmp_path, LogConfig(tensorboard=True), resume_step=2) as log:
        log.log(3, {"loss": 8.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.25), (2, 0.5), (3, 8.0)]


def test_wandb_works_offline_and_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for resume_step in (0, 1):
        with MetricsLogger(tmp_path, LogConfig(wandb="offline"), resume_step=resume_step) as log:
            log.log(resume_step + 1, {"loss": 1.0})
    run_id = (tmp_path / "wandb_id").read_text().strip()
    runs = [entry.name for entry in (tmp_path / "wandb").iterdir() if entry.name.startswith("offline-run")]
    assert runs
    assert all(run_id in name for name in runs)  # wandb adds "-1" to a second run of the same second
    assert steps_in(tmp_path) == [1, 2]
