"""The ledger: an answer serves exactly its own question, and a kill at any byte costs at most one answer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from phi4r.core.errors import UserError
from phi4r.sampling.ledger import Ledger, weights_digest
from phi4r.sampling.types import Completion, SampleRequest, SamplingOptions

OPTIONS = SamplingOptions(20, 0.8, 0.95, 50)
REQUESTS = [SampleRequest((5, 6 + number), (0, 31, number)) for number in range(6)]
ANSWERS = [
    Completion([7] * (number + 1), [-0.5] * (number + 1), number % 2 == 0, [(0, number + 1)])
    for number in range(6)
]


def filled(folder: Path) -> Ledger:
    ledger = Ledger(folder, "w", OPTIONS)
    for request, answer in zip(REQUESTS, ANSWERS, strict=True):
        ledger.append(request, answer, "server 1", 0.25)
    return ledger


def test_answers_come_back_with_their_cost(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    assert Ledger(tmp_path, "w", OPTIONS).find(REQUESTS) == dict(enumerate(ANSWERS))
    row = json.loads(ledger.path.read_text().splitlines()[3])
    assert (row["tokens"], row["reason"], row["server"]) == ([7] * 4, "length", "server 1")
    assert (row["num_prompt_tokens"], row["num_tokens"], row["seconds"], row["spans"]) == (
        2,
        4,
        0.25,
        [[0, 4]],
    )
    assert row["settings"] == dataclasses.asdict(OPTIONS)
    assert (row["weights"], row["seed"]) == ("w", [0, 31, 3])


@pytest.mark.parametrize(
    ("weights", "options", "request_"),
    [
        ("v", OPTIONS, REQUESTS[0]),
        ("w", dataclasses.replace(OPTIONS, temperature=0.9), REQUESTS[0]),
        ("w", dataclasses.replace(OPTIONS, top_p=1.0), REQUESTS[0]),
        ("w", dataclasses.replace(OPTIONS, max_new_tokens=21), REQUESTS[0]),
        ("w", OPTIONS, dataclasses.replace(REQUESTS[0], key=(0, 31, 7))),
        ("w", OPTIONS, dataclasses.replace(REQUESTS[0], prompt_tokens=(5, 7, 6))),
        ("w", OPTIONS, SampleRequest((), (0, 31, 0), (("user", "5 6"),))),
    ],
)
def test_another_question_has_no_answer(
    tmp_path: Path, weights: str, options: SamplingOptions, request_: SampleRequest
) -> None:
    filled(tmp_path)
    assert Ledger(tmp_path, weights, options).find([request_]) == {}


def test_every_torn_tail_keeps_the_lines_before_it(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole").path.read_bytes()
    starts = [0, *[place + 1 for place, byte in enumerate(whole) if byte == 10]]
    for size in range(0, len(whole) + 1, 7):
        folder = tmp_path / "torn"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "answers_000.jsonl"
        path.write_bytes(whole[:size])
        kept = sum(start <= size for start in starts) - 1
        ledger = Ledger(folder, "w", OPTIONS)
        assert ledger.find(REQUESTS) == dict(enumerate(ANSWERS[:kept]))
        for request, answer in zip(REQUESTS[kept:], ANSWERS[kept:], strict=True):
            ledger.append(request, answer, "server 1", 0.25)
        assert path.read_bytes() == whole


def test_files_of_several_processes_are_one_ledger(tmp_path: Path) -> None:
    for part in (0, 1):
        ledger = Ledger(tmp_path, "w", OPTIONS, part)
        for index in range(part, 6, 2):
            ledger.append(REQUESTS[index], ANSWERS[index], "embedded", 0.0)
    assert len(list(tmp_path.iterdir())) == 2
    assert Ledger(tmp_path, "w", OPTIONS, 5).find(REQUESTS) == dict(enumerate(ANSWERS))
    assert len(list(tmp_path.iterdir())) == 2, "reading makes no file"


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path).path
    path.write_text(path.read_text().replace('"tokens"', '"tokens', 1))
    with pytest.raises(UserError, match=r"answers_000\.jsonl:1: not valid JSON"):
        Ledger(tmp_path, "w", OPTIONS).find(REQUESTS)


def test_the_weights_of_a_folder_are_told_by_their_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    first = weights_digest(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert weights_digest(tmp_path / "copy") == first
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert weights_digest(folder) != first
