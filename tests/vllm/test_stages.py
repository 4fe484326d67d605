"""`phi4r eval`, `curate` and `generate` on two real vLLM servers: the embedded engine's greedy answers, both
servers at work, and nothing lost or repeated when the evaluation is killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4r.convert.hf import phi4r_to_hf
from tests.multiprocess.test_killed_eval import PROBLEMS, RUNS, TRAINED, killed_and_whole, ledger_rows
from tests.multiprocess.test_resume import finish
from tests.vllm.conftest import serving

pytestmark = [pytest.mark.vllm, pytest.mark.multiprocess]

LONGEST = 200
# Two requests at once on each: the server that is ready first cannot take all of them.
SERVED = ["--sampling.engine", "vllm", "--sampling.max_in_flight", "2", "--vllm.addresses"]
GREEDY = [
    "--sampling.temperature", "0", "--sampling.max_new_tokens", "30", "--eval.runs", "1",
    "--eval.num_problems", "24", "--eval.bootstrap", "100",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint."""
    run_dir = Path(tmp_path_factory.mktemp("trained")) / "sft"
    finish(TRAINED, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def addresses(trained: Path, vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two servers that phi4r did not start, as in vllm.addresses."""
    folder = Path(tmp_path_factory.mktemp("servers"))
    phi4r_to_hf(trained, folder / "hf")
    with serving(folder / "hf", vllm_python, folder, LONGEST, "files") as found:
        yield found


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def servers_of(run_dir: Path) -> set[str]:
    return {row["server"] for row in ledger_rows(run_dir)}


def test_greedy_evaluation_equals_the_embedded_engines(trained: Path, addresses: str, tmp_path: Path) -> None:
    words = ["eval", str(trained), "modchain", *GREEDY]
    finish(words, tmp_path / "embedded")
    finish([*words, *SERVED, addresses], tmp_path / "vllm")
    for name in ("results.jsonl", "summary.json"):
        assert (tmp_path / "vllm" / name).read_bytes() == (tmp_path / "embedded" / name).read_bytes()
    assert servers_of(tmp_path / "vllm") == set(addresses.split(","))
    assert not (tmp_path / "vllm" / "weights").exists() or not list((tmp_path / "vllm" / "weights").iterdir())


def test_curation_measures_pass_rates_on_servers(trained: Path, addresses: str, tmp_path: Path) -> None:
    words = [
        "curate", "tiny", "--curate.checkpoint", str(trained), "--problems.num_generated", "40",
        "--curate.num_heldout", "4", "--curate.pass_rate_k", "2", "--curate.band_low", "0",
        "--curate.band_high", "1", "--sampling.max_new_tokens", "20", "--sampling.temperature", "0",
    ]  # fmt: skip
    finish(words, tmp_path / "embedded")
    finish([*words, *SERVED, addresses], tmp_path / "vllm")
    assert (tmp_path / "vllm/curated.jsonl").read_bytes() == (
        tmp_path / "embedded/curated.jsonl"
    ).read_bytes()
    assert servers_of(tmp_path / "vllm") == set(addresses.split(","))
    assert {row["seed"][-1] for row in ledger_rows(tmp_path / "vllm")} == {0, 1}


def test_generation_answers_problems_with_the_papers_settings(
    trained: Path, addresses: str, tmp_path: Path
) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"problem": f"{n}+1%10?", "answer": str(n)}) + "\n" for n in range(9))
    )
    words = [
        "generate", str(trained), "--problems", str(problems), "--samples", "3", "--max-new-tokens", "20",
        "--temperature", "0.8", "--top-p", "0.95", "--top-k", "50",
        *SERVED, addresses,
    ]  # fmt: skip
    finish(words, tmp_path / "run")
    answers = rows(tmp_path / "run" / "answers.jsonl")
    assert len(answers) == 27
    assert answers[4]["messages"][0] == {"role": "user", "content": "1+1%10?"}
    assert len({row["messages"][1]["content"] for row in answers}) > 20, "every sample has its own seed"
    ledger = ledger_rows(tmp_path / "run")
    assert {row["server"] for row in ledger} == set(addresses.split(","))
    assert all(row["logprobs"] == [] for row in ledger), "a filtered server's are not the model's"
    finish(words, tmp_path / "again")
    assert rows(tmp_path / "again" / "answers.jsonl") == answers


@pytest.mark.slow
@pytest.mark.proves(
    "Evaluation on two vLLM servers killed with SIGKILL at 20 random moments repeats no finished answer",
    how="results.jsonl and summary.json of an uninterrupted evaluation, byte for byte",
)
def test_a_killed_evaluation_on_servers_asks_only_for_what_is_missing(
    trained: Path, addresses: str, tmp_path: Path
) -> None:
    words = [
        "eval", str(trained), "modchain", "--eval.runs", str(RUNS), "--eval.num_problems", str(PROBLEMS),
        "--sampling.max_new_tokens", "60", "--sampling.temperature", "0.8",
        "--sampling.top_p", "0.95", "--sampling.top_k", "50", "--eval.bootstrap", "200",
        *SERVED, addresses,
    ]  # fmt: skip
    killed_and_whole(words, tmp_path, 20)
