"""Leaks of held-out problems, of every length and in every disguise that is looked for."""

import pytest

from phi4r.core.problem import Problem
from phi4r.curate.decontaminate import decontaminate

HELD = (
    "Betty is saving money for a new wallet which costs 100 dollars. Betty has only half of the money she "
    "needs. Her parents decided to give her 15 dollars for that purpose. How much more money does Betty need?"
)
OTHER = (
    "A farmer keeps 12 cows and 30 hens on the hill behind the old mill, and every morning the cows eat "
    "twice what the hens eat. How many kilograms of feed must be bought for one week?"
)


def reasons(texts: list[str], held: list[str], ngram: int = 13, mask: bool = False) -> list[str]:
    """The reason of each text's removal, "" where it stays."""
    training = [Problem(f"t{i}", text, "1") for i, text in enumerate(texts)]
    result = decontaminate(
        training, [Problem(f"h{i}", text, "1") for i, text in enumerate(held)], ngram, mask
    )
    why = {item.problem.id: item.reason for item in result.removed}
    return [why.get(problem.id, "") for problem in training]


@pytest.mark.parametrize(
    "text", [HELD, "3*7+5-9%10?", "What is love?", "7+8", "How many primes are below 100?"]
)
def test_a_copy_is_found_whatever_its_length(text: str) -> None:
    assert reasons([f"  {text} ", OTHER], [text]) == ["leak_exact", ""]


def test_a_part_of_an_arithmetic_problem_is_no_leak() -> None:
    held = ["3*7+5-9%10?", "1+2+3+4+5+6+7+8+9+10+11+12+13+14+15"]
    texts = ["2+3*7+5-9%10?", "3*7+5-9*2%10?", "0+1+2+3+4+5+6+7+8+9+10+11+12+13+14+15"]
    assert reasons(texts, held, ngram=3) == ["", "", ""]


def test_arithmetic_inside_prose_is_no_leak_either_way() -> None:
    prose = "Tom writes 1 + 2 + 3 + 4 + 5 + 6 on the board and asks his little sister for the answer"
    assert reasons([prose], ["1+2+3+4+5?"], ngram=5) == [""]
    assert reasons(["9*(1+2+3+4+5)"], [prose], ngram=5) == [""]


def test_lead_ins_do_not_hide_an_arithmetic_leak() -> None:
    assert reasons(["Compute the value of 3*7+5."], ["What is 3 * 7 + 5?"]) == ["leak_exact"]


def test_a_long_run_in_other_surroundings_is_a_leak_and_a_short_one_is_not() -> None:
    run = " ".join(HELD.split()[:14])
    assert reasons([f"Once upon a time, {run}"], [HELD]) == ["leak_ngram"]
    assert reasons([f"Once upon a time, {' '.join(HELD.split()[:9])}"], [HELD]) == [""]


def test_a_short_held_out_question_is_looked_for_whole() -> None:
    held = "What is the capital city of Peru?"
    assert reasons([f"Please think. {held} Answer briefly."], [held]) == ["leak_ngram"]
    assert reasons(["What is the capital city of Chile?"], [held]) == [""]


def test_a_copy_with_words_put_in_is_found_by_its_share_of_short_runs() -> None:
    words = HELD.split()
    padded = " ".join(
        word for i, word in enumerate(words) for word in ([word, "really"] if i % 9 == 8 else [word])
    )
    assert reasons([padded, OTHER], [HELD]) == ["leak_overlap", ""]


def test_changed_numbers_are_found_by_the_masked_pass_alone() -> None:
    held = "Each box holds 12 pens, there are 5 boxes on 3 shelves and 2 more on 4 tables in 6 rooms, total?"
    changed = (
        "Each box holds 15 pens, there are 7 boxes on 8 shelves and 3 more on 9 tables in 4 rooms, total?"
    )
    assert reasons([changed], [held]) == [""]
    assert reasons([changed, held], [held], mask=True) == ["leak_masked", "leak_exact"]


def test_the_masked_pass_leaves_pure_arithmetic_alone() -> None:
    assert reasons(["3*7+5-8%10?", "1+2+3+4+5+6+7+8"], ["3*7+5-9%10?", "1+2+3+4+5+6+7+9"], mask=True) == [
        "",
        "",
    ]


def test_a_template_shared_by_many_training_problems_is_no_leak() -> None:
    names = [f"name{letter}" for letter in "abcdefghijklmn"]
    template = "{} uses each of the numbers given below exactly once to make the target number of points"
    texts = [template.format(name) + f" {name} {i}" for i, name in enumerate(names)]
    held = [template.format("zoe") + " zoe 99"]
    assert reasons(texts, held) == [""] * len(texts)
    assert reasons(texts[:3], held) == ["leak_ngram"] * 3
    assert reasons([*texts, held[0]], held)[-1] == "leak_exact"


def test_a_removal_says_what_it_shares_with_which_held_out_problem() -> None:
    training = [Problem("t", f"Well. {HELD}", "1")]
    result = decontaminate(training, [Problem("x", OTHER, "1"), Problem("h", HELD, "1")])
    (item,) = result.removed
    assert (item.clash_id, item.clash_text) == ("h", HELD)
    assert item.detail["share_of_heldout"] == 1.0
    assert item.detail["shared"].startswith("betty is saving money for a new wallet")


def test_the_better_matching_held_out_problem_is_named() -> None:
    first = (
        " ".join(HELD.split()[:14]) + " entirely different words follow here and there to make it long enough"
    )
    result = decontaminate(
        [Problem("t", f"Well. {HELD}", "1")], [Problem("a", first, "1"), Problem("b", HELD, "1")]
    )
    assert result.removed[0].clash_id == "b"


def test_an_ngram_length_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="ngram must be at least 1"):
        decontaminate([], [], 0)
