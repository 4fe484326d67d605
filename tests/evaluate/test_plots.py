"""Figures: what they show is in the data, and every word of them can be read."""

import io
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from phi4r.evaluate import plots
from phi4r.evaluate.results import Results, SummarySettings, summarise


@pytest.fixture(scope="module")
def summaries(results_by_stage: dict[str, Results]) -> dict[str, dict]:
    return {
        name: summarise(results, SummarySettings(bootstrap=200)) for name, results in results_by_stage.items()
    }


@pytest.fixture(scope="module")
def figures(results_by_stage: dict[str, Results], summaries: dict[str, dict]) -> dict[str, Figure]:
    sft = [{"step": i, "loss": 3 / i, "lr": 1e-3, "heldout_loss": 3 / i} for i in range(1, 90)]
    rl = [
        {"step": i, "kl_old": 0.0, "kl_ref": 1e-5 * i, "accuracy": i / 60, "logprob_gap": 1e-7 * i}
        for i in range(1, 60)
    ]
    made = {
        "sft_loss": plots.sft_loss(sft),
        "kl": plots.panel_figure(rl, plots.RL_PANELS["kl"]),
        "accuracy": plots.panel_figure(rl, plots.RL_PANELS["accuracy"]),
        "gap": plots.panel_figure(rl, plots.RL_PANELS["logprob_gap"]),
        "by_stage": plots.accuracy_by_stage(summaries),
        "run_to_run": plots.run_to_run(results_by_stage),
        "tokens": plots.accuracy_against_tokens(results_by_stage, summaries),
        "lengths": plots.length_histograms(results_by_stage),
        "pass_at_k": plots.pass_at_k_curves(summaries),
        "difficulty": plots.accuracy_by_difficulty(summaries),
        "curation": plots.curation_funnel([("dedup", 900_000, 100_000), ("decontaminate", 400_000, 500_000)]),
    }
    assert None not in made.values()
    return made


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_no_word_is_cut_off_and_no_two_labels_overlap(figures: dict[str, Figure]):
    for name, figure in figures.items():
        figure.draw_without_rendering()
        labels = []
        ticks = {text for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())}
        drawn = [text for text in figure.findobj(Text) if text.get_text() and text not in ticks]
        for text in drawn:
            box = text.get_window_extent()
            inside = (
                figure.bbox.x0 - 0.5 <= box.x0 <= box.x1 <= figure.bbox.x1 + 0.5  # half a pixel for rounding
                and figure.bbox.y0 - 0.5 <= box.y0 <= box.y1 <= figure.bbox.y1 + 0.5
            )
            assert inside, (name, text.get_text())
            if text.get_fontweight() == "bold":
                labels.append((text.get_text(), box))
        for index, (one, box) in enumerate(labels):
            for other, second in labels[index + 1 :]:
                overlap = min(box.y1, second.y1) - max(box.y0, second.y0)
                width = min(box.x1, second.x1) - max(box.x0, second.x0)
                assert not (overlap > 2 and width > 2), (name, one, other)


def test_figures_state_their_numbers_directly(figures: dict[str, Figure], summaries: dict[str, dict]):
    for name, summary in summaries.items():
        assert f"{100 * summary['avg_at_k']:.1f}%" in words(figures["by_stage"])
        assert f"{name} {100 * summary['pass_at_k']['8']['value']:.1f}%" in words(figures["pass_at_k"])
        assert any(
            f"± {100 * summary['std_over_runs']:.1f}%" in text for text in words(figures["run_to_run"])
        )
        assert f"mean {summary['mean_length']:.1f} tokens" in words(figures["lengths"])
    assert "900,000   −100,000" in words(figures["curation"])


def test_curves_draw_the_logged_values_with_gaps_left_out():
    metrics = [{"step": 3, "loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 4}]
    steps, values = plots.series(metrics, "loss")
    assert (steps.tolist(), values.tolist()) == ([1, 3], [2.0, 1.0])
    repeated = [{"step": 1, "loss": 5.0}, {"step": 1, "loss": 4.0}]
    assert plots.series(repeated, "loss")[1].tolist() == [4.0]  # a resumed run logged the step again
    line = plots.sft_loss(metrics).axes[0].lines[0]
    assert line.get_xydata().tolist() == [[1, 2.0], [3, 1.0]]


def test_smoothing_keeps_constants_and_straight_starts():
    assert plots.smooth(np.full(200, 3.0)) == pytest.approx(np.full(200, 3.0))
    ramp = np.arange(200.0)
    smoothed = plots.smooth(ramp)
    assert smoothed[:195] == pytest.approx(ramp[:195])  # symmetric windows, so no bias where the curve starts
    assert smoothed[-1] == pytest.approx(ramp[-6:].mean())
    short = np.array([1.0, 5.0])
    assert plots.smooth(short) is short


def test_what_was_not_logged_has_no_figure(summaries: dict[str, dict]):
    assert plots.sft_loss([{"step": 1, "reward": 0.5}]) is None
    assert plots.panel_figure([{"step": 1, "loss": 0.5}], plots.RL_PANELS["entropy"]) is None
    flat = {name: {**summary, "by_difficulty": []} for name, summary in summaries.items()}
    assert plots.accuracy_by_difficulty(flat) is None


def test_a_gap_of_exactly_zero_is_drawn_on_a_linear_axis():
    figure = plots.panel_figure(
        [{"step": i, "logprob_gap": 0.0} for i in range(3)], plots.RL_PANELS["logprob_gap"]
    )
    assert figure.axes[0].get_yscale() == "linear"


def test_a_stage_keeps_its_colour_whatever_stands_beside_it():
    both, all_three = plots.stage_colours(["SFT", "GRPO"]), plots.stage_colours(["base", "SFT", "GRPO"])
    assert both["GRPO"] == all_three["GRPO"] == plots.RL_PANELS["reward"].colour
    assert len(set(all_three.values())) == 3
    assert len(set(plots.stage_colours(["a", "b", "c"]).values())) == 3


def test_pictures_are_twice_the_resolution_of_the_page_and_reproducible(summaries: dict[str, dict]):
    png = plots.png_bytes(plots.accuracy_by_stage(summaries))
    assert png == plots.png_bytes(plots.accuracy_by_stage(summaries))
    image = Image.open(io.BytesIO(png))
    assert image.width == round(plots.WIDTH * 200)
    assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
