"""Continuous sampling: no bias, every token under the weights of its version, nothing staler than the limit,
and a run that goes back to a checkpoint goes on as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from phi4r.configs.load import load_stage
from phi4r.configs.sections import ParallelConfig, TrainConfig
from phi4r.configs.stages import RLConfig
from phi4r.core.errors import ConfigError
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.rl.queue import PromptQueue
from phi4r.sampling.embedded import EmbeddedEngine
from phi4r.sampling.types import Completion, SampleRequest, SamplingOptions
from phi4r.train.engine import Engine
from phi4r.train.folders import checkpoints_folder, step_name
from tests.sampling.test_embedded import MODEL, STOP_IDS, rounding, trainers_logprobs

STEPS, PROMPTS, LIMIT, PER_DRAW = 7, 4, 2, 12
TEMPERATURE = 0.8


def settings(*overrides: str, limit: int = LIMIT) -> RLConfig:
    continuous = ["rollout.mode=continuous", f"rollout.max_policy_lag={limit}", "objective.importance_cap=2"]
    return load_stage(
        "rl", "tiny",
        [f"rollout.prompts_per_step={PROMPTS}", f"rollout.group_size={PER_DRAW // PROMPTS}",
         f"sampling.temperature={TEMPERATURE}", "sampling.max_new_tokens=40", f"train.num_steps={STEPS}",
         "checkpoint.every=100", *(continuous if limit else []), *overrides],
    ).config  # fmt: skip


def requests(number: int) -> list[SampleRequest]:
    """Prompts of 1 to 8 tokens, other ones in every draw."""
    random = np.random.default_rng(number)
    return [
        SampleRequest(tuple(random.integers(5, 64, int(random.integers(1, 9))).tolist()), (number, index))
        for index in range(PER_DRAW)
    ]


def give_weights(engine: Engine, version: int, moves: bool) -> None:
    """Those of `version`: with a head so large that some tokens are much likelier than others."""
    seed = 7 + version if moves else 7
    load_weights(
        engine.models,
        MODEL,
        lambda name: random_weights(MODEL, seed)(name) * (20.0 if name == "lm_head.weight" else 1.0),
        0,
        1,
    )


@pytest.fixture(scope="module")
def engine() -> Engine:
    """In fp64: an answer that is read anew gets keys and values of another rounding than one that was
    decoded, and one token in some thousand would change with that of fp32."""
    model = dataclasses.replace(MODEL, dtype="fp64")
    return Engine(model, ParallelConfig(), init_layout(ParallelConfig()), TrainConfig(logit_chunk_size=24))


def taken(
    engine: Engine, queue: PromptQueue, steps: range, moves: bool = True
) -> dict[int, list[Completion]]:
    """The draws of these steps, one each, with other weights in each step."""
    found = {}
    for step in steps:
        give_weights(engine, step, moves)
        queue.before_sync()
        queue.engine.sync(step)
        found[step], _ = queue.take(step, step)
        queue.after_collect(step + 1, step)
    return found


def continuous(
    engine: Engine, run_dir: Path, num_slots: int, step: int = 0, cfg: RLConfig | None = None
) -> PromptQueue:
    sampler = EmbeddedEngine(engine, STOP_IDS, num_slots)
    return PromptQueue(cfg or settings(), sampler, requests, run_dir, step, step)


def policy_lags(found: dict[int, list[Completion]]) -> list[int]:
    """Of the oldest token of each step."""
    return [step - min(c.version for c in completions) for step, completions in found.items()]


# Which answers are trained on, and when, must not depend on their lengths. Planted once to see this test
# fail: an engine that hands out the first PER_DRAW answers to end among those of all open draws. With 500
# slots the answers of its first steps are 8.2 and 18.9 tokens long on average, in place of 25.7 and 27.9.
@pytest.mark.parametrize("num_slots", [3, 12, 500])
@pytest.mark.proves(
    "Continuous sampling is not biased towards short answers",
    how="frozen weights: token by token those of synchronous sampling, any number of cache slots",
)
def test_with_frozen_weights_the_samples_are_those_of_synchronous_sampling(
    engine: Engine, tmp_path: Path, num_slots: int
) -> None:
    sampler = EmbeddedEngine(engine, STOP_IDS, PER_DRAW)
    plain = PromptQueue(settings(limit=0), sampler, requests, tmp_path / "plain", 0, 0)
    expected = taken(engine, plain, range(STEPS), moves=False)
    found = taken(engine, continuous(engine, tmp_path, num_slots), range(STEPS), moves=False)
    for step in range(STEPS):
        assert [c.tokens for c in found[step]] == [c.tokens for c in expected[step]]
        assert [c.finished for c in found[step]] == [c.finished for c in expected[step]]
        values = [np.concatenate([c.logprobs for c in draw[step]]) for draw in (found, expected)]
        assert np.abs(values[0] - values[1]).max() <= rounding(values[1], TEMPERATURE)
    lengths = [len(c.tokens) for completions in expected.values() for c in completions]
    assert len(set(lengths)) > 10, "answers should end at different times"
    assert max(policy_lags(expected)) == 0
    if num_slots < 500:
        assert any(len(c.spans) > 1 for completions in found.values() for c in completions)


@pytest.mark.parametrize(("limit", "num_slots"), [(1, 14), (2, 5), (2, 30), (4, 30)])
@pytest.mark.proves(
    "Every token's log-prob is that of the weights of its recorded version, none older than the limit",
    how="weights that change in mid-answer; the trainer's forward pass with each of them",
)
def test_every_token_has_the_logprob_of_the_weights_of_its_version(
    engine: Engine, tmp_path: Path, limit: int, num_slots: int
) -> None:
    queue = continuous(engine, tmp_path, num_slots, cfg=settings(limit=limit))
    found = taken(engine, queue, range(STEPS))
    assert all(0 <= lag <= limit for lag in policy_lags(found))
    if num_slots == 30:
        assert max(policy_lags(found)) == limit
    made = [request for step in range(STEPS) for request in requests(step)]
    completions = [c for step in range(STEPS) for c in found[step]]
    versions = [np.repeat(*np.array(c.spans).T) for c in completions]
    assert all(len(v) == len(c.tokens) for v, c in zip(versions, completions, strict=True))
    assert all(np.all(np.diff(v) >= 0) for v in versions)
    assert sum(len(c.spans) > 1 for c in completions) > 5, "updates should fall into answers"
    sampled_by, logprobs = np.concatenate(versions), np.concatenate([c.logprobs for c in completions])
    for version in range(STEPS):
        give_weights(engine, version, moves=True)
        trainer = np.concatenate(trainers_logprobs(engine, made, completions, TEMPERATURE))
        here, limit_of_rounding = sampled_by == version, rounding(trainer, TEMPERATURE)
        assert np.abs(logprobs - trainer)[here].max(initial=0) <= limit_of_rounding
        assert np.median(np.abs(logprobs - trainer)[~here]) > 100 * limit_of_rounding


# --- going back to a checkpoint


@pytest.mark.parametrize(("back_to", "num_slots"), [(3, 14), (5, 5), (5, 500)])
def test_a_run_restored_to_a_checkpoint_finds_its_partial_rollouts(
    engine: Engine, tmp_path: Path, back_to: int, num_slots: int
) -> None:
    for step in (3, 5):
        (checkpoints_folder(tmp_path) / step_name(step)).mkdir(parents=True)
    whole = taken(engine, continuous(engine, tmp_path, num_slots), range(STEPS))
    kept = sorted(path.name for path in (tmp_path / "queue").iterdir())
    assert kept == [f"step_{step:06d}.jsonl" for step in (3, 5, STEPS - 1, STEPS)]
    resumed = continuous(engine, tmp_path, num_slots, back_to)
    assert bool(resumed.begun)
    assert taken(engine, resumed, range(back_to, STEPS)) == {
        step: completions for step, completions in whole.items() if step >= back_to
    }


def test_files_newer_than_the_restored_checkpoint_are_deleted(engine: Engine, tmp_path: Path) -> None:
    taken(engine, continuous(engine, tmp_path, 14), range(4))  # leaves those after 3 and 4 steps
    assert not continuous(engine, tmp_path, 14, 2).begun
    assert not list((tmp_path / "queue").iterdir())
    taken(engine, continuous(engine, tmp_path, 14), range(3))
    resumed = continuous(engine, tmp_path, 14, 4)  # what there was after 3 steps of draws 4 and 5
    assert set(resumed.begun) == {4}
    found = taken(engine, resumed, range(4, STEPS))
    assert all(lag <= LIMIT for lag in policy_lags(found))


def test_what_is_too_old_for_a_lowered_limit_is_sampled_anew(engine: Engine, tmp_path: Path) -> None:
    taken(engine, continuous(engine, tmp_path, 500, cfg=settings(limit=4)), range(2))
    resumed = continuous(engine, tmp_path, 500, 2, cfg=settings(limit=1))
    assert not any(answer.tokens for answers in resumed.begun.values() for answer in answers)
    assert all(lag <= 1 for lag in policy_lags(taken(engine, resumed, range(2, STEPS))))


def test_a_beginning_from_other_settings_is_not_taken_up(engine: Engine, tmp_path: Path) -> None:
    taken(engine, continuous(engine, tmp_path, 14), range(2))
    resumed = continuous(engine, tmp_path, 14, 2)
    resumed.begun = {number: answers[:-1] for number, answers in resumed.begun.items()}
    assert [len(completions) for completions in taken(engine, resumed, range(2, 5)).values()] == [12, 12, 12]


def test_nothing_is_sampled_for_steps_beyond_the_last(engine: Engine, tmp_path: Path) -> None:
    queue = continuous(engine, tmp_path, 500)
    taken(engine, queue, range(STEPS))
    assert queue.next_open == STEPS
    assert queue.engine.unfinished() == {}


# --- completions and settings


def test_a_resumed_rollout_shares_a_span_where_weights_are_equal() -> None:
    begun = Completion([5, 6], [-1.0, -2.0], False, [(3, 1), (4, 1)])
    more = Completion([7], [-3.0], True, [(4, 1)])
    assert begun.followed_by(more) == Completion([5, 6, 7], [-1.0, -2.0, -3.0], True, [(3, 1), (4, 2)])
    assert begun.followed_by(Completion()) == begun
    assert (begun.version, Completion().version) == (3, 0)
    options = SamplingOptions(40)
    assert not begun.is_complete(options)
    assert Completion([5] * 40, [0.0] * 40, False, [(0, 40)]).is_complete(options)


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("rollout.mode", ["rollout.mode=always"]),
        ("rollout.max_policy_lag", ["rollout.mode=continuous", "rollout.max_policy_lag=0"]),
        ("objective.importance_cap", ["rollout.mode=one_step"]),
        ("objective.importance_cap", ["rollout.mode=continuous"]),
    ],
)
def test_impossible_combinations_are_refused_by_the_key_to_change(key: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_stage("rl", "tiny", overrides)
    assert caught.value.key == key
