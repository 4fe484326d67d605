"""Every entry: its help, its rows, and what is drawn and concluded from them."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import data as data_entry
from benchmarks import rollout, rows, step, suite, targets
from benchmarks.plot import draw_roofline, draw_scaling, newest
from benchmarks.rows import append_rows, provenance, read_rows
from tests.benchmarks.conftest import ENTRIES, ROOT

OPTIONS = dict.fromkeys(ENTRIES, "--seconds") | {"native": "--repeats", "plot": "--kinds"}
COLUMNS = {"step": step.COLUMNS, "rollout": rollout.COLUMNS, "data": data_entry.COLUMNS}
# Entries that must start on a machine with torch alone.
BARE = ("attention", "grpo_head", "elementwise", "step", "check", "plot", "targets")


@pytest.mark.parametrize("entry", [*OPTIONS, "quickstart", "startup", "check", "targets"])
def test_every_entry_says_what_it_does(
    entry: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [entry, "--help"])
    module = importlib.import_module(f"benchmarks.{entry}")
    with pytest.raises(SystemExit) as ended:
        module.main()
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert (module.__doc__ or "").splitlines()[0] in " ".join(text.split()) or len(text) > 300
    assert OPTIONS.get(entry, "--help") in text


def test_entries_for_gpu_machines_import_neither_phi4r_nor_megatron() -> None:
    code = "import importlib, sys\n"
    code += "sys.modules['phi4r'] = sys.modules['megatron'] = None\n"
    code += f"for name in {BARE!r}:\n    importlib.import_module('benchmarks.' + name)\n"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("entry", list(ENTRIES))
def test_rows_have_all_columns_and_numbers_that_fit_together(entry: str, results: Path) -> None:
    rows = read_rows(results / f"{entry}.csv")
    assert rows
    for row in rows:
        assert list(row) == COLUMNS.get(entry, suite.COLUMNS)
        assert row["device"] == "cpu"
        assert row["torch"]
        assert row["impl"]
        if not row["p50_ms"]:
            assert row["impl"] in ("next_fit", "one_per_row")
            continue
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert int(row["rounds"]) >= 2
        if row["impl"] == row["against"]:
            assert float(row["ratio"]) == 1.0
        if row["tflops"]:
            expected = float(row["flops"]) / float(row["p50_ms"]) / 1e9
            assert float(row["tflops"]) == pytest.approx(expected, rel=1e-3)
            assert float(row["gemm_tflops"]) > 0
        if row["error"]:
            assert float(row["error"]) < 1e-5, "fp32 against float64"


def test_every_torch_implementation_is_there_on_cpu(results: Path) -> None:
    def impls(entry: str, **wanted: str) -> set[str]:
        rows = read_rows(results / f"{entry}.csv")
        return {row["impl"] for row in rows if all(row[k] == v for k, v in wanted.items())}

    assert impls("attention", mode="backward", case="uniform") == {"sdpa_flash", "sdpa_math"}
    for mode in ("grpo", "grpo_full", "cross_entropy", "logprobs"):
        assert impls("grpo_head", mode=mode) >= {"ours", "naive", "bare_gemms"}
    assert impls("elementwise") == {"eager"}
    assert impls("step") == {"sdpa", "torch"}
    assert impls("rollout") == {"embedded_1_slots", "embedded_4_slots"}
    assert impls("data") == {"render", "ffd", "next_fit", "one_per_row"}


def test_a_step_says_where_its_time_went(results: Path) -> None:
    for row in read_rows(results / "step.csv"):
        assert int(row["layers"]) == 2
        assert row["mfu"] == "", "there is no such peak on a CPU"
        assert float(row["tokens_per_second"]) == pytest.approx(64e3 / float(row["p50_ms"]), rel=1e-3)
        assert float(row["attention_percent"]) > 0
        assert float(row["head_percent"]) > 0


def test_packing_fills_rows_better_than_what_one_would_do_instead(results: Path) -> None:
    full = {row["impl"]: row["efficiency"] for row in read_rows(results / "data.csv") if row["op"] == "pack"}
    assert float(full["one_per_row"]) < float(full["next_fit"]) <= float(full["ffd"]) <= 1


def test_rows_of_other_columns_are_not_mixed_into_a_file(tmp_path: Path) -> None:
    append_rows("x", ["a", "b"], [{"a": 1, "b": 2}], tmp_path)
    append_rows("x", ["a", "b"], [{"a": 3, "b": 4}], tmp_path)
    assert read_rows(tmp_path / "x.csv") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    with pytest.raises(ValueError, match="move it away"):
        append_rows("x", ["a", "c"], [{"a": 1, "c": 2}], tmp_path)
    assert len(read_rows(tmp_path / "x.csv")) == 2


def test_a_row_says_which_commit_it_is_from_even_in_a_copy_without_git(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = provenance("benchmarks")
    assert found["commit"]
    assert found["dirty"] in (0, 1, "")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("PHI4R_COMMIT", "abc1234")
    assert (provenance("benchmarks")["commit"], provenance("benchmarks")["dirty"]) == ("abc1234", "")


@pytest.mark.parametrize("words", [["simulate"], ["vllm_sync"], ["vllm_rl", "runs/sft"]])
def test_without_vllm_an_entry_ends_with_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI4R_VLLM_PYTHON", "/nowhere/python")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"benchmarks.{words[0]}").main()
    assert "/nowhere/python: no Python interpreter with vLLM here" in capsys.readouterr().err


def test_rows_themselves_do_not_make_a_commit_dirty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, results = tmp_path / "benchmarks" / "rows.py", tmp_path / "benchmarks" / "results"
    monkeypatch.setattr(rows, "__file__", str(module))
    monkeypatch.setattr(rows, "RESULTS", results)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "tests")
    append_rows("old", ["a"], [{"a": 1}], results)
    module.touch()
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    append_rows("old", ["a"], [{"a": 2}], results)
    append_rows("new", ["a"], [{"a": 3}], results)
    assert provenance("benchmarks")["dirty"] == 0
    module.write_text("changed")
    assert provenance("benchmarks")["dirty"] == 1


# --- pictures and the table


def test_plots_draw_what_the_rows_allow(results: Path, tmp_path: Path) -> None:
    for entry, has_roofline in (("attention", True), ("grpo_head", True), ("elementwise", False)):
        rows = newest(read_rows(results / f"{entry}.csv"))
        scaling, roofline = tmp_path / f"{entry}_s.png", tmp_path / f"{entry}_r.png"
        assert draw_scaling(rows, scaling)
        assert scaling.stat().st_size > 20_000
        assert draw_roofline(rows, roofline) == has_roofline
        assert roofline.exists() == has_roofline


def test_a_plot_takes_the_newest_row_of_the_newest_device() -> None:
    blank = dict.fromkeys(suite.COLUMNS, "") | {"op": "o", "mode": "m", "case": "c", "tokens": "64"}
    rows = [
        {**blank, "device": "old", "impl": "a", "p50_ms": "1"},
        {**blank, "device": "new", "impl": "a", "p50_ms": "2"},
        {**blank, "device": "new", "impl": "a", "p50_ms": "3"},
        {**blank, "device": "new", "impl": "b", "p50_ms": "4"},
        {**blank, "device": "new", "impl": "c", "p50_ms": ""},
    ]
    assert [(row["impl"], row["p50_ms"]) for row in newest(rows)] == [("a", "3"), ("b", "4")]


def gpu_row(op: str, impl: str, **values: str) -> dict[str, str]:
    shared = {"device": "NVIDIA H200", "op": op, "impl": impl, "tokens": "32768", "p50_ms": "1"}
    return dict.fromkeys(step.COLUMNS if op == "step" else suite.COLUMNS, "") | shared | values


def test_the_table_reads_targets_off_the_rows(tmp_path: Path) -> None:
    dense = {"mode": "forward", "case": "dense"}
    append_rows(
        "attention",
        suite.COLUMNS,
        [
            gpu_row("attention", "ours", tflops="430", **dense),
            gpu_row("attention", "ours_hopper", tflops="610", **dense),
            gpu_row("attention", "sdpa_cudnn", tflops="700", **dense),
            gpu_row("attention", "ours", mode="backward", case="dense", tflops="320"),
        ],
        tmp_path,
    )
    head = {"mode": "grpo", "against": "ours"}
    append_rows(
        "grpo_head",
        suite.COLUMNS,
        [
            gpu_row("grpo_head", "ours", p50_ms="150", percent_of_bound="85", peak_mib="4000", **head),
            gpu_row("grpo_head", "naive", p50_ms="210", ratio="1.4", peak_mib="40000", **head),
            gpu_row("grpo_head", "liger_grpo_fp32", p50_ms="900", ratio="6", **head),
        ],
        tmp_path,
    )
    lines = {line[:38].strip(): line[38:].split() for line in targets.table(tmp_path)}
    assert lines["attention, causal 32K: forward"] == ["450", "600", "610", "TFLOP/s", "goal"]
    assert lines["GRPO head 32K"] == ["160", "142", "150", "ms", "must"]
    assert lines["GRPO head 32K, of the bare products"] == ["80", "90", "85", "%", "must"]
    assert lines["over Liger, fp32 products"] == ["8", "-", "6", "x", "below"]
    assert lines["over all logits at once"] == ["1.25", "-", "1.4", "x", "must"]
    assert lines["memory over that of all logits"] == ["0.125", "-", "0.1", "must"]
    assert lines["whole model, MFU at 32K"] == ["-", "45", "-", "%", "not", "measured"]
    assert not math.isnan(float(lines["attention, packed 32K: forward"][0]))


# --- the script and the command


def gpu_check(*words: str, out: Path, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_gpu_check_without_a_gpu_says_so_and_exits_2(tmp_path: Path) -> None:
    ended = gpu_check(out=tmp_path / "out")
    assert ended.returncode == 2
    assert "no GPU that this torch can use" in ended.stderr
    assert not (tmp_path / "out").exists()
    ended = gpu_check("nonsense", out=tmp_path / "out")
    assert ended.returncode == 1
    assert "no part 'nonsense'" in ended.stderr


def test_gpu_check_rehearses_on_cpu(tmp_path: Path) -> None:
    ended = gpu_check("--rehearse", "elementwise", out=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "elementwise: done in" in ended.stdout
    assert "not measured" in ended.stdout
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"elementwise.csv", "elementwise_scaling.png", "log.txt"}
    assert "rms_norm forward" in (tmp_path / "log.txt").read_text()


def test_bench_passes_everything_on_and_says_where_there_is_nothing_to_run(tmp_path: Path) -> None:
    from phi4r.commands.bench import main
    from phi4r.core.errors import UserError

    command = [sys.executable, "-m", "phi4r", "bench", "targets", "--results", "nowhere"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("measured on: nothing")
    with pytest.raises(UserError, match="expected one of attention"):
        main("nonsense", [])
    with pytest.raises(UserError, match="no benchmarks folder"):
        main("attention", [], root=tmp_path)
