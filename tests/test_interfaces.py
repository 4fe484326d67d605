"""What scripts rely on, through the real command line: files, their keys and numbers, exit codes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.utils import logging as transformers_logging

from phi4r.cli.main import main

transformers_logging.disable_progress_bar()

MODEL = [
    "--model.hidden_size", "32", "--model.num_layers", "2", "--model.ffn_hidden_size", "64",
    "--model.head_dim", "8",
]  # fmt: skip
SFT_STEPS, RL_STEPS, PROMPTS, GROUP = 6, 2, 3, 4
RL_KEYS = {
    "step", "loss", "grad_norm", "lr", "num_valid_tokens",
    "reward", "accuracy", "response_length", "entropy", "kl_old", "kl_ref", "logprob_gap",
}  # fmt: skip


def phi4r(*words: str | Path) -> str:
    """Run the command as a process of its own; returns its stdout, and its whole output where it fails."""
    command = [sys.executable, "-m", "phi4r", *map(str, words)]
    environment = {**os.environ, "COLUMNS": "200"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


def phi4r_here(*words: str | Path) -> int:
    """Run the command in this process, which saves its start; returns the exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, sequences: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in sequences))
    return path


def transformers_logprobs(model: Phi3ForCausalLM, tokens: list[int]) -> np.ndarray:
    """log p(tokens[i + 1] | tokens[: i + 1]), float64 [n - 1]."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()


def assert_scores(model: Phi3ForCausalLM, sequences: list[list[int]], output: Path) -> None:
    rows = read(output)
    assert len(rows) == len(sequences)
    for tokens, row in zip(sequences, rows, strict=True):
        assert list(row) == ["logprobs"]
        assert len(row["logprobs"]) == len(tokens) - 1
        expected = transformers_logprobs(model, tokens)
        assert np.abs(np.array(row["logprobs"]) - expected).max(initial=0) <= 1e-4


# --- score


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Phi3ForCausalLM]:
    """A random model saved by transformers, without a tokenizer; its distribution is far from uniform."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=512,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager",
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    model.save_pretrained(folder)
    return folder, model


def sequences(vocab_size: int, count: int) -> list[list[int]]:
    """`count` sequences of 1 to 90 tokens, and one that is longer than a row is by default."""
    random = np.random.default_rng(2)
    lengths = [1, 2, 300, *random.integers(1, 90, count - 3).tolist()]
    return [random.integers(0, vocab_size, length).tolist() for length in lengths]


def test_score_of_a_hugging_face_folder_is_transformers_own(
    hf: tuple[Path, Phi3ForCausalLM], tmp_path: Path
) -> None:
    folder, model = hf
    many = sequences(96, 270)  # more than one block
    source = write(tmp_path / "in.jsonl", many)
    assert phi4r_here("score", folder, source, tmp_path / "out.jsonl") == 0
    assert_scores(model, many, tmp_path / "out.jsonl")


@pytest.mark.multiprocess
def test_score_on_a_pipeline_of_two_ranks_is_transformers_own(
    hf: tuple[Path, Phi3ForCausalLM], tmp_path: Path
) -> None:
    folder, model = hf
    few = sequences(96, 12)
    source = write(tmp_path / "in.jsonl", few)
    phi4r("score", folder, source, tmp_path / "out.jsonl", "--parallel.pp", "2")
    assert_scores(model, few, tmp_path / "out.jsonl")


GOOD_LINE = '{"tokens": [1, 2, 3]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"tokens": [1, 2', "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"token": [1]}', "tokens: expected a non-empty list of token ids"),
        ('{"tokens": []}', "tokens: expected a non-empty list of token ids"),
        ('{"tokens": [1, 96]}', "tokens: 96 is not a token id (an integer from 0 to 95)"),
        ('{"tokens": [-1]}', "tokens: -1 is not a token id"),
        ('{"tokens": [1, 2.0]}', "tokens: 2.0 is not a token id"),
        ('{"tokens": [true]}', "tokens: True is not a token id"),
    ],
)
def test_score_names_a_bad_line_and_leaves_no_file(
    hf: tuple[Path, Phi3ForCausalLM],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: str,
    message: str,
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join([GOOD_LINE, "", line, GOOD_LINE]) + "\n")
    assert phi4r_here("score", hf[0], source, tmp_path / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"phi4r: error: {source}:3: " in error
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_score_of_a_folder_that_holds_no_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", [[1, 2]])
    assert phi4r_here("score", tmp_path, source, tmp_path / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error


# --- one small run through the commands


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sft"
    phi4r(
        "sft", "tiny", "--run-dir", folder, *MODEL, "--train.num_steps", SFT_STEPS, "--train.eval_every", 3,
        "--data.num_generated", 200, "--data.heldout", 8, "--checkpoint.every", 3,
        "--optimizer.warmup_steps", 2,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def rl(sft: Path) -> Path:
    folder = sft.parent / "rl"
    phi4r(
        "rl", "tiny", "--run-dir", folder, "--init.checkpoint", sft, *MODEL, "--train.num_steps", RL_STEPS,
        "--problems.num_generated", 16, "--rollout.prompts_per_step", PROMPTS, "--rollout.group_size", GROUP,
        "--sampling.max_new_tokens", 12, "--objective.min_informative", 0, "--seed", 1,
    )  # fmt: skip
    return folder


def test_sft_logs_a_line_a_step_and_leaves_a_checkpoint(sft: Path) -> None:
    rows = read(sft / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, SFT_STEPS + 1))
    for row in rows:
        assert {"step", "loss", "grad_norm", "lr", "num_valid_tokens"} <= set(row)
        assert math.isfinite(row["loss"])
        assert ("heldout_loss" in row) == (row["step"] % 3 == 0)
    # A fresh model knows nothing: the first loss is near that of a uniform guess among its 64 tokens or more.
    assert rows[0]["loss"] > 4
    assert (sft / "checkpoints" / f"step_{SFT_STEPS:06d}" / "phi4r.json").exists()
    assert json.loads((sft / "config.json").read_text())["stage"] == "sft"


def test_rl_from_a_checkpoint_logs_every_documented_key(rl: Path) -> None:
    rows = read(rl / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, RL_STEPS + 1))
    for row in rows:
        assert set(row) >= RL_KEYS
        numbers = {key: row[key] for key in RL_KEYS}
        assert all(isinstance(n, int | float) and math.isfinite(n) for n in numbers.values()), numbers
        assert 0 <= row["accuracy"] <= 1
        assert 1 <= row["response_length"] <= 12
        assert row["entropy"] > 1, "a model after a few steps of SFT is far from certain"
        assert row["num_valid_tokens"] == pytest.approx(row["response_length"] * PROMPTS * GROUP)
        # One update per rollout: the policy that is trained is the one that sampled, but for fp32 rounding.
        assert row["kl_old"] == 0
        assert row["logprob_gap"] <= row["max_logprob_gap"] < 1e-4
    assert abs(rows[0]["kl_ref"]) < 1e-9, "before its first step the policy is the reference"
    assert rows[1]["kl_ref"] > 0


def test_every_metric_is_in_the_glossary(sft: Path, rl: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    logged = {key for run in (sft, rl) for row in read(run / "metrics.jsonl") for key in row}
    assert [key for key in sorted(logged) if f"`{key}`" not in page] == []


def test_rl_saves_every_rollout(rl: Path) -> None:
    accuracy = {row["step"]: row["accuracy"] for row in read(rl / "metrics.jsonl")}
    for step in range(1, RL_STEPS + 1):
        rows = read(rl / "rollouts" / f"step_{step:06d}.jsonl")
        places = [(row["prompt_index"], row["sample_index"]) for row in rows]
        assert places == [(p, s) for p in range(PROMPTS) for s in range(GROUP)]
        assert np.mean([row["outcome"] == "correct" for row in rows]) == pytest.approx(accuracy[step])
        for row in rows:
            assert len(row["tokens"]) == row["num_tokens"] <= 12
            assert {"prompt", "text", "reward", "reward_parts", "advantage", "answer", "gold"} <= set(row)


def test_rollouts_show_prints_the_newest_step(rl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert phi4r_here("rollouts", "show", rl, "--json", "--limit", 3) == 0
    shown = json.loads(capsys.readouterr().out)
    newest = read(rl / "rollouts" / f"step_{RL_STEPS:06d}.jsonl")
    assert f'"step": {RL_STEPS}' in json.dumps(shown)
    assert newest[0]["problem_id"] in json.dumps(shown)


def test_generate_prints_the_answer_and_nothing_else(sft: Path) -> None:
    words = ["generate", sft, "--prompt", "7*9-6%10?", "--max-new-tokens", 15, "--temperature", 1.0]
    text = phi4r(*words, "--seed", 3, "--top-p", 1.0, "--top-k", 0)
    assert text.endswith("\n")
    assert text.strip(), "fifteen tokens of a fresh model show something"
    assert "sft" not in text


def test_eval_leaves_a_line_per_problem_and_run_and_a_summary(sft: Path) -> None:
    folder = sft.parent / "eval"
    words = ["--run-dir", folder, "--eval.num_problems", 7, "--sampling.max_new_tokens", 10]
    table = phi4r("eval", sft, "modchain", "--runs", 2, *words)
    rows = read(folder / "results.jsonl")
    assert len(rows) == 7 * 2
    assert len({(row["problem_id"], row["run"]) for row in rows}) == 14
    for row in rows:
        assert {"problem_id", "run", "seed", "correct", "outcome", "answer", "num_tokens", "text"} <= set(row)
        assert 1 <= row["num_tokens"] <= 10
    by_run = [[row["text"] for row in rows if row["run"] == run] for run in (0, 1)]
    assert by_run[0] != by_run[1], "runs have seeds of their own"
    summary = json.loads((folder / "summary.json").read_text())
    keys = {
        "num_problems",
        "num_runs",
        "avg_at_2",
        "ci95",
        "pass_at_k",
        "maj_at_k",
        "mean_length",
        "outcomes",
    }
    assert keys <= set(summary)
    assert (summary["num_problems"], summary["num_runs"]) == (7, 2)
    assert summary["avg_at_2"] == pytest.approx(np.mean([row["correct"] for row in rows]))
    assert summary["mean_length"] == pytest.approx(np.mean([row["num_tokens"] for row in rows]))
    assert "avg@2" in table


def test_a_converted_run_is_the_same_model_in_transformers(rl: Path, tmp_path: Path) -> None:
    assert phi4r_here("convert", "phi4r-to-hf", rl, tmp_path / "hf") == 0
    model = Phi3ForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    # What was sampled and trained on, prompts included.
    rows = read(rl / "rollouts" / "step_000001.jsonl")
    some = [row["tokens"] for row in rows] + sequences(model.config.vocab_size, 5)
    source = write(tmp_path / "in.jsonl", some)
    assert phi4r_here("score", rl, source, tmp_path / "run.jsonl") == 0
    assert phi4r_here("score", tmp_path / "hf", source, tmp_path / "hf.jsonl") == 0
    assert_scores(model, some, tmp_path / "run.jsonl")
    assert (tmp_path / "run.jsonl").read_text() == (tmp_path / "hf.jsonl").read_text()
    assert (tmp_path / "hf" / "config.json").exists()
