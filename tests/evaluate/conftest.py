"""A synthetic pipeline run: numbers and texts shaped like those of the quick start, made in a moment."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi4r.core.io import JsonlWriter, atomic_write_json
from phi4r.evaluate.report import ReportInputs
from phi4r.evaluate.results import Record, Results, read_results, write_results

NUM_RUNS = 8


def chain_problem(index: int) -> tuple[str, str, list[str]]:
    """A left-to-right chain modulo 10: its text, its answer, its steps."""
    generator = np.random.default_rng([7, index])
    numbers = generator.integers(1, 10, size=3 + index % 4).tolist()
    operators = generator.choice(["+", "-", "*"], size=len(numbers) - 1).tolist()
    value, text, steps = numbers[0], str(numbers[0]), []
    for operator, number in zip(operators, numbers[1:]):
        result = {"+": value + number, "-": value - number, "*": value * number}[operator] % 10
        steps.append(f"{value}{operator}{number}={result}")
        value, text = result, f"{text}{operator}{number}"
    return f"{text}%10?", str(value), steps


def chain_results(thinks: float, slips: float, num_problems: int, seed: int) -> Results:
    """Results of a model that writes its steps with probability `thinks` and slips in a step with probability
    `slips`.
    """
    generator = np.random.default_rng(seed)
    records = []
    for index in range(num_problems):
        problem, gold, steps = chain_problem(index)
        for run in range(NUM_RUNS):
            answer, think = gold, ""
            if generator.random() < thinks:
                think = ";".join(steps)
                if generator.random() < 1 - (1 - slips) ** len(steps):
                    answer = str((int(gold) + 1) % 10)
            elif generator.random() < 0.25 * len(steps):
                answer = str(generator.integers(10))
            finished = bool(generator.random() < 0.998)
            text = f"<think>{think}</think>{answer}" if finished else f"<think>{think};" * 2
            outcome = "correct" if answer == gold else "wrong"
            if not finished:
                answer, outcome = None, "no_answer"
            records.append(
                Record(
                    problem_id=f"modchain-{index:04d}",
                    run=run,
                    seed=1000 + run,
                    correct=outcome == "correct",
                    outcome=outcome,
                    answer=answer,
                    num_tokens=len(think) + 4 if finished else 64,
                    finished=finished,
                    text=text,
                    problem=problem,
                    gold=gold,
                    difficulty=float(len(steps) + 1),
                )
            )
    return Results(records)


def sft_metrics(num_steps: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(1)
    rows = []
    for step in range(1, num_steps + 1):
        clean = 0.28 + 2.6 * np.exp(-step / 45) + 0.5 * np.exp(-step / 350)
        row = {
            "step": step,
            "loss": clean * float(generator.normal(1, 0.05)),
            "grad_norm": float(0.3 + 2 * np.exp(-step / 80) + 0.1 * generator.random()),
            "lr": 2e-3,
            "num_valid_tokens": 620,
        }
        if step % 100 == 0:
            row["heldout_loss"] = clean + 0.01
        rows.append(row)
    return rows


def rl_metrics(num_steps: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(2)
    rows = []
    for step in range(1, num_steps + 1):
        learned = 1 / (1 + np.exp(-(step - 14) / 5))
        noise = generator.normal(0, 1, 8)
        accuracy = min(1.0, 0.54 + 0.43 * learned + 0.02 * noise[0])
        rows.append(
            {
                "step": step,
                "reward": float((2 * accuracy - 1) * 8 / 13),
                "accuracy": float(accuracy),
                "response_length": float(13.5 + 10 * learned + 0.3 * noise[1]),
                "entropy": float(0.32 - 0.22 * learned + 0.01 * noise[2]),
                "kl_old": 0.0,
                "kl_ref": float(0.06 * learned + 0.002 * abs(noise[3])),
                "zero_variance_share": float(np.clip(0.05 + 0.75 * learned + 0.05 * noise[4], 0, 1)),
                "logprob_gap": float(2e-7 * np.exp(0.3 * noise[5])),
                "grad_norm": float(0.5 - 0.3 * learned + 0.05 * abs(noise[6])),
            }
        )
    return rows


CURATION = {
    "stages": [
        {"name": "validate", "kept": 4060, "removed": 36, "reasons": {"no_answer": 20, "bad_prompt": 16}},
        {"name": "dedup", "kept": 3571, "removed": 489, "reasons": {"duplicate": 301, "near_duplicate": 188}},
        {
            "name": "decontaminate",
            "kept": 3512,
            "removed": 59,
            "reason": "n-grams of the held-out set",
        },
        {"name": "difficulty", "kept": 2204, "removed": 1308, "reasons": {"too_easy": 402, "too_hard": 906}},
    ]
}


def reward_parts(record: Record) -> dict[str, Any]:
    sign = 1.0 if record.correct else -1.0
    source = "correct" if record.correct else "incorrect"
    return {"total": sign * 8 / 13, "accuracy": sign, "repetition": -0.0, "accuracy_source": source}


def write_run(folder: Path, num_problems: int = 256, num_steps: int = 800) -> ReportInputs:
    """A whole pipeline's files under `folder`, and the inputs that point to them."""
    for name, rows in (("sft", sft_metrics(num_steps)), ("rl", rl_metrics(60))):
        with JsonlWriter(folder / name / "metrics.jsonl") as writer:
            for row in rows:
                writer.write(row)
    write_results(folder / "sft_eval" / "results.jsonl", chain_results(0.5, 0.01, num_problems, 3))
    write_results(folder / "rl_eval" / "results.jsonl", chain_results(0.985, 0.004, num_problems, 4))
    atomic_write_json(folder / "curation.json", CURATION)
    atomic_write_json(folder / "config.json", {"seed": 0, "model": {"hidden_size": 128, "num_layers": 3}})
    return ReportInputs(
        title="phi4r quick start",
        description="Curation, supervised fine-tuning and GRPO of a tiny Phi-4 on left-to-right modular "
        "arithmetic.",
        facts={"Model": "0.69M parameters: 3 layers, hidden 128, 4 query and 2 KV heads"},
        sft_metrics=folder / "sft" / "metrics.jsonl",
        rl_metrics=folder / "rl" / "metrics.jsonl",
        evals={"SFT": folder / "sft_eval" / "results.jsonl", "GRPO": folder / "rl_eval" / "results.jsonl"},
        curation=folder / "curation.json",
        config=folder / "config.json",
        commands=["phi4r quickstart --run-dir runs/quickstart --seed 0"],
        seconds={"curation": 21.0, "SFT": 101.2, "GRPO": 58.9, "evaluation": 8.4},
        reward=reward_parts,
    )


@pytest.fixture(scope="session")
def pipeline_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReportInputs]:
    """A small run's folder and inputs; tests read it and write elsewhere."""
    folder = tmp_path_factory.mktemp("pipeline")
    return folder, write_run(folder, num_problems=32, num_steps=120)


@pytest.fixture(scope="session")
def results_by_stage(pipeline_run: tuple[Path, ReportInputs]) -> dict[str, Results]:
    """The evaluations of `pipeline_run`, SFT and GRPO."""
    return {name: read_results(path) for name, path in pipeline_run[1].evals.items()}
