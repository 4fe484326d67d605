"""The sentences of a report, computed from its numbers: nothing is claimed that the data do not show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi4r.evaluate.results import (
    OUTCOMES,
    Record,
    Results,
    gain_text,
    interval_text,
    p_value_text,
    percent,
)

Summary = Mapping[str, Any]
MODE_SELECTION_MARGIN = 0.02  # pass@k before within this of avg@k after: sampling more had already solved it


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The first thing a reader sees: one number, or a number before and after, and what they are."""

    values: list[tuple[str, str]]
    """(stage, accuracy) pairs, one or two."""
    badge: str
    """The gain, or the interval of a single accuracy."""
    caption: str


def headline(summaries: Mapping[str, Summary], gain: Summary | None) -> Headline | None:
    """The headline of these evaluations; None without any."""
    if not summaries:
        return None
    names = list(summaries)
    last = summaries[names[-1]]
    shown = [names[0], names[-1]] if gain is not None else [names[-1]]
    badge = gain_text(gain) if gain is not None else f"95% CI {interval_text(last['ci95'])}"
    caption = (
        f"avg@{last['k']}: mean accuracy on {last['num_problems']:,} held-out problems, "
        f"{_times(last['num_runs'])} each"
    )
    values = [(name, percent(summaries[name]["avg_at_k"])) for name in shown]
    return Headline(values=values, badge=badge, caption=caption)


def _times(count: int) -> str:
    return "answered once" if count == 1 else f"answered {count} times"


def story(summaries: Mapping[str, Summary], gain: Summary | None) -> list[str]:
    """What happened, in two sentences; one where there is a single evaluation, none where there is none."""
    if not summaries:
        return []
    names = list(summaries)
    first, last = summaries[names[0]], summaries[names[-1]]
    before, after = percent(first["avg_at_k"]), percent(last["avg_at_k"])
    if gain is None:
        return [
            f"After {names[-1]} the model answers {after} of {last['num_problems']:,} held-out problems "
            f"right (95% CI {interval_text(last['ci95'])}), in {last['mean_length']:.1f} tokens on average."
        ]
    if gain["ci95"][0] <= 0 <= gain["ci95"][1]:
        effect = f"{names[-1]} made no difference that can be told from chance: {before} before, {after} "
        "after,"
    else:
        verb = "raised" if gain["mean"] > 0 else "lowered"
        effect = f"{names[-1]} {verb} accuracy from {before} to {after}:"
    low, high = gain["length"]["ci95"]
    change = (
        "grew longer" if low > 0 else "became shorter" if high < 0 else "did not clearly change in length"
    )
    return [
        f"{effect} {gain_text(gain)}, paired by problem; permutation p {p_value_text(gain)}.",
        f"Responses {change} ({first['mean_length']:.1f} to {last['mean_length']:.1f} tokens on average); "
        f"{gain['num_better']:,} of {gain['num_problems']:,} problems are answered right more often than "
        f"before, {gain['num_worse']:,} less often.",
    ]


def caveats(summaries: Mapping[str, Summary], gain: Summary | None) -> list[str]:
    """What the numbers do not show, as far as the numbers themselves can tell."""
    if not summaries:
        return []
    names = list(summaries)
    last = summaries[names[-1]]
    notes = [] if gain is None else _mechanism(names, summaries, gain)
    scope = (
        f"Intervals are for new problems of the same kind, sampled afresh ({last['num_problems']:,} "
        "problems were used)."
    )
    same = last["ci95_same_problems"]
    if same is not None:
        scope += f" For a repeat on exactly these problems, {names[-1]}'s would be {interval_text(same)}."
    notes.append(scope)
    if last["two_run_gap95"]:
        notes.append(
            f"Single runs scatter: two runs of the {names[-1]} checkpoint on these problems differ by less "
            f"than {100 * last['two_run_gap95']:.1f} points 19 times in 20. Smaller gaps between single "
            "runs say nothing."
        )
    for name, summary in summaries.items():
        cut = summary["length"]["truncation_rate"]
        if cut >= 0.01:
            notes.append(f"{percent(cut)} of the responses after {name} were cut off at the token limit.")
        ungraded = sum(summary["outcomes"].get(outcome, 0) for outcome in ("timeout", "error"))
        if ungraded:
            notes.append(
                f"The verifier could not grade {ungraded:,} responses after {name} (time-out or error): "
                "they count as not correct, but are not known to be wrong."
            )
    return notes


def _mechanism(names: Sequence[str], summaries: Mapping[str, Summary], gain: Summary) -> list[str]:
    """What pass@k says about where the gain comes from."""
    (first, last), k = (names[0], names[-1]), str(gain["pass_at_k"]["k"])
    tables = [summaries[name]["pass_at_k"] for name in (first, last)]
    if k == "1" or any(k not in table for table in tables):
        return []
    before, after = (table[k]["value"] for table in tables)
    notes = []
    if gain["ci95"][0] > 0 and before >= summaries[last]["avg_at_k"] - MODE_SELECTION_MARGIN:
        notes.append(
            f"What this shows: {last} selects a mode that {first} had already taught. Before {last} the "
            f"model solved {percent(before)} of the problems at least once in {k} tries (pass@{k}); {last} "
            "made the right way of answering the usual one. It is no evidence of abilities that were not "
            "there."
        )
    elif gain["ci95"][0] > 0:
        notes.append(
            f"pass@{k} before {last} was {percent(before)}, less than the accuracy after it: the gain is "
            f"more than a choice among answers that {k} tries would have shown."
        )
    if gain["pass_at_k"]["ci95"][1] < 0:
        notes.append(
            f"pass@{k} fell from {percent(before)} to {percent(after)}: answers became less diverse, the "
            "price of sharpening."
        )
    return notes


def duration(seconds: float) -> str:
    """`72.4` -> `1 min 12 s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


# --- sample responses


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same problem before and after, and why it is shown."""

    reason: str
    before: Record
    after: Record


def pick_pairs(before: Results, after: Results) -> list[Pair]:
    """Up to four problems to show side by side, by rule and not by taste; needs results that kept their
    texts.

    Two that were wrong before and right after (the first two in the order of the set), the one with the
    largest growth in length among those right both times, and one that is wrong after: worsened if there is
    such, else still wrong.
    """
    shared = [problem_id for problem_id in before.problem_ids if problem_id in set(after.problem_ids)]
    runs = [run for run in before.runs if run in after.runs]
    rows = [
        (before.record(problem_id, run), after.record(problem_id, run))
        for run in runs
        for problem_id in shared
    ]
    rows = [(old, new) for old, new in rows if old.text is not None and new.text is not None]
    fixed = [row for row in rows if not row[0].correct and row[1].correct]
    right = sorted(
        (row for row in rows if row[0].correct and row[1].correct),
        key=lambda row: row[0].num_tokens - row[1].num_tokens,
    )
    worse = [row for row in rows if row[0].correct and not row[1].correct]
    stuck = [row for row in rows if not row[0].correct and not row[1].correct]
    chosen = [("wrong before, right after", row) for row in fixed[:2]]
    chosen += [("right both times, with the largest change in length", row) for row in right[:1]]
    if worse:
        chosen.append(("right before, wrong after", worse[0]))
    elif stuck:
        chosen.append(("wrong both times", stuck[0]))
    pairs: dict[str, Pair] = {}
    for reason, (old, new) in chosen:
        pairs.setdefault(old.problem_id, Pair(reason=reason, before=old, after=new))
    return list(pairs.values())


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response as the page shows it."""

    stage: str
    outcome: str
    think: str | None
    """Text inside the think block; None where there is no block."""
    answer: str | None
    """Text after the think block; None where the block was never closed."""
    gold: str | None
    num_tokens: int
    finished: bool
    reward: list[tuple[str, str]]

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        return {"correct": "right", "wrong": "wrong", "no_answer": "no answer"}.get(
            self.outcome, self.outcome
        )


_REWARD_LABELS = {
    "total": "reward R",
    "accuracy": "R_acc",
    "repetition": "R_rep",
    "accuracy_source": "rule",
    "advantage": "advantage",
}
_LONGEST_SHOWN = 20_000  # characters of one think block or answer


def response(stage: str, row: Mapping[str, Any]) -> Response:
    """A rollout row (`response` or `text`, `outcome`, `gold`, `num_tokens`, `finished`, `reward`?) ready to
    be shown.
    """
    text = row.get("response", row.get("text")) or ""
    think, answer = split_think(text)
    reward = row.get("reward")
    parts = reward if isinstance(reward, Mapping) else {} if reward is None else {"total": reward}
    outcome = row.get("outcome", "")
    return Response(
        stage=stage,
        outcome=outcome if outcome in OUTCOMES else str(outcome),
        think=None if think is None else _shorten(think),
        answer=None if answer is None else _shorten(answer),
        gold=row.get("gold"),
        num_tokens=int(row.get("num_tokens", 0)),
        finished=bool(row.get("finished", True)),
        reward=[(label, _value(parts[key])) for key, label in _REWARD_LABELS.items() if key in parts],
    )


def split_think(text: str) -> tuple[str | None, str | None]:
    """(text inside the think block, text after it). (None, text) without a block, (text, None) with an
    unclosed one.
    """
    head, closed, tail = text.partition("</think>")
    _, opened, inside = head.partition("<think>")
    if closed:
        return (inside if opened else head).strip(), tail.strip()
    return (inside.strip(), None) if opened else (None, text.strip())


def _shorten(text: str) -> str:
    if len(text) <= _LONGEST_SHOWN:
        return text
    return f"{text[:_LONGEST_SHOWN]}\n[... {len(text) - _LONGEST_SHOWN:,} more characters]"


def _value(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "0" if value == 0 else f"{value:+.3f}".replace("-", "\u2212")
