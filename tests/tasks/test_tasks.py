"""Generators are functions of (seed, index); checkers are exact and cannot be talked into anything."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4r.core.errors import UserError
from phi4r.core.problem import Problem
from phi4r.tasks import TASKS, alphabet, get_task, grade_responses
from phi4r.tasks.base import CounterStream
from phi4r.tasks.countdown import evaluate
from phi4r.verify.pool import VerifierPool

GENERATED = [name for name, task in TASKS.items() if task.is_generated]


def problem_of(task: str, text: str, answer: str) -> Problem:
    return Problem(id="x", problem=text, answer=answer, task=task)


# --- streams


def test_a_stream_is_fixed_for_all_time() -> None:
    stream = CounterStream("any")
    stream._state = 0
    # splitmix64 from state 0, as published with the generator.
    assert [stream.bits() for _ in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    texts = [get_task("modchain").generate(0, index).problem for index in range(3)]
    assert texts == ["8*6*7%10?", "8-0-0+1%10?", "4*3-4%10?"]


def test_streams_with_different_keys_differ_and_cannot_be_confused() -> None:
    first = {CounterStream(*key).bits() for key in [("a", 1, 12), ("a", 11, 2), ("a1", 1, 2), ("a", 1, 2)]}
    assert len(first) == 4


def test_draws_are_uniform() -> None:
    stream = CounterStream("uniform", 0)
    counts = Counter(stream.below(6) for _ in range(12_000))
    # chi-square with 5 degrees of freedom: 30 is beyond 1e-5.
    assert sum((count - 2000) ** 2 / 2000 for count in counts.values()) < 30
    orders = Counter(tuple(stream.shuffled("abc")) for _ in range(6000))
    assert len(orders) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in orders.values()) < 30
    assert {stream.between(2, 4) for _ in range(100)} == {2, 3, 4}


# --- every task


@pytest.mark.parametrize("name", GENERATED)
def test_a_problem_depends_on_seed_and_index_only(name: str) -> None:
    task = get_task(name)
    in_order = [task.generate(7, index) for index in range(50)]
    assert [task.generate(7, index) for index in reversed(range(50))] == in_order[::-1]
    assert [task.generate(8, index) for index in range(50)] != in_order
    assert len({problem.id for problem in in_order}) == 50


@pytest.mark.parametrize("name", GENERATED)
def test_gold_answers_and_traces_pass_the_checker_within_the_alphabet(name: str) -> None:
    task = get_task(name)
    for index in range(200):
        problem = task.generate(3, index)
        think, final = task.trace(problem, 3, index)
        assert task.check(problem, problem.answer)
        assert task.check(problem, final)
        assert task.check(problem, rf"So the answer is \boxed{{{final}}}.")
        assert set(problem.problem + think + final) <= set(task.alphabet) <= set(alphabet())


@pytest.mark.parametrize("name", GENERATED)
def test_skip_share_empties_think_blocks_and_never_the_answer(name: str) -> None:
    task = get_task(name)
    number = 2000
    for share in (0.0, 0.5, 1.0):
        empty = 0
        for index in range(number):
            think, final = task.trace(task.generate(1, index), 1, index, share)
            empty += think == ""
            assert final
        # Six standard deviations of a binomial count.
        assert abs(empty - share * number) <= 6 * (number * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("name", GENERATED)
def test_difficulty_can_be_a_number_a_range_or_the_default(name: str) -> None:
    task = get_task(name)
    low, high = task.default_range
    assert {task.generate(0, index).difficulty for index in range(100)} == set(range(low, high + 1))
    assert {task.generate(0, index, 2).difficulty for index in range(20)} == {2}
    assert {task.generate(0, index, (2, 3)).difficulty for index in range(50)} == {2, 3}
    with pytest.raises(UserError, match="difficulty"):
        task.generate(0, 0, 0)
    with pytest.raises(UserError, match="difficulty"):
        task.generate(0, 0, (4, 3))


@pytest.mark.parametrize("name", GENERATED)
def test_a_problem_of_another_kind_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: not a problem of this task"):
        get_task(name).check(problem_of(name, "What is 2+2?", "4"), "4")


@pytest.mark.parametrize("name", GENERATED)
@given(text=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_no_text_crashes_a_checker(name: str, text: str) -> None:
    problem = get_task(name).generate(0, 0)
    assert get_task(name).check(problem, text) in (True, False)


def test_an_unknown_task_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'modchian'.*modchain.*countdown"):
        get_task("modchian")


def test_tasks_import_neither_torch_nor_sympy() -> None:
    code = (
        "import sys, phi4r.tasks, phi4r.sampling.types;"
        " print({'torch', 'sympy', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- each task


def test_modchain_works_from_left_to_right_and_reduces_each_step() -> None:
    task, problem = get_task("modchain"), problem_of("modchain", "3*7+5-9%10?", "7")
    assert task.trace(problem, 0, 0, 0.0) == ("3*7=1;1+5=6;6-9=7", "7")
    assert task.trace(problem, 0, 0, 1.0) == ("", "7")
    # With the usual precedence 2+3*4 would be 14, so 4.
    assert task.check(problem_of("modchain", "2+3*4%10?", "0"), "0")


@pytest.mark.parametrize(
    "text", ["7", " 7 ", "$7$", r"\boxed{7}", "07", "7.", r"Thus \boxed{7}", "7<|im_end|>"]
)
def test_modchain_takes_the_answer_plain_or_boxed(text: str) -> None:
    assert get_task("modchain").check(problem_of("modchain", "3*7+5-9%10?", "7"), text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "17",
        "-3",
        "7 7",
        "7 or 8",
        r"\boxed{8} 7",
        r"\boxed{7} \boxed{8}",
        r"\boxed{7",
        "the answer is 7",
    ],
)
def test_modchain_takes_nothing_else(text: str) -> None:
    assert not get_task("modchain").check(problem_of("modchain", "3*7+5-9%10?", "7"), text)


def test_addition_traces_add_columns_and_carry() -> None:
    task, problem = get_task("addition"), problem_of("addition", "347+589?", "936")
    assert task.trace(problem, 0, 0, 0.0) == ("7+9=16;4+8+1=13;3+5+1=9", "936")
    assert task.check(problem, r"\boxed{936}")
    assert not task.check(problem, "935")


def test_addition_columns_spell_the_answer() -> None:
    task = get_task("addition")
    for index in range(300):
        problem = task.generate(5, index, (1, 30))
        think, final = task.trace(problem, 5, index, 0.0)
        sums = [int(step.partition("=")[2]) for step in think.split(";")]
        written = "".join(str(total % 10) for total in sums[:-1])[::-1]
        assert str(sums[-1]) + written == final
        for left, right in re.findall(r"([\d+]+)=(\d+)", think):
            assert sum(map(int, left.split("+"))) == int(right)


COUNTDOWN = problem_of("countdown", "3,5,7=56?", "(3+5)*7")


@pytest.mark.parametrize(
    "text",
    [
        "(3+5)*7",
        "7*(5+3)",
        "7 * ( 5 + 3 )",
        r"\boxed{(3+5)\times 7}",
        "(3+5)*7=56",
        "((3+5))*7",
        "--7*(5+3)",
        "7×(3+5)",
        "-(-7)*(3+5)",
    ],
)
def test_countdown_takes_any_expression_with_the_numbers_and_the_value(text: str) -> None:
    assert get_task("countdown").check(COUNTDOWN, text)


WRONG_COUNTDOWN = """
    56;7*8;3+5*7;(3+5)*7*1;(3+5)*7+0;(3+5)*7=57;(3+5)*7=;(3+5)7;(3+5)*7);((3+5)*7;3,5,7;57-1;(3+5)*7/(7-7);(3+5)**7;
    __import__('os');(35)*7;();+;1/0
"""


@pytest.mark.parametrize("text", ["", *(text.strip() for text in WRONG_COUNTDOWN.split(";"))])
def test_countdown_takes_nothing_else(text: str) -> None:
    assert not get_task("countdown").check(COUNTDOWN, text)


def test_countdown_refuses_long_nonsense_at_once() -> None:
    for text in ("(" * 90, "-" * 90 + "7", "(" * 100_000, "-" * 100_000 + "7", "9" * 100_000):
        assert not get_task("countdown").check(COUNTDOWN, rf"\boxed{{{text}}}")


def test_countdown_divides_exactly() -> None:
    assert get_task("countdown").check(problem_of("countdown", "1,3,3=1?", "1"), "3*(1/3)")
    assert evaluate("1/3+1/6") == (Fraction(1, 2), [1, 3, 1, 6])


def joined(parts: tuple[str, str, str]) -> str:
    return f"({parts[0]}{parts[1]}{parts[2]})"


EXPRESSIONS = st.recursive(
    st.integers(1, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(joined),
    max_leaves=8,
)


@given(EXPRESSIONS)
@settings(deadline=None)
def test_the_evaluator_agrees_with_python(text: str) -> None:
    plain = text[1:-1] if text.startswith("(") else text
    assert evaluate(plain)[0] == eval(plain)


def test_countdown_traces_are_true_step_by_step_and_only_the_last_try_hits() -> None:
    task = get_task("countdown")
    lengths: Counter[int] = Counter()
    for index in range(400):
        problem = task.generate(2, index, (2, 5))
        target = int(problem.problem.partition("=")[2].rstrip("?"))
        think, final = task.trace(problem, 2, index)
        tries = think.split(";")
        lengths[len(tries)] += 1
        for step in think.replace(";", ",").split(","):
            left, _, right = step.rpartition("=")
            assert eval(left) == int(right)
        results = [int(attempt.rpartition("=")[2]) for attempt in tries]
        assert results[-1] == target
        assert target not in results[:-1]
        assert final == problem.answer
    assert set(lengths) == {1, 2, 3, 4}


def test_math_is_never_generated_and_trains_on_the_given_trace() -> None:
    task = get_task("")
    assert task.name == "math"
    with pytest.raises(UserError, match="cannot be generated"):
        task.generate(0, 0)
    with pytest.raises(UserError, match="no trace"):
        task.trace(problem_of("", "?", "7"), 0, 0)
    given_trace = Problem(id="x", problem="?", answer="steps #### 1,007", trace="thinking")
    assert task.trace(given_trace, 0, 0) == ("thinking", r"\boxed{1,007}")
    assert task.check(given_trace, r"\boxed{1007}")
    assert not task.check(given_trace, r"\boxed{1008}")


def test_responses_of_all_tasks_are_graded_in_order() -> None:
    chain = problem_of("modchain", "3*7+5-9%10?", "7")
    algebra = problem_of("math", "Expand (x+1)^2", "x^2+2x+1")
    with VerifierPool(1, timeout_s=20) as pool:
        quick = [(chain, "<think></think>7"), (COUNTDOWN, "<think></think>56"), (chain, "<think>7")]
        outcomes = [verdict.outcome for verdict in grade_responses(quick, pool)]
        assert outcomes == ["correct", "wrong", "no_answer"]
        assert pool.num_started == 0
        mixed = [(algebra, r"\boxed{(x+1)^2}"), (chain, "<think>1</think>3"), (algebra, r"\boxed{(x+2)^2}")]
        outcomes = [verdict.outcome for verdict in grade_responses([*mixed, (algebra, "")], pool)]
        assert outcomes == ["correct", "wrong", "wrong", "no_answer"]
        assert pool.num_started == 1
