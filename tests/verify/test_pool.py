"""Workers that hang, crash or die cost one question each, never the pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.verifier import read_cases
from phi4r.verify.audit import with_second
from phi4r.verify.pool import VerifierPool, VerifierUnavailableError

# Passes the complexity gate, and sympy works on it for minutes.
HANGS = r"\sum_{k=1}^{n} \prod_{j=1}^{k} \sin(j^{k}x)^{7}\cos(x^{j})+\int_0^1 \sin(x^{x^2}+e^{x})^{9} dx"
# With the variables of that: another gold answer is seen to differ without algebra.
HANGS_GOLD = "n+k+j+x+d"
BOXED = r"<think>hm</think>So \boxed{%s}."


def job(gold: str, answer: str) -> tuple[str, str]:
    return gold, BOXED % answer


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    """Two warm workers with a short deadline, used by all tests here: each leaves the pool usable or fails
    the next.
    """
    with VerifierPool(2, timeout_s=2.0) as pool:
        pool.warm()
        yield pool


ALGEBRA = [
    ("x+1", "1+x", "correct"),
    (r"\frac{\sqrt3}{2}", r"\sin(\pi/3)", "correct"),
    (r"\{1,2\}", r"\{2,1\}", "correct"),
    ("[0,1)", r"0\le x<1", "correct"),
    ("5", "x=5", "correct"),
    ("8", "2^3", "correct"),
    (r"x^2+2x+1", "(x+1)^2", "correct"),
    ("8", "2^4", "wrong"),
    ("[0,1]", "(0,1)", "wrong"),
    ("(1,2)", "(2,1)", "wrong"),
    ("x=5", "y=5", "wrong"),
    # math-verify alone takes these for equal.
    ("1/2^{99}", "1/2^{98}", "wrong"),
    ("1/204!", "1/206!", "wrong"),
    (r"1+\frac{1}{e}", r"1-\frac{1}{\mathrm{e}}", "wrong"),
    ("0", "2^{-99}", "wrong"),
    # Nor does a number in the middle of what cannot be parsed count.
    ("7", r"x \mapsto 7", "wrong"),
    ("8", "7 & 8", "wrong"),
    ("7", "7^", "wrong"),
    (r"\frac{1}", "7", "error"),
]


def test_algebra_is_settled_by_workers_in_the_order_of_the_jobs(pool: VerifierPool) -> None:
    verdicts = pool.map([job(gold, answer) for gold, answer, _ in ALGEBRA])
    assert [verdict.outcome for verdict in verdicts] == [outcome for _, _, outcome in ALGEBRA]
    assert [verdict.answer for verdict in verdicts] == [answer for _, answer, _ in ALGEBRA]
    assert all(verdict.seconds < 60 for verdict in verdicts)
    assert [verdict.seconds > 0 for verdict in verdicts].count(True) > 6


@pytest.mark.proves("A verifier whose workers hang goes on", how="four hanging answers, two workers")
def test_four_hanging_answers_do_not_wedge_two_workers(pool: VerifierPool) -> None:
    killed = pool.num_killed
    good = [job("x+1", "1+x"), job("x+1", "x+2")]
    jobs = [job(HANGS_GOLD, HANGS + f"+{k}") for k in range(4)] + good * 3
    outcomes = [verdict.outcome for verdict in pool.map(jobs)]
    assert outcomes == ["timeout"] * 4 + ["correct", "wrong"] * 3
    assert pool.num_killed == killed + 4
    assert [verdict.outcome for verdict in pool.map(good)] == ["correct", "wrong"]


@pytest.mark.proves("A verifier whose worker is killed goes on", how="SIGKILL")
def test_a_killed_worker_is_replaced_and_the_next_answers_are_right(pool: VerifierPool) -> None:
    before = pool.worker_pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    outcomes = [verdict.outcome for verdict in pool.map([job("x+1", "1+x")] * 4)]
    assert outcomes.count("correct") >= 2
    assert set(outcomes) <= {"correct", "error"}
    assert [verdict.outcome for verdict in pool.map([job("x+1", "1+x")] * 4)] == ["correct"] * 4
    assert not set(before) & set(pool.worker_pids())


def test_a_killed_worker_makes_its_question_an_error_and_no_other(pool: VerifierPool) -> None:
    pool.warm()

    def kill_the_busy_one() -> None:
        while not (busy := [worker.pid for worker in pool._workers if worker.task is not None]):
            time.sleep(0.01)
        os.kill(busy[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_the_busy_one)
    thread.start()
    jobs = [job(HANGS_GOLD, HANGS), job("7", "7"), job("7", "8")]
    outcomes = [verdict.outcome for verdict in pool.map(jobs)]
    thread.join()
    assert outcomes == ["error", "correct", "wrong"]
    assert pool.grade("x+1", BOXED % "1+x").outcome == "correct"


@pytest.mark.proves(
    "Answers that hang, explode or inject code never count as right",
    how="a list of them, a deadline over all; a file that injected code would make",
)
def test_hostile_answers_are_never_right_never_hang_and_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cases of the category "adversarial" (benchmarks/verifier_cases.jsonl), by both checks."""
    cases = [case for case in read_cases() if case["category"] == "adversarial"]
    assert len(cases) > 60
    assert max(len(case["response"]) for case in cases) > 100_000
    assert sum("phi4r_canary" in case["response"] for case in cases) > 3
    monkeypatch.chdir(tmp_path)
    with VerifierPool(2, timeout_s=2.0) as pool:
        pool.warm()
        golds = [case["gold"] for case in cases]
        verdicts = pool.map([(case["gold"], case["response"]) for case in cases])
        verdicts = with_second(golds, verdicts, pool)
        assert pool.grade("x+1", BOXED % "1+x").correct
    assert [
        case["response"][-40:] for case, verdict in zip(cases, verdicts, strict=True) if verdict.correct
    ] == []
    assert list(tmp_path.iterdir()) == []


def test_answers_that_need_no_algebra_start_no_process() -> None:
    with VerifierPool(2) as idle:
        outcomes = [
            v.outcome
            for v in idle.map([("7", "<think></think>7"), ("1/2", r"\boxed{0.5}"), ("7", "8"), ("7", "")])
        ]
        assert outcomes == ["correct", "correct", "wrong", "no_answer"]
        assert idle.num_started == 0
        assert idle.map([]) == []


def test_progress_counts_every_job_once(pool: VerifierPool) -> None:
    counts: list[int] = []
    pool.map([job("x+1", "1+x"), job("7", "7"), job("7", "8"), job("8", "2^3")], on_done=counts.append)
    assert sum(counts) == 4
    assert counts[0] == 2


def test_workers_have_a_memory_limit_and_no_secrets(
    pool: VerifierPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.warm()
    for pid in pool.worker_pids():
        with open(f"/proc/{pid}/limits") as file:
            limits = {line[:26].strip(): line[26:].split()[0] for line in file}
        assert limits["Max address space"] == str(2**30)
        assert limits["Max core file size"] == limits["Max file size"] == "0"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    with VerifierPool(1) as other:
        other.warm()
        with open(f"/proc/{other.worker_pids()[0]}/environ") as file:
            assert "secret" not in file.read()


def test_workers_that_cannot_start_are_our_error_and_nobodys_reward() -> None:
    # Python itself needs more than this.
    with (
        VerifierPool(1, memory_gib=0.02) as starved,
        pytest.raises(VerifierUnavailableError, match="memory-gib"),
    ):
        starved.map([job("x+1", "1+x")])


def test_an_interrupted_map_leaves_no_stale_answer_behind(pool: VerifierPool) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    pool.warm()
    with pytest.raises(KeyboardInterrupt):
        pool.map([job("x+1", "1+x"), job(HANGS_GOLD, HANGS)], on_done=interrupt)
    # Left alone, the second worker would be late and its "timeout" land on the second of these.
    assert [verdict.outcome for verdict in pool.map([job("x+2", "2+x")] * 3)] == ["correct"] * 3


def test_workers_end_with_the_process_that_started_them() -> None:
    code = (
        "from phi4r.verify.pool import VerifierPool\n"
        "import os\n"
        "pool = VerifierPool(1); pool.warm(); print(pool.worker_pids()[0], flush=True); os._exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}"):
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                break
        time.sleep(0.05)
    else:
        assert not os.path.exists(f"/proc/{pid}")


def test_workers_are_replaced_after_a_number_of_questions() -> None:
    with VerifierPool(1, timeout_s=10, recycle_after=2) as pool:
        assert [verdict.outcome for verdict in pool.map([job("x+1", "1+x")] * 3)] == ["correct"] * 3
        assert (pool.num_started, pool.num_killed) == (2, 0)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="workers"):
        VerifierPool(0)
    with pytest.raises(ValueError, match="positive"):
        VerifierPool(1, timeout_s=0)
