"""Problems that can be generated and answers that can be checked: one object serves SFT traces, reward and
evaluation.

    base.py        `Task`, counter-based random streams
    modchain.py    left-to-right arithmetic modulo 10 (the default)
    addition.py    sums of several multi-digit numbers
    countdown.py   reach a target with given numbers
    math.py        any problem with a gold answer, checked by `phi4r.verify`
    code.py        programs, run in a sandbox
    registry.py    tasks by registered name or import path

A task knows nothing of tokenizers, models or files, and imports no torch. A problem depends on (seed,
index) only, never on how many were generated before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from phi4r.tasks.code import Code
from phi4r.tasks.math import Math
from phi4r.tasks.registry import TASKS, alphabet, get_task
from phi4r.verify.audit import with_second
from phi4r.verify.extract import in_box
from phi4r.verify.judge import Question, is_for_judge, judged, start

if TYPE_CHECKING:
    from phi4r.configs.sections import RewardConfig
    from phi4r.core.problem import Problem
    from phi4r.verify.judge import Reply
    from phi4r.verify.pool import VerifierPool
    from phi4r.verify.strict import Verdict

__all__ = ["TASKS", "alphabet", "get_task", "grade_responses"]


def grade_responses(
    graded: Sequence[tuple[Problem, str]],
    pool: VerifierPool,
    settings: RewardConfig | None = None,
    finished: Sequence[bool] | None = None,
) -> list[Verdict]:
    """Verdicts on (problem, whole response) pairs, in order.

    Tasks with a checker of their own are settled in this process, programs run in sandboxes, as many at once
    as `pool` has workers; the rest goes to `pool` in one batch. With `settings`, answers stand where
    `reward.answer_style` says, a judge is asked about
    answers to mathematics without a box (`reward.judge_url`), where the response is `finished` (None: all
    are), and a share of the verdicts is checked a second time (`reward.audit_share`). Raises what
    `VerifierPool.map` raises.
    """
    if settings:
        graded = [(problem, in_box(response, settings.answer_style)) for problem, response in graded]
    verdicts: list[Verdict | None] = [
        get_task(problem.task).grade(problem, response) for problem, response in graded
    ]
    judge = None
    if settings and settings.judge_url:
        judge = _ask_judge(graded, verdicts, settings, finished or [True] * len(graded))
    programs, algebra = list[int](), list[int]()
    for place, verdict in enumerate(verdicts):
        if verdict is None:
            (programs if graded[place][0].task == Code.name else algebra).append(place)
    if programs:
        found = Code().grade_all([graded[place] for place in programs], pool.num_workers, pool.timeout_s)
        _fill(verdicts, programs, found)
    if algebra:
        _fill(verdicts, algebra, pool.map([(graded[i][0].answer, graded[i][1]) for i in algebra]))
    settled = [verdict for verdict in verdicts if verdict is not None]
    if settings is None:
        return settled
    places = [i for i, (problem, _) in enumerate(graded) if get_task(problem.task).name == Math.name]
    if places and settings.audit_share:
        checked = with_second(
            [graded[i][0].answer for i in places], [settled[i] for i in places], pool, settings.audit_share
        )
        _fill(settled, places, checked)
    if judge is not None:
        asked, replies = judge
        _fill(settled, asked, [judged(settled[i], reply) for i, reply in zip(asked, replies(), strict=True)])
    return settled


def _ask_judge(
    graded: Sequence[tuple[Problem, str]],
    verdicts: Sequence[Verdict | None],
    settings: RewardConfig,
    finished: Sequence[bool],
) -> tuple[list[int], Callable[[], list[Reply]]]:
    """The places of what a judge is asked about, and the wait for its replies."""
    places = [
        i
        for i, ((problem, _), verdict) in enumerate(zip(graded, verdicts, strict=True))
        if finished[i]
        and verdict is not None
        and get_task(problem.task).name == Math.name
        and is_for_judge(verdict)
    ]
    questions = [Question(graded[i][0].problem, graded[i][0].answer, graded[i][1]) for i in places]
    return places, start(questions, settings) if questions else list


def _fill(
    verdicts: list[Verdict] | list[Verdict | None], places: Sequence[int], found: Sequence[Verdict]
) -> None:
    for place, verdict in zip(places, found, strict=True):
        verdicts[place] = verdict
