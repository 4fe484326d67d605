"""The sentences of a report, computed from its numbers: nothing is claimed that the data do not show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi4r.evaluate.results import (
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


def findings(summaries: Mapping[str, Summary], gain: Summary | None) -> list[str]:
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
