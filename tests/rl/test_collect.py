"""Drawing again in place of groups whose rewards are all equal: what is sampled and what is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from phi4r.configs.load import load_stage
from phi4r.configs.sections import ParallelConfig
from phi4r.configs.stages import RLConfig
from phi4r.core.problem import Problem
from phi4r.core.seeds import Stream, items_of_step
from phi4r.data.tokenizer import Tokenizer
from phi4r.parallel.layout import init_layout
from phi4r.rl.collect import Collector, StepSamples
from phi4r.sampling.types import Completion, SampleRequest, SamplingOptions, Span
from phi4r.tasks import get_task
from phi4r.verify.pool import VerifierPool

Parts = tuple[list[Problem], Tokenizer, VerifierPool]
SEED, NUM_PROBLEMS, PROMPTS, GROUP = 5, 40, 3, 2


class Writer:
    """An engine that answers by heart: samples with an even number rightly, and the others wrongly where the
    problem's number is among `hard`."""

    is_concurrent = False

    def __init__(self, problems: Sequence[Problem], tokenizer: Tokenizer, hard: Sequence[int]) -> None:
        self.problems, self.tokenizer, self.hard = problems, tokenizer, set(hard)
        self.layout = init_layout(ParallelConfig())
        self.keys: list[tuple[int, ...]] = []
        self.batches: dict[int, list[Completion]] = {}
        self.version = 0

    def sync(self, version: int) -> dict[str, float]:
        self.version = version
        return {}

    def open(
        self,
        number: int,
        requests: Sequence[SampleRequest],
        options: SamplingOptions,
        begun: Sequence[Completion],
    ) -> None:
        assert number not in self.batches
        self.keys += [request.key for request in requests]
        self.batches[number] = [
            self.answer(request.prompt_tokens[0], request.key[-1]) for request in requests
        ]

    def finish(self, number: int) -> list[Completion]:
        return self.batches.pop(number)

    def unfinished(self) -> dict[int, list[Completion]]:
        return self.batches

    def take_busy(self) -> list[Span]:
        return []

    def answer(self, number: int, sample: int) -> Completion:
        right = int(self.problems[number].answer)
        answer = (right + 1) % 10 if number in self.hard and sample % 2 else right
        tokens = [*self.tokenizer.encode(f"<think></think>{answer}"), self.tokenizer.eos_ids[0]]
        return Completion(tokens, [-1.0] * len(tokens), True, [(self.version, len(tokens))])


@pytest.fixture(scope="module")
def parts() -> Iterator[Parts]:
    problems = [get_task("modchain").generate(SEED, number) for number in range(NUM_PROBLEMS)]
    with VerifierPool(1, 5.0) as pool:
        yield problems, Tokenizer.builtin(), pool


def settings(max_draws: int, *more: str) -> RLConfig:
    return load_stage(
        "rl", "tiny",
        [f"rollout.prompts_per_step={PROMPTS}", f"rollout.group_size={GROUP}",
         f"rollout.max_prompt_batches={max_draws}", f"seed={SEED}", *more],
    ).config  # fmt: skip


def drawn(draw: int) -> list[int]:
    return items_of_step(NUM_PROBLEMS, SEED, Stream.PROMPTS, draw, PROMPTS)


def collected(
    parts: Parts, hard: Sequence[int], max_draws: int, first_draw: int = 0
) -> tuple[StepSamples, Writer]:
    problems, tokenizer, pool = parts
    engine = Writer(problems, tokenizer, hard)
    prompts = [(number,) for number in range(NUM_PROBLEMS)]
    collector = Collector(
        settings(max_draws), engine, pool, tokenizer, problems, prompts, Path("unused"), first_draw
    )
    found = collector.collect(0)
    assert collector.next_batch == first_draw + found.num_batches
    return found, engine


def numbers(found: StepSamples) -> list[int]:
    """The problems that are trained on, a number for each group."""
    return [int(t.sample.prompt_tokens[0]) for t in found.used if t.sample.sample_index == 0]


def test_prompts_are_drawn_until_enough_groups_differ(parts: Parts) -> None:
    hard = [drawn(4)[1], *drawn(5)[:1], *drawn(6)]
    found, engine = collected(parts, hard, max_draws=9, first_draw=4)
    assert found.num_batches == 3
    assert numbers(found) == [drawn(4)[1], drawn(5)[0], drawn(6)[0]]  # no more than prompts_per_step
    assert len(found.used) == PROMPTS * GROUP
    assert all(t.advantage != 0 for t in found.used)
    assert [t.sample.prompt_index for t in found.trajectories[::GROUP]] == list(range(3 * PROMPTS))
    assert engine.keys == [
        (SEED, Stream.SAMPLES, draw, prompt, sample)
        for draw in (4, 5, 6) for prompt in range(PROMPTS) for sample in range(GROUP)
    ]  # fmt: skip
    metrics = found.metrics(0)
    assert (metrics["prompt_batches"], metrics["used_groups"]) == (3, PROMPTS)
    assert metrics["zero_variance_share"] == pytest.approx(1 - 5 / 9)


def test_the_last_draw_ends_the_search(parts: Parts) -> None:
    found, _ = collected(parts, drawn(1)[:1], max_draws=2)
    assert (found.num_batches, numbers(found)) == (2, drawn(1)[:1])


def test_without_any_group_that_differs_the_first_draw_is_taken(parts: Parts) -> None:
    found, _ = collected(parts, [], max_draws=2)
    assert (found.num_batches, numbers(found)) == (2, drawn(0))
    assert not found.groups.informative.any()


def test_one_draw_keeps_every_group(parts: Parts) -> None:
    found, _ = collected(parts, drawn(0)[:1], max_draws=1)
    assert (found.num_batches, numbers(found)) == (1, drawn(0))
    assert found.used == found.trajectories


def test_batches_sampled_continuously_are_used_in_their_order(parts: Parts, tmp_path: Path) -> None:
    problems, tokenizer, pool = parts
    prompts = [(number,) for number in range(NUM_PROBLEMS)]
    hard = [drawn(0)[1], *drawn(1), *drawn(4), *drawn(5)]
    used = []
    for name, more in (
        ("plain", []),
        ("continuous", ["rollout.mode=continuous", "rollout.max_policy_lag=3", "objective.importance_cap=2"]),
    ):
        engine = Writer(problems, tokenizer, hard)
        cfg = settings(3, *more)
        collector = Collector(cfg, engine, pool, tokenizer, problems, prompts, tmp_path / name, 0)
        found = []
        for step in range(3):
            engine.sync(step)
            found.append(collector.collect(step))
        assert [one.num_batches for one in found] == [2, 3, 1]
        used.append([numbers(one) for one in found])
    assert used[0] == used[1]
    assert sorted(engine.batches) == [6, 7, 8], "as many are open beyond the last one as samples may lag"
