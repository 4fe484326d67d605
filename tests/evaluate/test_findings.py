"""The sentences of the report say what the numbers say, and no more."""

import numpy as np
import pytest

from phi4r.evaluate import findings, sample_pairs
from phi4r.evaluate.results import Record, Results, SummarySettings, compare, summarise

SETTINGS = SummarySettings(bootstrap=300, permutations=2000)


def results(correct_QR: np.ndarray, tokens: int | np.ndarray = 10, **changes: object) -> Results:
    tokens_QR = np.arange(len(correct_QR))[:, None] % 3 + np.broadcast_to(tokens, correct_QR.shape)
    return Results(
        Record(
            problem_id=f"p{question:03d}",
            run=run,
            seed=run,
            correct=bool(right),
            outcome="correct" if right else str(changes.get("wrong_as", "wrong")),
            answer="1",
            num_tokens=int(tokens_QR[question, run]),
            finished=bool(changes.get("finished", True)),
            text=f"<think></think>{question}.{run}" if changes.get("texts") else None,
        )
        for (question, run), right in np.ndenumerate(correct_QR)
    )


def tell(before: Results, after: Results) -> tuple[list[str], list[str]]:
    summaries = {"SFT": summarise(before, SETTINGS), "GRPO": summarise(after, SETTINGS)}
    gain = compare(before, after, SETTINGS)
    return findings.findings(summaries, gain), findings.caveats(summaries, gain)


def draw(rate: float | np.ndarray, seed: int, num_problems: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).random((num_problems, 8)) < rate


def test_a_clear_gain_by_selection_is_called_that():
    sentences, notes = tell(results(draw(0.5, 1)), results(draw(0.95, 2), tokens=20))
    assert sentences[0].startswith("GRPO raised accuracy from ")
    assert "permutation p < 0.001" in sentences[0]
    assert sentences[1].startswith("Responses grew longer (11.0 to 21.0 tokens on average)")
    assert notes[0].startswith("What this shows: GRPO selects a mode that SFT had already taught.")


def test_a_gain_beyond_what_eight_tries_show_is_not_called_selection():
    solvable = np.arange(60)[:, None] < 30
    sentences, notes = tell(results(draw(0.9 * solvable, 3)), results(draw(0.9, 4)))
    assert "raised" in sentences[0]
    assert "more than a choice among answers" in notes[0]


def test_no_difference_is_not_told_as_a_gain():
    sentences, notes = tell(results(draw(0.5, 5)), results(draw(0.5, 6)))
    assert sentences[0].startswith("GRPO made no difference that can be told from chance")
    assert "did not clearly change in length" in sentences[1]
    assert not any("selects a mode" in note for note in notes)


def test_a_loss_of_accuracy_and_of_diversity_is_said():
    sentences, notes = tell(results(draw(0.6, 7), tokens=20), results(draw(0.15, 8)))
    assert sentences[0].startswith("GRPO lowered accuracy from ")
    assert "became shorter" in sentences[1]
    assert any("answers became less diverse" in note for note in notes)


def test_truncation_and_ungraded_answers_are_mentioned_where_they_occur():
    _, clean = tell(results(draw(0.5, 9)), results(draw(0.9, 10)))
    assert not any("cut off" in note or "verifier" in note for note in clean)
    _, notes = tell(results(draw(0.5, 9)), results(draw(0.9, 10), finished=False, wrong_as="timeout"))
    assert "100.0% of the responses after GRPO were cut off at the token limit." in notes
    assert any("could not grade" in note for note in notes)


def test_one_evaluation_is_told_alone_and_none_not_at_all():
    summaries = {"SFT": summarise(results(draw(0.5, 11)), SETTINGS)}
    assert findings.findings(summaries, None)[0].startswith("After SFT the model answers ")
    assert findings.headline(summaries, None).badge.startswith("95% CI ")
    assert (findings.findings({}, None), findings.caveats({}, None), findings.headline({}, None)) == (
        [],
        [],
        None,
    )


def test_samples_are_picked_by_rule_and_include_a_failure():
    before = np.array([[0, 0], [1, 1], [0, 1], [1, 0]], dtype=bool)
    after = np.array([[1, 1], [1, 1], [1, 1], [0, 1]], dtype=bool)
    longer = np.full(after.shape, 10)
    longer[1, 1] = 30
    pairs = sample_pairs.pick_pairs(results(before, texts=True), results(after, longer, texts=True))
    assert [(pair.before.problem_id, pair.reason) for pair in pairs] == [
        ("p000", "wrong before, right after"),
        ("p002", "wrong before, right after"),
        ("p001", "right both times, with the largest change in length"),
        ("p003", "right before, wrong after"),
    ]
    assert [(pair.before.run, pair.after.run) for pair in pairs] == [(0, 0), (0, 0), (1, 1), (0, 0)]
    assert (
        sample_pairs.pick_pairs(results(before), results(after)) == []
    )  # without texts there is nothing to show


@pytest.mark.parametrize(
    ("text", "think", "answer"),
    [
        ("<think>3*7=1</think>1", "3*7=1", "1"),
        ("<think></think> 7 ", "", "7"),
        ("<think>3*7=", "3*7=", None),
        ("7", None, "7"),
        ("3*7=1</think>1", "3*7=1", "1"),
    ],
)
def test_a_response_is_split_at_its_think_block(text: str, think: str | None, answer: str | None):
    assert sample_pairs.split_think(text) == (think, answer)


def test_rollout_rows_become_responses_with_their_reward_parts():
    row = {
        "response": "<think>a</think>b",
        "outcome": "no_answer",
        "gold": "c",
        "num_tokens": 5,
        "finished": False,
        "reward": {
            "total": -8 / 13,
            "accuracy": -1.0,
            "repetition": -0.0,
            "accuracy_source": "no_think",
            "rho": 0.1,
        },
    }
    shown = sample_pairs.response("GRPO", row)
    assert (shown.think, shown.answer, shown.verdict, shown.finished) == ("a", "b", "no answer", False)
    assert shown.reward == [("reward R", "−0.615"), ("R_acc", "−1.000"), ("R_rep", "0"), ("rule", "no_think")]
    long = sample_pairs.response("GRPO", {"text": "<think>" + "x" * 30_000 + "</think>1"})
    assert long.think.endswith("[... 10,000 more characters]")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.44, "8.4 s"), (59.6, "1 min 0 s"), (72.4, "1 min 12 s"), (7260, "2 h 1 min"), (0, "0.0 s")],
)
def test_durations_are_readable(seconds: float, text: str):
    assert findings.duration(seconds) == text
