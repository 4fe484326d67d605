"""Programs run in the sandbox: right ones are right, and hostile ones get nothing and end."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from phi4r.core.errors import UserError
from phi4r.core.problem import Problem
from phi4r.tasks import grade_responses
from phi4r.verify.pool import VerifierPool
from phi4r.verify.sandbox import MAX_OUTPUT_BYTES, check_cases, run_program


def why_not() -> str:
    """Why no program can be run here, or ""."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (apt-get install bubblewrap)"
    try:
        run_program("", "")
    except RuntimeError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "it can")

CASES = [{"input": "3 4\n", "output": "7\n"}, {"input": "10 -2\n", "output": "8"}]
ADD = "a, b = map(int, input().split())\nprint(a + b)\n"


def problem(cases: object = CASES) -> Problem:
    return Problem(id="p", problem="Add two numbers.", answer=json.dumps(cases), task="code")


def response(program: str) -> str:
    return f"<think>Let me see.</think>\nHere it is:\n```python\n{program}```\n"


def test_programs_are_graded_by_what_they_print() -> None:
    written = {
        "right": response(ADD),
        "the last block counts": response("print(7)\n") + response(ADD).split("</think>")[1],
        "one case only": response("print(7)\n"),
        "no program": "<think>x</think> The answer is 7.",
        "a program in the think block": f"<think>\n```python\n{ADD}```\n</think>\nDone.",
        "does not compile": response("print((\n"),
        "ends early with success": response("import os\nos._exit(0)\n"),
    }
    with VerifierPool(2, 2.0) as pool:
        verdicts = grade_responses([(problem(), text) for text in written.values()], pool)
    assert dict(zip(written, (verdict.outcome for verdict in verdicts), strict=True)) == {
        "right": "correct",
        "the last block counts": "correct",
        "one case only": "wrong",
        "no program": "no_answer",
        "a program in the think block": "no_answer",
        "does not compile": "wrong",
        "ends early with success": "wrong",
    }
    assert verdicts[2].method == "case 2: another output"


@pytest.mark.parametrize("cases", ["7", [], [{"input": "3"}], [{"input": 3, "output": 7}]])
def test_an_answer_that_is_no_list_of_cases_is_named(cases: object) -> None:
    with VerifierPool(1, 2.0) as pool, pytest.raises(UserError, match=r"problem p: .* JSON list"):
        grade_responses([(problem(cases), response(ADD))], pool)


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', {port}), 2)", "Connection refused"),
        ("open('{secret}').read()", "No such file"),
        ("open('/etc/passwd').read()", "No such file"),
        ("open('/usr/planted', 'w')", "Read-only file system"),
        ("import os; os.fork()", "Operation not permitted"),
        ("import subprocess; subprocess.run(['/bin/true'])", "not permitted"),
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(9 << 20))", "File too large"),
    ],
)
def test_a_program_gets_at_nothing(attempt: str, error: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        run = run_program(attempt.format(port=server.getsockname()[1], secret=secret), "", 2.0)
    assert (run.ended, run.stdout) == ("failed", ""), run
    assert error in run.detail


def test_the_environment_and_the_expected_output_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_KEY", "secret")
    looking = (
        "import glob, os\n"
        "print(dict(os.environ), os.listdir('.'))\n"
        "for path in glob.glob('/proc/[0-9]*/cmdline') + glob.glob('/proc/[0-9]*/environ'):\n"
        "    print(path, open(path).read())\n"
    )
    run = run_program(looking, "")
    assert run.ended == "done", run
    assert "secret" not in run.stdout
    assert run.stdout.count("cmdline") <= 2  # its own and bubblewrap's


def test_threads_are_allowed() -> None:
    program = "import threading\nt = threading.Thread(target=lambda: print(input()))\nt.start(); t.join()\n"
    assert run_program(program, "hello").stdout == "hello\n"


def test_what_does_not_end_is_ended() -> None:
    assert run_program("while True: pass", "", 1.0).ended in ("out_of_time", "deadline")
    assert run_program("import time; time.sleep(1000)", "", 1.0).ended == "deadline"
    assert check_cases("import time; time.sleep(1000)", [("", "")], 0.5) == (None, "case 1: deadline")
    run = run_program("while True: print('x' * 1000)", "", 1.0)
    assert (run.ended, len(run.stdout) <= MAX_OUTPUT_BYTES) == ("failed", True)


def test_a_program_cannot_pass_for_a_failing_sandbox() -> None:
    run = run_program("import sys; sys.exit('bwrap: cannot make a sandbox')", "")
    assert (run.ended, run.detail) == ("failed", "bwrap: cannot make a sandbox")
    claims = (
        "import os, sys\n"
        "for fd in range(3, 64):\n"
        "    try: os.write(fd, b'{\"exit-code\": 0}\\n')\n"
        "    except OSError: continue\n"
        "    print('open', fd)\n"
        "sys.exit(3)\n"
    )
    run = run_program(claims, "")
    assert (run.ended, run.stdout) == ("failed", "")


def test_a_sandbox_that_cannot_be_made_is_no_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="No permissions"):
        run_program("print(7)", "")


def test_a_lone_surrogate_is_a_failed_program() -> None:
    assert run_program("print('\ud800')", "").ended == "failed"
    assert check_cases("print(7)", [("\udc80", "7")], 2.0) == (True, "all cases")


def test_all_cases_of_a_program_share_one_deadline() -> None:
    slow = "import time; time.sleep(0.6); print(7)"
    verdict, why = check_cases(slow, [("", "7")] * 12, 1.0)
    assert verdict is None
    assert why.endswith("deadline")


def test_programs_that_sleep_share_the_deadline_of_a_batch() -> None:
    sleeping = response("import time; time.sleep(1000)\n")
    with VerifierPool(2, 0.5) as pool:
        verdicts = grade_responses([(problem(), sleeping)] * 12, pool)
    assert {verdict.outcome for verdict in verdicts} == {"timeout"}
    assert "batch deadline" in {verdict.method for verdict in verdicts}
