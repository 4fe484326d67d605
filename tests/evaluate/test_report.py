"""The report: one self-contained page, every part optional, nothing from a model's text taken for markup."""

import base64
import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter, atomic_write_json
from phi4r.evaluate.report import Report, ReportInputs, build_report, inputs_from_run, main
from phi4r.evaluate.results import Results, SummarySettings

SETTINGS = SummarySettings(bootstrap=200, permutations=1000)
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Headings, visible text, resources and whether the tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.resources: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.resources += [value for key, value in attrs if key in ("src", "href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.text += " " + data.strip()
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def full(
    pipeline_run: tuple[Path, ReportInputs], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Report, Page]:
    report = build_report(
        dataclasses.replace(pipeline_run[1], settings=SETTINGS), tmp_path_factory.mktemp("report")
    )
    return report, Page(report.path.read_text(encoding="utf-8"))


def test_the_full_report_has_every_part_and_its_numbers(full: tuple[Report, Page]):
    report, page = full
    assert page.open == []
    assert page.headings == [
        "What was run",
        "How far to trust this",
        "Accuracy",
        "Accuracy and length",
        "The same problems, side by side",
        "GRPO",
        "SFT",
        "Curation",
        "To reproduce",
    ]
    for name in ("SFT", "GRPO"):
        summary = report.summaries[name]
        assert f"{100 * summary['avg_at_8']:.1f}%" in page.text
        assert f"{summary['mean_length']:.1f}" in page.text
    assert f"{100 * report.gain['mean']:+.1f} points (95% CI " in page.text
    for part in ("selects a mode that SFT had already taught", "2,204 of 4,096 problems kept", "1 min 41 s"):
        assert part in page.text
    for part in ("near duplicate 188", "reward R", "phi4r quickstart --run-dir", "torch 2", "left empty"):
        assert part in page.text


def test_the_page_is_self_contained_and_its_pictures_are_files_too(full: tuple[Report, Page]):
    report, page = full
    html = report.path.read_text(encoding="utf-8")
    assert "<script" not in html
    assert not re.search(r"url\(|@import", html)
    pictures = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.resources]
    assert all(source.startswith("data:image/png;base64,") for source in page.resources)
    assert {path.read_bytes() for path in report.figures.values()} == set(pictures)
    assert {path.parent for path in report.figures.values()} == {report.path.parent / "figures"}
    written = {path for path in report.path.parent.rglob("*") if path.is_file()}
    assert written == {report.path, *report.figures.values()}


def test_text_of_a_model_is_never_taken_for_markup(tmp_path: Path):
    rollouts = [
        {
            "stage": stage,
            "problem_id": "x",
            "prompt": "<b>1+1?</b>",
            "response": "<think><script>alert(1)</script></think><img src=x onerror=y>",
            "outcome": "wrong",
            "gold": "2",
            "num_tokens": 9,
        }
        for stage in ("SFT", "GRPO")
    ]
    report = build_report(ReportInputs(title="<i>run</i>", rollouts=rollouts), tmp_path)
    html = report.path.read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html
    assert "onerror" in page.text
    assert page.resources == []
    assert "<b>1+1?</b>" in page.text
    assert page.headings == ["The same problems, side by side", "To reproduce"]


def test_a_run_folder_of_one_stage_gets_the_parts_it_has(tmp_path: Path):
    for name, row in (("sft", {"loss": 1.5}), ("grpo", {"reward": 0.1, "accuracy": 0.5})):
        with JsonlWriter(tmp_path / name / "metrics.jsonl") as writer:
            for step in (1, 2, 3):
                writer.write({"step": step, **row})
        atomic_write_json(tmp_path / name / "config.json", {"seed": 17})
    sft = build_report(inputs_from_run(tmp_path / "sft"), tmp_path / "sft")
    grpo = build_report(inputs_from_run(tmp_path / "grpo", title="GRPO alone"), tmp_path / "grpo")
    assert set(sft.figures) == {"sft_loss"}
    assert set(grpo.figures) == {"rl_reward", "rl_accuracy"}
    for report, headings in ((sft, ["What was run", "SFT"]), (grpo, ["What was run", "GRPO"])):
        page = Page(report.path.read_text(encoding="utf-8"))
        assert page.headings == [*headings, "To reproduce"]
        assert "17" in page.text
        assert (report.summaries, report.gain) == ({}, None)


def test_the_command_draws_a_run_folder_and_refuses_one_without_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(UserError, match="nothing to draw"):
        main(tmp_path)
    spans = [["trainer", "start", 100.0, 101.0], ["trainer", "train", 101.0, 104.0],
             ["rollouts", "sampling", 100.5, 101.0]]  # fmt: skip
    with JsonlWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write({"step": 1, "reward": 0.1, "timeline": spans})
    main(tmp_path)
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "the trainer trained for 75% of the time" in page.text
    assert (tmp_path / "figures" / "rl_timeline.png").exists()


def test_an_evaluation_alone_is_reported_without_a_comparison(
    results_by_stage: dict[str, Results], tmp_path: Path
):
    inputs = ReportInputs(evals={"GRPO": results_by_stage["GRPO"].select(["modchain-0000", "modchain-0001"])})
    report = build_report(dataclasses.replace(inputs, settings=SETTINGS), tmp_path)
    page = Page(report.path.read_text(encoding="utf-8"))
    assert report.gain is None
    assert "After GRPO the model answers" in page.text
    assert "Gain, paired" not in page.text


def test_an_empty_report_is_still_a_page(tmp_path: Path):
    page = Page(build_report(ReportInputs(), tmp_path).path.read_text(encoding="utf-8"))
    assert page.headings == ["To reproduce"]


def test_bad_inputs_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"missing\.jsonl: cannot be read"):
        build_report(ReportInputs(sft_metrics=tmp_path / "missing.jsonl"), tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: 'step' must be int, got None"):
        build_report(ReportInputs(sft_metrics=tmp_path / "metrics.jsonl"), tmp_path)
    with pytest.raises(UserError, match=r"stages\[0\] has no 'removed'"):
        build_report(ReportInputs(curation={"stages": [{"name": "dedup", "kept": 3}]}), tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json: expected a JSON object, found list"):
        build_report(ReportInputs(config=tmp_path / "config.json"), tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        inputs_from_run(tmp_path / "nowhere")


def test_the_same_run_gives_the_same_page(results_by_stage: dict[str, Results], tmp_path: Path):
    few = [f"modchain-{index:04d}" for index in range(4)]
    inputs = ReportInputs(evals={"SFT": results_by_stage["SFT"].select(few)}, settings=SETTINGS)
    first, second = (build_report(inputs, tmp_path / name).path.read_bytes() for name in "ab")
    assert first == second


def test_evaluation_and_reports_need_no_torch():
    unwanted = ("torch", "megatron", "matplotlib.pyplot", "pandas")
    code = f"import sys, phi4r.evaluate.report; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
