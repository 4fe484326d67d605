"""The command line as people and scripts use it: help, exit codes, one-line errors, dry runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi4r.cli.main import main
from phi4r.cli.registry import COMMANDS
from phi4r.configs.schema import reference
from phi4r.configs.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]


def phi4r(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own, in a wide terminal."""
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "phi4r.cli.main", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


@pytest.mark.fresh
def test_help_answers_without_heavy_modules() -> None:
    """How long it takes: benchmarks/startup.py."""
    assert phi4r("--help").returncode == 0
    code = (
        "import sys, phi4r.cli.main; print({'torch', 'rich', 'numpy', 'megatron'} & {*sys.modules} or 'none')"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert loaded.stdout.strip() == "none"


def test_help_lists_every_command_with_its_line() -> None:
    text = phi4r("--help").stdout
    for name, command in COMMANDS.items():
        assert f"{name} " in text
        assert command.help in text


@pytest.mark.parametrize("stage", list(STAGES))
def test_help_of_a_stage_teaches_every_key(stage: str) -> None:
    text = phi4r(stage, "--help").stdout
    assert "Examples:" in text
    for _, _, entries in reference(STAGES[stage]):
        for entry in entries:
            assert f"--{entry.key}  {entry.type_text}" in text
            assert entry.doc[:30] in text


def test_help_of_tools_teaches_the_layout_keys() -> None:
    text = phi4r("score", "--help").stdout
    assert "--parallel.tp  int" in text
    assert "--train.num_steps" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft"], "Missing argument 'RECIPE'"),
        (["sfft"], "No such command 'sfft'"),
        (["sft", "tiny", "--foo", "3"], "No such option: --foo"),
        (["sft", "tyny"], "no recipe 'tyny'"),
        (["sft", "tiny", "--train.num_step", "3"], "did you mean 'num_steps'?"),
        (
            ["sft", "tiny", "--train.num_steps", "many"],
            "train.num_steps: expected an integer, got 'many' (command line)",
        ),
        (["sft", "tiny", "--seed", "x", "--dry-run"], "seed: expected an integer, got 'x' (command line)"),
        (["sft", "tiny", "--on-bad-row", "x"], "data.on_bad_row: expected one of stop, skip, got 'x'"),
        (["rl", "tiny", "--on-bad-row", "x"], "problems.on_bad_row: expected one of stop, skip, got 'x'"),
        (["sft", "phi4_sft", "--parallel.tp", "4"], "Phi-4 has 10 KV heads, so TP is 1, 2, 5 or 10"),
        (["score", "a", "b", "c", "--train.num_steps", "3"], "only parallel.* settings"),
        (["doctor", "--parallel.tp", "2"], "takes no settings"),
        (["convert", "hf2phi4r", "a", "b"], "expected hf-to-phi4r or phi4r-to-hf, got 'hf2phi4r'"),
        (["verify", "a", "b", "--on-bad-row", "x"], "--on-bad-row: expected stop or skip"),
        (["quickstart", "--trian.num_steps", "3"], "unknown section 'trian', did you mean 'train'?"),
        (["rollouts", "show", "nowhere"], "nowhere: no such run folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert err.startswith("phi4r: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_bug_shows_its_traceback_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "doctor", COMMANDS["doctor"]._replace(target="tests.cli.targets:crash"))
    code, _, err = run(capsys, "doctor")
    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError" in err


def test_an_interruption_is_exit_code_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "doctor", COMMANDS["doctor"]._replace(target="tests.cli.targets:interrupt"))
    code, _, err = run(capsys, "doctor")
    assert (code, err) == (130, "phi4r: interrupted\n")


def test_a_dry_run_prints_settings_origins_and_plan_and_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = phi4r("sft", "tiny", "--dry-run", "--parallel.tp", "2", "--parallel.sp", "--run-dir", str(folder))
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in ended.stdout.splitlines()]
    assert "tp = 2 # command line" in lines
    assert "hidden_size = 128 # preset tiny" in lines
    assert any(line.startswith("num_steps = 1000 # ") and "tiny.toml, line" in line for line in lines)
    assert "ranks 2 ranks: tp 2 (with sequence parallelism) x pp 1 x cp 1 x dp 1" in lines
    assert "tokens per step 1,024 (4 rows of 256)" in lines
    assert not folder.exists()


def test_a_dry_run_of_the_real_model_knows_its_size() -> None:
    lines = [" ".join(line.split()) for line in phi4r("rl", "phi4_grpo", "--dry-run").stdout.splitlines()]
    assert "parameters 14,659,507,200" in lines
    assert "samples per step 512 (64 problems x 8)" in lines


@pytest.mark.parametrize("command", [["curate", "tiny"], ["eval", "runs/x", "addition"], ["quickstart"]])
def test_every_stage_has_a_dry_run(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, _ = run(capsys, *command, "--dry-run")
    assert code == 0
    assert "would do this" in out


def test_what_a_dry_run_prints_is_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from phi4r.configs.load import load_stage

    _, out, _ = run(capsys, "sft", "tiny", "--dry-run", "--optimizer.lr", "0.5")
    path = tmp_path / "printed.toml"
    path.write_text(out[: out.index("phi4r sft would do this")])
    assert load_stage("sft", path).config == load_stage("sft", "tiny", ["optimizer.lr=0.5"]).config


def test_a_task_that_is_a_file_is_read_and_any_other_is_generated(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text("")
    _, out, _ = run(capsys, "eval", "runs/x", str(problems), "--runs", "3", "--dry-run")
    assert f'path = "{problems}"' in out
    assert 'task = "math"' in out
    assert "runs = 3" in out
    _, out, _ = run(capsys, "eval", "runs/x", "countdown", "--dry-run")
    assert 'task = "countdown"' in out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    import phi4r as package

    assert run(capsys, "--version") == (0, f"phi4r {package.__version__}\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_away_is_no_traceback(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from phi4r.cli.main import *; row = COMMANDS['doctor']"
    code += "; COMMANDS['doctor'] = row._replace(target='tests.cli.targets:speak')"
    command = [sys.executable, "-c", f"{code}; main(['doctor'])"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")
