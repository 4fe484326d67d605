"""The raw pool of the quick start: generated problems with the defects that real raw data has, in known
numbers.

Each row of the pool is drawn by counters from the seed, so the same arguments give the same bytes. Shares
of the rows (`DEFECT_SHARES`) are spoilt: copies with other spacing, held-out problems that leaked, wrong
answers, and lines that are not rows. What was planted where is returned beside the rows, never in them:
curation has to find it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from phi4r.core.errors import UserError
from phi4r.core.io import JsonlWriter, atomic_write_json, atomic_write_text
from phi4r.core.problem import Problem
from phi4r.data.records import problem_row
from phi4r.tasks.base import CounterStream, Task

DEFECT_SHARES = {"duplicate": 0.05, "leak": 0.01, "wrong_answer": 0.03, "malformed": 0.01}
"""Share of the rows with each defect."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One planted defect: `line` is 1-based in the raw file, `source` the id of the row or held-out
    problem copied."""

    line: int
    id: str
    defect: str
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class RawPool:
    """`lines` are raw JSONL lines, some malformed on purpose; `planted` lists every defect in line order."""

    lines: list[str]
    planted: list[Planted]

    def write(self, raw_path: Path) -> None:
        """Write the raw lines, and beside them NAME.planted.json with what was planted."""
        atomic_write_json(raw_path.with_suffix(".planted.json"), [asdict(item) for item in self.planted])
        atomic_write_text(raw_path, "".join(line + "\n" for line in self.lines))


def generate_heldout(
    task: Task, seed: int, count: int, difficulty_min: int = 0, difficulty_max: int = 0
) -> list[Problem]:
    """`count` distinct held-out problems from a stream of their own; a repeat within the stream is passed
    over.

    A bound of 0 is the task's own. Raises UserError if the range does not hold `count` different problems.
    """
    difficulty = difficulty_range(task, difficulty_min, difficulty_max)
    stream = _stream_seed(task, seed, "heldout")
    problems: dict[str, Problem] = {}
    for index in range(20 * count + 1000):
        if len(problems) == count:
            break
        problem = task.generate(stream, index, difficulty)
        name = f"{task.name}-heldout-{len(problems):05d}"
        problems.setdefault(problem.problem, replace(problem, id=name))
    if len(problems) < count:
        raise UserError(
            f"curate.num_heldout: task {task.name} gives only {len(problems)} different problems of "
            f"difficulty {difficulty[0]} to {difficulty[1]}, {count} were asked for"
        )
    return list(problems.values())


def difficulty_range(task: Task, low: int, high: int) -> tuple[int, int]:
    """(low, high) with the task's own bounds where one is 0, the other bound permitting."""
    own_low, own_high = task.default_range
    return low or min(own_low, high or own_low), high or max(own_high, low)


def generate_raw_pool(
    task: Task,
    seed: int,
    count: int,
    heldout: Sequence[Problem],
    difficulty_min: int = 0,
    difficulty_max: int = 0,
    skip_share: float | None = None,
    shares: dict[str, float] | None = None,
) -> RawPool:
    """`count` raw lines; `skip_share` of the traces skip the working (None: the task's default), `shares` as
    `DEFECT_SHARES`.

    round(share x count) rows get each defect: a `duplicate` copies an earlier clean row with other spacing
    and another trace, a `leak` copies a held-out problem likewise, a `wrong_answer` has the answer and
    solution of another problem, a `malformed` line is cut off, or lacks a field, or has one of the wrong
    type. All other rows are clean, though problems of a small range repeat by nature.
    """
    kinds = _layout(seed, count, DEFECT_SHARES if shares is None else shares, bool(heldout))
    difficulty = difficulty_range(task, difficulty_min, difficulty_max)
    stream = _stream_seed(task, seed, "pool")
    lines: list[str] = []
    planted: list[Planted] = []
    clean: list[Problem] = []
    for index, kind in enumerate(kinds):
        random = CounterStream("curate", "row", seed, index)
        problem = task.generate(stream, index, difficulty)
        source = ""
        if kind in ("duplicate", "leak"):
            problem = random.choice(clean if kind == "duplicate" else heldout)
            source = problem.id
        think, final = task.trace(problem, stream, index, skip_share)
        name = f"{task.name}-{index:06d}"
        row = replace(problem, id=name, task=task.name, trace=think, solution=final, meta={})
        if kind in ("duplicate", "leak"):
            row = replace(row, problem=respace(row.problem, random))
        elif kind == "wrong_answer":
            wrong = _wrong_answer(task, problem, stream, index, difficulty)
            row = replace(row, answer=wrong, solution=wrong)
        elif kind == "clean":
            clean.append(row)
        lines.append(_malformed(row, random.below(4)) if kind == "malformed" else _line(row))
        if kind != "clean":
            planted.append(Planted(line=index + 1, id=name, defect=kind, source=source))
    return RawPool(lines=lines, planted=planted)


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Problem rows as JSONL, atomically, in the form `records.load_problems` reads."""
    with JsonlWriter(path) as writer:
        for problem in problems:
            writer.write(problem_row(problem))


def respace(text: str, random: CounterStream) -> str:
    """The same text with other white space: round symbols, longer where there was some, at the ends.

    No word or number is cut in two, and the result is never equal to `text`.
    """
    spaced = re.sub(
        r"[^\w\s]| ", lambda match: " " * random.below(2) + match[0] + " " * random.below(2), text
    )
    return spaced + " " if spaced == text else spaced


def _layout(seed: int, count: int, shares: dict[str, float], any_heldout: bool) -> list[str]:
    """The kind of every row, shuffled; the first row is clean so that every duplicate has something to
    copy."""
    kinds: list[str] = []
    for kind, share in shares.items():
        if kind not in DEFECT_SHARES or not 0 <= share < 1:
            raise ValueError(f"expected shares in [0, 1) of {', '.join(DEFECT_SHARES)}, got {kind}={share}")
        if kind != "leak" or any_heldout:
            kinds += [kind] * round(share * count)
    if len(kinds) >= count:
        raise ValueError(f"{len(kinds)} of {count} rows would be defects: at least one has to be clean")
    shuffled = CounterStream("curate", "layout", seed).shuffled(kinds + ["clean"] * (count - len(kinds)))
    first = shuffled.index("clean")
    shuffled[0], shuffled[first] = shuffled[first], shuffled[0]
    return shuffled


def _wrong_answer(task: Task, problem: Problem, stream: int, index: int, difficulty: tuple[int, int]) -> str:
    """The answer of the next problem of the stream that is not an answer to this one."""
    for offset in range(1, 1000):
        other = task.generate(stream, index + offset, difficulty).answer
        if not task.check(problem, other):
            return other
    raise ValueError(f"task {task.name}: a thousand answers and none of them wrong for {problem.problem!r}")


def _malformed(row: Problem, kind: int) -> str:
    """A line that no reader can make a row of."""
    line, fields = _line(row), problem_row(row)
    if kind == 0:  # the writer died
        return line[: len(line) // 2]
    if kind == 1:
        fields.pop("answer")
    elif kind == 2:
        fields["answer"] = [row.answer]
    else:
        fields["problem"] = ""
    return json.dumps(fields, ensure_ascii=False)


def _line(row: Problem) -> str:
    return json.dumps(problem_row(row), ensure_ascii=False)


def _stream_seed(task: Task, seed: int, name: str) -> int:
    """The seed of a problem stream that nothing else draws from."""
    return CounterStream("curate", name, task.name, seed).bits() >> 1
