r"""The verifier on labelled answers, by category, and on long responses: rows in results/verifier.csv.

    python -m benchmarks.verifier [--workers 2] [--num-long 512] [--long-tokens 14000] [--gsm8k FILE]

The labels are in verifier_cases.jsonl, one case a line: `category`, `gold`, `correct` (a person's label: is
it the same answer?), and either `answer`, put into a \boxed{} after a short think block, or the whole
`response`; with `repeat`, that many times over. The category "gsm8k" takes each gold answer of GSM8K's file,
writes it in the ways that mean the same, and spoils it in those that do not. "strangers" are labelled answers
that nobody tuned for, from a file outside the repository (`label`, `gold`, `response`). "long" is
`--num-long` responses of `--long-tokens` tokens (4 characters each), whose answers are taken from the cases
in turn, hostile ones left out.

Columns: date (UTC), commit, dirty, cpu, workers, category, cases, accuracy (outcome "correct" exactly where
the label says so), false_positives (called correct, and is not), false_negatives (correct, and called wrong
or not found), undecided (time-outs and errors), disagreements (of the audit's second check), median_ms and
max_ms of one case, seconds of all of them in one batch, audit_seconds of the second check of them all;
alone_*: math-verify by itself, as it comes, on the same extracted answers (what is too complex or late is
undecided; empty where it was not asked: gsm8k and long). The table in docs/verifier.md is written from the
rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import RESULTS, append_rows, provenance, read_rows
from phi4r.core.console import Progress, say
from phi4r.core.io import atomic_write_text
from phi4r.verify.audit import disagrees, with_second
from phi4r.verify.extract import gold_answer
from phi4r.verify.pool import VerifierPool
from phi4r.verify.strict import SymbolicQuestion, Verdict, is_too_complex

CASES = Path(__file__).parent / "verifier_cases.jsonl"
DOCS = Path(__file__).parents[1] / "docs" / "verifier.md"
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
COLUMNS = [
    "date", "commit", "dirty", "cpu", "workers", "category", "cases", "accuracy", "false_positives",
    "false_negatives", "undecided", "disagreements", "median_ms", "max_ms", "seconds", "audit_seconds",
    "alone_false_positives", "alone_false_negatives", "alone_undecided", "alone_seconds",
]  # fmt: skip
STRANGERS = GSM8K.with_name("verifier_strangers.jsonl")
NOT_ALONE = ("gsm8k", "long")
"""Categories that math-verify alone is not asked about: minutes, or the answers of the others once more."""
ALONE_SECONDS = 300.0
UNREAD = "math_verify_unread"
CHARS_PER_TOKEN = 4
NUM_SINGLE = 64
"""Cases of a category that are timed one by one."""
AUDIT_BATCH = 512
"""Cases of an audit, whose time is limited as a whole: a step's."""

Case = dict[str, Any]


# --- cases


def boxed(answer: str) -> str:
    """A short response whose answer is `answer`."""
    return f"<think>Let me see.</think>\nThe answer is $\\boxed{{{answer}}}$."


def read_cases() -> list[Case]:
    """The labelled cases, with `response` filled in."""
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    for case in cases:
        times = case.pop("repeat", 1)
        if "answer" in case:
            case["response"] = boxed(case["answer"] * times)
        else:
            case["response"] *= times
    return cases


def same_answers(value: int) -> Iterator[str]:
    """Responses whose answer is `value`, written as people and models write it."""
    text, sign, size = str(value), "-" if value < 0 else "", abs(value)
    yield f"<think>{value - 1}</think>{text}"
    yield f"<think></think>Adding up:\n#### {text}"
    yield f"<think>{boxed('0')}</think>Not {boxed('1')}, but $\\boxed{{{text}}}$<|im_end|>"
    written = [
        text, f" {text}. ", f"{text}.0", f"{text}.00", f"${text}$", f"{sign}\\${size}", f"{sign}\\${size}.00",
        f"{text}\\%", f"{text}\\text{{ dollars}}", f"{text}\\ \\text{{eggs}}", f"{text}\\,\\mathrm{{km}}",
        f"x = {text}", f"{2 * value}/2", f"{sign}\\frac{{{3 * size}}}{{3}}", f"\\dfrac{{{4 * value}}}{{4}}",
        f"\\text{{{text}}}", f"{{{text}}}", f"{value - 1}+1", f"**{text}**",
    ]  # fmt: skip
    if size >= 1000:
        grouped = f"{value:,}"
        written += [grouped, grouped.replace(",", "{,}"), grouped.replace(",", r"\,"), f"\\${size:,}"[:99]]
        written[-1] = sign + written[-1]
    yield from map(boxed, written)


def near_misses(value: int) -> Iterator[str]:
    """Responses whose answer is almost `value`."""
    text = str(value)
    yield f"<think>{boxed(text)}</think>The answer is {text}, I think."
    wrong = [value + 1, value - 1, 10 * value if value else 10, -value if value else -1]
    if len(text.lstrip("-")) > 1:
        wrong += [int(text[:-1]), int(text[:1] + text[2:])] if value > 0 else [int(text[:-1])]
    for number in dict.fromkeys(wrong):
        if number != value:
            yield boxed(str(number))
    off = value + 1
    yield from map(
        boxed,
        (f"{off:,}", f"{text}.5", f"{text}.001", f"\\frac{{{3 * off}}}{{3}}", f"{off}/1", f"{off}\\%",
         f"\\${off}", f"{off}\\text{{ dollars}}", f"x = {off}", f"{text}, {off}",
         f"{text}x" if value else "x", f"{value}+1"),
    )  # fmt: skip


def gsm8k_cases(path: Path) -> list[Case]:
    """Every gold answer of the file once, in all renderings; none where the file is not there."""
    if not path.is_file():
        say(f"{path}: not there, so no row for gsm8k (--gsm8k FILE)")
        return []
    golds = [gold_answer(json.loads(line)["answer"]) for line in path.read_text("utf-8").splitlines()]
    return [
        {"category": "gsm8k", "gold": gold, "response": response, "correct": correct}
        for gold in dict.fromkeys(golds)
        for correct, responses in ((True, same_answers), (False, near_misses))
        for response in responses(int(gold.replace(",", "")))
    ]


def strangers_cases(path: Path) -> list[Case]:
    """The labelled answers of a file of strangers; none where the file is not there."""
    if not path.is_file():
        say(f"{path}: not there, so no row for strangers (--strangers FILE)")
        return []
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        {"category": "strangers", "gold": row["gold"], "response": row["response"], "correct": row["label"]}
        for row in rows
    ]


def long_response(response: str, num_tokens: int, seed: int) -> str:
    """`response` with a think block of about `num_tokens` tokens of arithmetic before it."""
    random = np.random.default_rng(seed)
    numbers = random.integers(2, 999, (num_tokens * CHARS_PER_TOKEN // 24, 3))
    lines = [f"so {a} + {b} is {c}, or $x_{{{a}}}$.\n" for a, b, c in numbers]
    return "<think>" + "".join(lines) + "</think>\n" + response.split("</think>")[-1]


def long_cases(cases: Sequence[Case], number: int, num_tokens: int) -> list[Case]:
    """The answers of `cases` at the end of long responses."""
    usable = [case for case in cases if "answer" in case and case["category"] != "adversarial"]
    chosen = [usable[i % len(usable)] for i in range(number)]
    return [c | {"response": long_response(c["response"], num_tokens, i)} for i, c in enumerate(chosen)]


# --- measuring


def count(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What was right and what was not."""
    pairs = [(case["correct"], verdict.outcome) for case, verdict in zip(cases, verdicts, strict=True)]
    return {
        "cases": len(cases),
        "accuracy": round(float(np.mean([label == (out == "correct") for label, out in pairs])), 4),
        "false_positives": sum(not label and out == "correct" for label, out in pairs),
        "false_negatives": sum(label and out in ("wrong", "no_answer") for label, out in pairs),
        "undecided": sum(out in ("timeout", "error") for _, out in pairs),
        "disagreements": sum(map(disagrees, verdicts)),
    }


def alone(pool: VerifierPool, cases: Sequence[Case], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts and time of math-verify by itself on the answers that were extracted."""
    pairs = [
        (case["correct"], SymbolicQuestion(gold_answer(case["gold"]), verdict.answer, "plain"))
        for case, verdict in zip(cases, verdicts, strict=True)
        if verdict.answer is not None
    ]
    asked = [(label, q) for label, q in pairs if not (is_too_complex(q.gold) or is_too_complex(q.answer))]
    began = time.perf_counter()
    found = pool.ask([question for _, question in asked], ALONE_SECONDS)
    seconds = time.perf_counter() - began
    outcomes = [(label, verdict.outcome) for (label, _), verdict in zip(asked, found, strict=True)]
    return {
        "alone_false_positives": sum(not label and out == "correct" for label, out in outcomes),
        "alone_false_negatives": sum(label and out == "wrong" for label, out in outcomes)
        + sum(label and v.method == UNREAD for (label, _), v in zip(asked, found, strict=True)),
        "alone_undecided": len(pairs)
        - len(asked)
        + sum(v.outcome in ("timeout", "error") and v.method != UNREAD for v in found),
        "alone_seconds": round(seconds, 3),
    }


def measure(pool: VerifierPool, name: str, cases: Sequence[Case]) -> tuple[dict[str, Any], list[Verdict]]:
    """Counts and times of `cases`: in one batch, the audit of it, and some one by one."""
    jobs = [(case["gold"], case["response"]) for case in cases]
    with Progress(name, len(jobs), every=max(1, len(jobs) // 4)) as progress:
        began = time.perf_counter()
        verdicts = pool.map(jobs, lambda number: progress.update(progress.done + number))
        seconds = time.perf_counter() - began
    began = time.perf_counter()
    golds = [gold for gold, _ in jobs]
    parts = [slice(first, first + AUDIT_BATCH) for first in range(0, len(jobs), AUDIT_BATCH)]
    verdicts = [v for part in parts for v in with_second(golds[part], verdicts[part], pool)]
    audit_seconds = time.perf_counter() - began
    single = []
    for job in jobs[:: max(1, len(jobs) // NUM_SINGLE)]:
        began = time.perf_counter()
        pool.map([job])
        single.append(1e3 * (time.perf_counter() - began))
    return {
        **count(cases, verdicts),
        **(alone(pool, cases, verdicts) if name not in NOT_ALONE else {}),
        "median_ms": round(float(np.median(single)), 3),
        "max_ms": round(max(single), 1),
        "seconds": round(seconds, 3),
        "audit_seconds": round(audit_seconds, 3),
    }, verdicts


def newest(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The rows of the last run of this tool."""
    return [row for row in rows if row["date"] == rows[-1]["date"]]


def table_lines(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The table of docs/verifier.md for the rows of one run."""
    names = (
        "cases", "accuracy", "false_positives", "false_negatives", "undecided", "disagreements", "median_ms",
        "max_ms", "seconds", "audit_seconds", "alone_false_positives", "alone_false_negatives",
        "alone_undecided", "alone_seconds",
    )  # fmt: skip
    head = ["category", *(name.replace("_", " ") for name in names)]
    cells = [[row["category"], *(str(row[name]) for name in names)] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (head, ["---", *["--:"] * len(names)], *cells)]


def write_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Put the rows of the last run into docs/verifier.md."""
    text = DOCS.read_text(encoding="utf-8")
    before, begin, rest = text.partition("<!-- verifier -->\n")
    _, end, after = rest.partition("<!-- /verifier -->")
    table = "".join(f"{line}\n" for line in table_lines(newest(rows)))
    atomic_write_text(DOCS, f"{before}{begin}{table}{end}{after}")


def main() -> int:
    """Measure all categories, print what went wrong, write the rows and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--num-long", type=int, default=512)
    parser.add_argument("--long-tokens", type=int, default=14_000)
    parser.add_argument("--gsm8k", type=Path, default=GSM8K, help="GSM8K's training file")
    parser.add_argument("--strangers", type=Path, default=STRANGERS, help="labelled answers of strangers")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")
    options = parser.parse_args()
    cases = read_cases()
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case["category"], []).append(case)
    if gsm8k := gsm8k_cases(options.gsm8k):
        groups["gsm8k"] = gsm8k
    if strangers := strangers_cases(options.strangers):
        groups["strangers"] = strangers
    groups["long"] = long_cases(cases, options.num_long, options.long_tokens)
    rows, common = [], {**provenance("phi4r"), "workers": options.workers}
    with VerifierPool(options.workers) as pool:
        pool.warm()
        for category, members in groups.items():
            found, verdicts = measure(pool, category, members)
            rows.append({**common, "category": category, **found})
            say("  " + ", ".join(f"{name} {value}" for name, value in found.items()))
            if category == "long":
                continue  # the answers of the other categories once more
            for case, verdict in zip(members, verdicts, strict=True):
                if case["correct"] != (verdict.outcome == "correct"):
                    end = case["response"].split("</think>")[-1][-80:]
                    say(f"  {verdict.outcome} ({verdict.method}): gold {case['gold']}, response {end!r}")
    if not options.dry_run:
        path = append_rows("verifier", COLUMNS, rows)
        write_table(read_rows(RESULTS / "verifier.csv"))
        say(f"written to {path} and {DOCS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
