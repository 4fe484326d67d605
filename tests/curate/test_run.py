"""The whole of `phi4r curate`: planted defects are found, nothing else goes, finished work is not redone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi4r.configs.sections import CurateSettings, ModelConfig, ProblemsConfig
from phi4r.configs.stages import CurateConfig
from phi4r.core.errors import UserError
from phi4r.core.io import read_jsonl
from phi4r.core.problem import Problem
from phi4r.curate.pool import DEFECT_SHARES
from phi4r.curate.run import main
from phi4r.data.records import load_problems
from phi4r.train import folders
from phi4r.train.retention import Retention


class Sampler:
    """Pass rates from the problem's text; remembers what it was asked, and can die after some problems."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.dies_after = dies_after

    def __call__(self, problems: Sequence[Problem], k: int) -> np.ndarray:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked += [problem.id for problem in problems]
        return np.array([sum(map(ord, problem.problem)) % (k + 1) / k for problem in problems])


def config(count: int = 600, difficulty: int = 9, **settings: Any) -> CurateConfig:
    problems = ProblemsConfig(num_generated=count, difficulty_min=difficulty, difficulty_max=difficulty)
    return CurateConfig(problems=problems, curate=CurateSettings(num_heldout=64, **settings))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(path)]


def stage(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in report["stages"] if entry["name"] == name)


@pytest.mark.parametrize("task", ["modchain", "addition", "countdown"])
def test_every_planted_defect_is_found_and_only_natural_repeats_besides(tmp_path: Path, task: str) -> None:
    base = config(difficulty=0)
    report = main(replace(base, problems=replace(base.problems, task=task)), tmp_path)
    planted = json.loads((tmp_path / "raw.planted.json").read_text())
    removed = rows_of(tmp_path / "removed.jsonl")
    assert {defect: counts["planted"] for defect, counts in report["planted"].items()} == {
        defect: round(600 * share) for defect, share in DEFECT_SHARES.items()
    }
    assert all(counts["planted"] == counts["removed"] for counts in report["planted"].values())

    # What else goes repeats an earlier row or a held-out problem by nature: recomputed here from raw rows.
    spoilt = {item["id"] for item in planted}
    seen = {row["problem"] for row in rows_of(tmp_path / "heldout.jsonl")}
    natural = set()
    wrong = {item["line"] for item in planted if item["defect"] in ("malformed", "wrong_answer")}
    for number, line in enumerate((tmp_path / "raw.jsonl").read_text().splitlines(), start=1):
        if number in wrong:
            continue
        row = json.loads(line)
        text = "".join(row["problem"].split())
        if text in seen and row["id"] not in spoilt:
            natural.add(row["id"])
        seen.add(text)
    others = {
        row["id"] for row in removed if row["id"] not in spoilt and not row["id"].startswith("raw.jsonl:")
    }
    assert others == natural
    assert len(natural) < 0.2 * 600

    kept = rows_of(tmp_path / "curated.jsonl")
    assert report["input"] == 600 == len(kept) + len(removed)
    assert report["skipped"] == ["difficulty was not measured: no model to sample from (curate.checkpoint)"]


def test_reasons_name_the_defect_and_clashes_name_the_other_row(tmp_path: Path) -> None:
    main(config(), tmp_path)
    defects = {item["id"]: item for item in json.loads((tmp_path / "raw.planted.json").read_text())}
    expected = {"duplicate": "duplicate", "leak": "leak_exact", "wrong_answer": "wrong_answer"}
    removed = {row["id"]: row for row in rows_of(tmp_path / "removed.jsonl")}
    for name, item in defects.items():
        if item["defect"] == "malformed":
            assert removed[f"raw.jsonl:{item['line']}"]["reason"] == "malformed"
        elif not (
            item["defect"] == "leak" and removed[name]["reason"] == "duplicate"
        ):  # one problem leaked twice
            assert removed[name]["reason"] == expected[item["defect"]]
            if item["source"]:
                assert removed[name]["clash_id"] == item["source"]
                assert removed[name]["row"]["task"] == "modchain"


def test_the_band_keeps_teachable_problems_and_stores_their_rates(tmp_path: Path) -> None:
    report = main(config(160), tmp_path, Sampler())
    kept, _ = load_problems(tmp_path / "curated.jsonl")
    assert {round(8 * problem.meta["pass_rate"]) for problem in kept} == set(range(1, 8))
    assert set(stage(report, "difficulty")["reasons"]) == {"too_hard", "too_easy"}


def test_a_rerun_takes_finished_stages_over_and_ends_with_the_same_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Sampler()
    report = main(config(160), tmp_path, first)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    capsys.readouterr()
    second = Sampler()
    assert main(config(160), tmp_path, second) == report
    assert second.asked == []
    said = capsys.readouterr().out
    assert all(f"{name}: already done" in said for name in ("ingest", "validate", "dedup", "difficulty"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_changed_setting_runs_its_stage_and_those_after_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config(160), tmp_path, Sampler())
    capsys.readouterr()
    sampler = Sampler()
    report = main(config(160, band_low=0.3), tmp_path, sampler)
    said = capsys.readouterr().out
    assert "decontaminate: already done" in said
    assert "difficulty: already done" not in said
    assert sampler.asked == []  # the rates were known; only the band moved
    assert stage(report, "difficulty")["notes"]["low"] == 0.3
    main(config(160, ngram=5), tmp_path, sampler)
    assert "dedup: already done" in (said := capsys.readouterr().out)
    assert "decontaminate: already done" not in said


def test_other_input_runs_everything_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(160), tmp_path)
    capsys.readouterr()
    main(replace(config(160), seed=1), tmp_path)
    assert "already done" not in capsys.readouterr().out


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path: Path) -> None:
    cut = config(160, pass_rate_chunk=64)
    whole = main(cut, tmp_path / "whole", everything := Sampler())
    dying = Sampler(dies_after=64)
    with pytest.raises(KeyboardInterrupt):
        main(cut, tmp_path / "cut", dying)
    assert not (tmp_path / "cut" / "curated.jsonl").exists()
    rest = Sampler()
    resumed = main(cut, tmp_path / "cut", rest)
    assert dying.asked + rest.asked == everything.asked
    assert resumed["stages"][1:] == whole["stages"][1:]
    curated = [(tmp_path / name / "curated.jsonl").read_bytes() for name in ("whole", "cut")]
    assert curated[0] == curated[1]


def test_a_stage_whose_writing_failed_is_not_taken_for_finished(tmp_path: Path) -> None:
    first = main(config(160), tmp_path)
    in_the_way = tmp_path / "stages" / "02_dedup.removed.jsonl"
    in_the_way.unlink()
    in_the_way.mkdir()
    with pytest.raises(IsADirectoryError):
        main(config(160, dedup_threshold=0.5), tmp_path)
    in_the_way.rmdir()
    assert main(config(160), tmp_path) == first


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_word_problems_from_a_file_go_through_every_stage(tmp_path: Path) -> None:
    story = "Tom has {} red apples in a basket and buys {} more at the market by the river. How many now?"
    rows = [{"question": story.format(a, a), "answer": f"add\n#### {2 * a}"} for a in range(2, 42)]
    rows.append({"question": rows[0]["question"].replace("red", "green"), "answer": "add\n#### 4"})
    path = write_rows(tmp_path / "in.jsonl", rows)
    held = write_rows(tmp_path / "held.jsonl", [{"problem": rows[3]["question"] + " Think.", "answer": "10"}])
    settings = CurateSettings(heldout_path=held)
    report = main(
        CurateConfig(problems=ProblemsConfig(path=path, task="math"), curate=settings), tmp_path / "run"
    )
    assert stage(report, "dedup")["reasons"] == {"near_duplicate": 1}
    # Twelve tokens with numbers identify a story here; runs of the template without them occur in all forty.
    reasons = stage(report, "decontaminate")["reasons"]
    assert sum(reasons.values()) == 1
    assert report["kept"] == 39


def test_a_bad_row_of_a_file_stops_the_run_unless_skipping_is_asked_for(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"problem": "1+1", "answer": "2"}, {"problem": "1+2"}])
    problems = ProblemsConfig(path=path, task="math")
    with pytest.raises(UserError, match=r"in\.jsonl:2: field 'answer': missing"):
        main(CurateConfig(problems=problems), tmp_path / "stop")
    report = main(CurateConfig(problems=replace(problems, on_bad_row="skip")), tmp_path / "skip")
    assert stage(report, "ingest")["reasons"] == {"malformed": 1}
    (row,) = rows_of(tmp_path / "skip" / "removed.jsonl")
    assert row["id"] == "in.jsonl:2"
    assert "field" in row["detail"]


def test_a_file_of_another_task_is_refused_with_the_setting_to_change(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"problem": "What is 1+1?", "answer": "2"}])
    with pytest.raises(
        UserError, match=r"validate removed all 1 problems \(not_of_task: 1\).*problems\.task"
    ):
        main(CurateConfig(problems=ProblemsConfig(path=path)), tmp_path / "run")


def test_a_mixture_weights_or_removes_clusters(tmp_path: Path) -> None:
    base = config(300, mixture="modchain/3=0, modchain=2")
    spread = replace(base, problems=replace(base.problems, difficulty_min=3, difficulty_max=4))
    report = main(spread, tmp_path)
    kept = rows_of(tmp_path / "curated.jsonl")
    assert {(row["difficulty"], row["epochs"]) for row in kept} == {(4, 2)}
    assert stage(report, "mixture")["reasons"].keys() == {"mixture"}


def test_a_missing_checkpoint_is_an_error_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"curate\.checkpoint: .*no such file or folder"):
        main(config(50, checkpoint=str(tmp_path / "absent")), tmp_path / "run", Sampler())


def test_pass_rates_belong_to_a_checkpoint_and_not_to_the_log_of_its_run(tmp_path: Path) -> None:
    run = tmp_path / "sft"
    run.mkdir()

    def publish(step: int) -> None:
        folder = folders.begin(run, step)
        (folder / "dist" / "weights").write_text(f"weights of step {step}")
        folders.write_manifest(folder, folders.Manifest(step, ModelConfig()))
        folders.publish(run, step, folder, Retention(keep_last=1))

    def asked() -> int:
        sampler = Sampler()
        main(config(60, checkpoint=str(run)), tmp_path / "curate", sampler)
        return len(sampler.asked)

    publish(1)
    assert asked() > 0
    (run / "metrics.jsonl").write_text("a later line\n")
    assert asked() == 0, "the model is the same"
    publish(2)
    assert asked() > 0, "a newer checkpoint is another model"
