"""report.html: one self-contained page that says what was run, what came out, and how far to trust it.

Every part is optional: what was not given or not logged is left out, so a folder that holds only an SFT run,
only a GRPO run or only an evaluation gets a page too. The figures are embedded and also written as PNG files
beside the page.
"""

import base64
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from phi4r import __version__
from phi4r.core.console import say
from phi4r.core.errors import UserError
from phi4r.core.io import atomic_write_text, read_jsonl
from phi4r.evaluate import findings, plots, sample_pairs, timeline
from phi4r.evaluate.results import (
    Record,
    Results,
    SummarySettings,
    compare,
    gain_text,
    interval_text,
    p_value_text,
    percent,
    read_results,
    summarise,
)

_PACKAGES = ("torch", "megatron-core", "numpy", "scipy", "math-verify", "tokenizers", "sentencepiece")


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """What a report is made of. Paths or the data themselves; None and empty parts are left out."""

    title: str = "phi4r run"
    description: str = ""
    """One or two sentences: what was run, on what."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further rows of the "what was run" table, such as {"Model": "0.69M parameters, 3 layers"}."""
    sft_metrics: str | Path | plots.Metrics | None = None
    rl_metrics: str | Path | plots.Metrics | None = None
    evals: Mapping[str, str | Path | Results] = field(default_factory=dict)
    """Stage name -> results.jsonl, in the order of the pipeline; the last two are compared."""
    curation: str | Path | Mapping[str, Any] | None = None
    """{"stages": [{"name", "kept", "removed", "reason" | "reasons"}, ...]}."""
    rollouts: Sequence[Mapping[str, Any]] = ()
    """Rows of rollout files with a "stage" added; rows of one problem stand side by side. If empty, the
    samples are picked from the evaluations where they kept their texts."""
    reward: Callable[[Record], Mapping[str, Any]] | None = None
    """Reward parts of an evaluation record, for the samples picked from evaluations."""
    config: str | Path | Mapping[str, Any] | None = None
    commands: Sequence[str] = ()
    """Shell commands that make this run again."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    """Further caveats."""
    settings: SummarySettings = field(default_factory=SummarySettings)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A written report and the numbers in it."""

    path: Path
    figures: dict[str, Path]
    summaries: dict[str, dict[str, Any]]
    gain: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """One figure of the page."""

    name: str
    png: bytes
    alt: str
    note: str
    small: bool

    @property
    def source(self) -> str:
        """The PNG as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def build_report(inputs: ReportInputs, folder: str | Path) -> Report:
    """Write `folder`/report.html and `folder`/figures/*.png and return where they are and what they say.

    UserError, naming the file, if an input file cannot be read or evaluations are not of the same problems.
    """
    folder = Path(folder)
    evals = {
        name: source if isinstance(source, Results) else read_results(source)
        for name, source in inputs.evals.items()
    }
    summaries = {name: summarise(results, inputs.settings) for name, results in evals.items()}
    compared = {name: summaries[name] for name in list(evals)[-2:]}
    gain = None
    if len(compared) == 2:
        before, after = (evals[name] for name in compared)
        gain = compare(before, after, inputs.settings)
    sft, rl = _metrics(inputs.sft_metrics), _metrics(inputs.rl_metrics)
    stages = _curation_stages(inputs.curation)
    config = _json(inputs.config)

    pictures = {
        "sft": _sft_pictures(sft),
        "rl": _panels("rl", plots.RL_PANELS, rl) + _timeline_pictures(rl),
        "accuracy": _accuracy_pictures(evals, summaries),
        "length": _length_pictures(evals, summaries),
        "curation": _curation_pictures(stages),
    }
    figures = {}
    for picture in (picture for group in pictures.values() for picture in group):
        figures[picture.name] = folder / "figures" / f"{picture.name}.png"
        _write_bytes(figures[picture.name], picture.png)

    page = _render(
        title=inputs.title,
        description=inputs.description,
        headline=findings.headline(compared, gain),
        findings=findings.findings(compared, gain),
        facts=_facts(inputs, sft, rl, stages),
        rows=_table_rows(summaries),
        k=_common_k(summaries),
        gain=None if gain is None else _gain_rows(gain),
        pictures=pictures,
        stages=stages,
        samples=_samples(inputs, evals),
        picked=not inputs.rollouts,
        caveats=[*findings.caveats(compared, gain), *inputs.notes],
        commands=list(inputs.commands),
        seconds=", ".join(f"{name} {findings.duration(value)}" for name, value in inputs.seconds.items()),
        versions=", ".join(f"{name} {version}" for name, version in _versions()),
        system=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        seed=None if config is None else config.get("seed"),
        config=None if config is None else json.dumps(config, indent=2, ensure_ascii=False),
        settings=asdict(inputs.settings),
    )
    path = folder / "report.html"
    atomic_write_text(path, page)
    return Report(path=path, figures=figures, summaries=summaries, gain=gain)


def inputs_from_run(run_dir: str | Path, **changes: Any) -> ReportInputs:
    """The inputs found in one stage's run folder: config.json, metrics.jsonl (SFT or GRPO, told by its keys),
    results.jsonl and curation.json, whichever exist. `changes` override fields of ReportInputs.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: not a run folder")
    found: dict[str, Any] = {"title": run_dir.name}
    metrics = _metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    if metrics:
        found["rl_metrics" if any("reward" in row for row in metrics) else "sft_metrics"] = metrics
    if (run_dir / "results.jsonl").exists():
        found["evals"] = {"training": run_dir / "results.jsonl"}
    for key, name in (("config", "config.json"), ("curation", "curation.json")):
        if (run_dir / name).exists():
            found[key] = run_dir / name
    return ReportInputs(**{**found, **changes})


def main(run_dir: Path) -> None:
    """Write RUN/report.html and RUN/figures of one stage's run folder."""
    inputs = inputs_from_run(run_dir)
    if not (inputs.sft_metrics or inputs.rl_metrics or inputs.evals or inputs.curation):
        raise UserError(f"{run_dir}: neither metrics.jsonl, results.jsonl nor curation.json: nothing to draw")
    say(f"report: {build_report(inputs, run_dir).path}")


# --- reading


def _metrics(source: str | Path | plots.Metrics | None) -> plots.Metrics:
    if source is None:
        return []
    if not isinstance(source, str | Path):
        return list(source)
    rows = []
    for line_number, row in read_jsonl(source):
        if not isinstance(row.get("step"), int):
            raise UserError(f"{source}:{line_number}: 'step' must be int, got {row.get('step')!r}")
        rows.append(row)
    return rows


def _json(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if source is None:
        return None
    if not isinstance(source, str | Path):
        return dict(source)
    try:
        value = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


@dataclass(frozen=True, kw_only=True)
class _CurationStage:
    name: str
    kept: int
    removed: int
    reason: str


def _curation_stages(source: str | Path | Mapping[str, Any] | None) -> list[_CurationStage]:
    report = _json(source)
    if report is None:
        return []
    where = source if isinstance(source, str | Path) else "the curation report"
    stages = []
    for index, row in enumerate(report.get("stages", [])):
        for name in ("name", "kept", "removed"):
            if name not in row:
                raise UserError(f"{where}: stages[{index}] has no {name!r}")
        reasons = row.get("reasons")
        if isinstance(reasons, Mapping):
            reason = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in reasons.items())
        else:
            reason = str(row.get("reason", ""))
        stages.append(
            _CurationStage(
                name=row["name"], kept=int(row["kept"]), removed=int(row["removed"]), reason=reason
            )
        )
    return stages


# --- figures


def _picture(
    name: str, figure: Figure | None, alt: str, note: str = "", *, small: bool = False
) -> list[_Picture]:
    if figure is None:
        return []
    return [_Picture(name=name, png=plots.png_bytes(figure), alt=alt, note=note, small=small)]


def _sft_pictures(metrics: plots.Metrics) -> list[_Picture]:
    return _picture(
        "sft_loss",
        plots.sft_loss(metrics),
        "Training and held-out loss of SFT against the step",
        "Cross-entropy of the response tokens only; the prompt is not trained on. Faint: single steps, "
        "strong: their running mean.",
    ) + _panels("sft", plots.SFT_PANELS, metrics)


def _panels(prefix: str, panels: Mapping[str, plots.Panel], metrics: plots.Metrics) -> list[_Picture]:
    pictures = []
    for name, panel in panels.items():
        figure = plots.panel_figure(metrics, panel)
        alt = f"{panel.title} against the step"
        pictures += _picture(f"{prefix}_{name}", figure, alt, panel.note, small=True)
    return pictures


def _timeline_pictures(metrics: plots.Metrics) -> list[_Picture]:
    found = timeline.read_timeline(metrics)
    if found is None:
        return []
    alt = "When the trainer trained and when the rollout engines sampled"
    return _picture("rl_timeline", timeline.figure(found), alt, timeline.caption(found))


def _accuracy_pictures(
    evals: Mapping[str, Results], summaries: Mapping[str, Mapping[str, Any]]
) -> list[_Picture]:
    if not evals:
        return []
    several = all(summary["num_runs"] > 1 for summary in summaries.values())
    pictures = _picture(
        "accuracy",
        plots.accuracy_by_stage(summaries),
        "Accuracy by stage with 95% intervals and single runs",
        "Bars: 95% interval for new problems (hierarchical bootstrap over problems and runs). Ticks: the "
        "accuracy of each run.",
    )
    if several:
        pictures += _picture(
            "run_to_run",
            plots.run_to_run(evals),
            "Distribution of the accuracy of single runs",
            "What a single run would have reported: kernel density (Scott's bandwidth, cut to 0-100%) and "
            "the runs.",
        )
        pictures += _picture(
            "pass_at_k",
            plots.pass_at_k_curves(summaries),
            "pass@k and maj@k by stage",
            "pass@k: solved at least once in k answers, unbiased, 1 - C(n-c, k) / C(n, k). maj@k: solved by "
            "the majority of k answers. Where the first stage's pass@k is high and its accuracy is not, "
            "there is something for GRPO to select.",
        )
    pictures += _picture(
        "difficulty",
        plots.accuracy_by_difficulty(summaries),
        "Accuracy by difficulty of the problem",
        "All runs of all problems of one difficulty.",
    )
    return pictures


def _length_pictures(
    evals: Mapping[str, Results], summaries: Mapping[str, Mapping[str, Any]]
) -> list[_Picture]:
    if not evals:
        return []
    return _picture(
        "accuracy_against_tokens",
        plots.accuracy_against_tokens(evals, summaries),
        "Accuracy when responses are cut at a number of tokens",
        "Read upwards from a budget: the share of answers that are right and fit into it. Dots: accuracy at "
        "the mean length, with 95% intervals.",
    ) + _picture(
        "lengths",
        plots.length_histograms(evals),
        "Histogram of response lengths, right and wrong answers",
        "Share of all responses of the stage.",
    )


def _curation_pictures(stages: Sequence[_CurationStage]) -> list[_Picture]:
    if not stages:
        return []
    figure = plots.curation_funnel([(stage.name, stage.kept, stage.removed) for stage in stages])
    return _picture("curation", figure, "Problems left after each stage of curation")


# --- tables


def _facts(
    inputs: ReportInputs, sft: plots.Metrics, rl: plots.Metrics, stages: Sequence[_CurationStage]
) -> list[tuple[str, str]]:
    facts = list(inputs.facts.items())
    if stages:
        start = stages[0].kept + stages[0].removed
        facts.append(("Curation", f"{stages[-1].kept:,} of {start:,} problems kept"))
    for name, metrics in (("SFT", sft), ("GRPO", rl)):
        if not metrics:
            continue
        parts = [f"{len({row['step'] for row in metrics}):,} steps"]
        _, tokens = plots.series(metrics, "num_valid_tokens")
        if len(tokens):
            parts.append(f"{int(tokens.sum()):,} trained tokens")
        for key, label in (("loss", "loss"), ("heldout_loss", "held-out loss"), ("reward", "reward")):
            _, values = plots.series(metrics, key)
            if len(values) and not (name == "GRPO" and "loss" in key):
                parts.append(f"{label} {values[0]:.3f} \u2192 {values[-1]:.3f}")
        facts.append((name, ", ".join(parts)))
    if inputs.seconds:
        facts.append(("Time in all", findings.duration(sum(inputs.seconds.values()))))
    return facts


def _table_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = []
    colours = plots.stage_colours(list(summaries))
    for name, summary in summaries.items():
        k = str(summary["k"])
        spread = summary["std_over_runs"]
        rows.append(
            {
                "name": name,
                "colour": colours[name],
                "k": k,
                "avg": percent(summary["avg_at_k"]),
                "ci": interval_text(summary["ci95"]),
                "spread": "\u2013" if spread is None else f"{100 * spread:.1f}",
                "majority": percent(summary["maj_at_k"][k]["value"]),
                "passed": percent(summary["pass_at_k"][k]["value"]),
                "length": f"{summary['mean_length']:.1f}",
                "truncated": percent(summary["length"]["truncation_rate"]),
            }
        )
    return rows


def _common_k(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The number of runs where all evaluations have the same, else "k"."""
    counts = {summary["k"] for summary in summaries.values()}
    return str(counts.pop()) if len(counts) == 1 else "k"


def _gain_rows(gain: Mapping[str, Any]) -> dict[str, str]:
    length = gain["length"]
    low, high = length["ci95"]
    return {
        "gain": gain_text(gain),
        "p": p_value_text(gain),
        "t": "" if gain["t"] is None else f"{gain['t']:.1f}",
        "length": f"{length['mean']:+.1f} tokens (95% CI {low:+.1f} to {high:+.1f})",
    }


# --- samples


def _samples(inputs: ReportInputs, evals: Mapping[str, Results]) -> list[dict[str, Any]]:
    """Problems with their responses side by side: {"prompt", "reason", "responses"}."""
    if inputs.rollouts:
        groups: dict[str, dict[str, Any]] = {}
        for row in inputs.rollouts:
            group = groups.setdefault(
                row["problem_id"], {"prompt": row.get("prompt", ""), "reason": "", "responses": []}
            )
            group["responses"].append(sample_pairs.response(str(row.get("stage", "")), row))
        return list(groups.values())
    names = list(evals)[-2:]
    if len(names) < 2:
        return []
    samples = []
    for pair in sample_pairs.pick_pairs(*(evals[name] for name in names)):
        responses = []
        for stage, record in zip(names, (pair.before, pair.after), strict=True):
            row = asdict(record)
            if inputs.reward is not None:
                row["reward"] = inputs.reward(record)
            responses.append(sample_pairs.response(stage, row))
        prompt = pair.before.problem or pair.before.problem_id
        samples.append({"prompt": prompt, "reason": pair.reason, "responses": responses})
    return samples


# --- output


def _versions() -> list[tuple[str, str]]:
    versions = [("phi4r", __version__), ("Python", platform.python_version())]
    installed = {
        name: next((part.version for part in metadata.distributions(name=name)), "") for name in _PACKAGES
    }
    versions += [(name, version) for name, version in installed.items() if version]
    return versions


def _render(**values: Any) -> str:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    folder = resources.files("phi4r.evaluate") / "templates"
    style = Markup((folder / "report.css").read_text(encoding="utf-8"))
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(style=style, **values)


def _write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
