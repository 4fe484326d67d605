"""`phi4r quickstart`: the whole pipeline on a tiny Phi-4, from one recipe, into one folder.

    curate -> SFT -> evaluate -> curate by the SFT model's pass rate -> GRPO -> evaluate -> report

Each stage is the same function that its own command calls, leaves its run folder under D, and resumes:
starting the quick start again with the same folder goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi4r.configs.load import load_pipeline, prepare_run_dir
from phi4r.configs.sections import InitConfig, ProblemsConfig
from phi4r.configs.stages import CurateConfig, EvalConfig, RLConfig, SFTConfig
from phi4r.core.console import console, say
from phi4r.core.io import atomic_write_json
from phi4r.evaluate.report import Report, ReportInputs, build_report
from phi4r.evaluate.results import SummarySettings, summary_table
from phi4r.parallel.launch import find_target, run_handler
from phi4r.train.folders import find_latest

RECIPE = "tiny"


@dataclass
class Pipeline:
    """The stages' configurations, wired to each other's folders under `folder`."""

    folder: Path
    curate_sft: CurateConfig
    sft: SFTConfig
    curate_rl: CurateConfig
    rl: RLConfig
    eval: EvalConfig
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def heldout(self) -> Path:
        """The problems that no stage trains on, made by the first curation."""
        return self.folder / "curate_sft" / "heldout.jsonl"


def wire(folder: Path, overrides: Sequence[str]) -> Pipeline:
    """Load the recipe's stages with `overrides` and point each at what the stage before it leaves."""
    stages: dict[str, Any] = {
        name: loaded.config for name, loaded in load_pipeline(RECIPE, overrides).items()
    }
    curate, sft, rl, evaluation = stages["curate"], stages["sft"], stages["rl"], stages["eval"]
    replace = dataclasses.replace
    if not any(word.startswith("parallel.") for word in overrides):
        sft, rl = use_cores(sft), use_cores(rl)
    # SFT learns from the task's own range; RL is offered a wider one, and the pass rate chooses.
    curate_sft = replace(
        curate,
        problems=ProblemsConfig(task=sft.data.task, num_generated=sft.data.num_generated),
        curate=replace(curate.curate, num_heldout=evaluation.eval.num_problems),
    )
    heldout = str(folder / "curate_sft" / "heldout.jsonl")
    curate_rl = replace(
        curate,
        seed=curate.seed + 1_000_000,  # a pool of its own: the streams of problems are fixed by the seed
        curate=replace(curate.curate, checkpoint=str(folder / "sft"), heldout_path=heldout),
    )
    sft = replace(sft, data=replace(sft.data, path=str(folder / "curate_sft" / "curated.jsonl")))
    rl = replace(
        rl,
        init=InitConfig(checkpoint=str(folder / "sft")),
        problems=replace(rl.problems, path=str(folder / "curate_rl" / "curated.jsonl")),
    )
    evaluation = replace(evaluation, problems=replace(evaluation.problems, path=heldout))
    return Pipeline(folder, curate_sft, sft, curate_rl, rl, evaluation)


def use_cores(config: Any) -> Any:
    """An SFT or RL config with a second data-parallel rank where there is a second CPU core: the losses, sums
    over tokens divided by their counts, stay the same. On a GPU the models are in fp32, because megatron-core
    has no fp64 there.
    """
    # torch takes a second to import, and only a run needs to know.
    import torch

    if torch.cuda.is_available():
        return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="fp32"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2 or config.train.global_batch_size % 2:
        return config
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, dp=2))


def main(run_dir: Path, seed: int, overrides: list[str]) -> None:
    """Run what is not done yet and write D/report.html and D/summary.json. overrides: `section.key=value`."""
    pipeline = wire(run_dir, [f"seed={seed}", *overrides])
    seconds = pipeline.seconds
    steps: list[tuple[str, str, Callable[[], None]]] = [
        (
            "curate_sft",
            "curate: clean the raw pool",
            lambda: curate(pipeline.curate_sft, run_dir / "curate_sft"),
        ),
        (
            "sft",
            "SFT: copy the teacher's traces",
            lambda: train("phi4r.train.sft:main", pipeline.sft, run_dir / "sft"),
        ),
        ("eval_sft", "evaluate the SFT model", lambda: evaluate(pipeline, "sft")),
        (
            "curate_rl",
            "curate: keep the teachable problems",
            lambda: curate(pipeline.curate_rl, run_dir / "curate_rl"),
        ),
        (
            "rl",
            "GRPO: find out that thinking pays",
            lambda: train("phi4r.rl.train:main", pipeline.rl, run_dir / "rl"),
        ),
        ("eval_rl", "evaluate the GRPO model", lambda: evaluate(pipeline, "rl")),
    ]
    for number, (name, title, run) in enumerate(steps, start=1):
        say(f"\n[{number}/{len(steps)}] {title}")
        began = time.perf_counter()
        run()
        seconds[name] = _accumulate(run_dir, name, time.perf_counter() - began)
    began = time.perf_counter()
    report = write_report(pipeline, seed, overrides)
    seconds["report"] = time.perf_counter() - began
    summary = summarise(pipeline, report)
    atomic_write_json(run_dir / "summary.json", summary)
    show(summary, report)


def _accumulate(run_dir: Path, name: str, seconds: float) -> float:
    """Seconds of a stage over all starts of this quick start, kept in D/seconds.json."""
    path = run_dir / "seconds.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = known.get(name, 0.0) + seconds
    atomic_write_json(path, known)
    return float(known[name])


def curate(config: CurateConfig, folder: Path) -> None:
    """Curation, in this process; it starts ranks where it needs a model."""
    find_target("phi4r.curate.run:main")(config, folder)


def train(target: str, config: SFTConfig | RLConfig, folder: Path) -> None:
    """A training stage, unless its last checkpoint is there already."""
    prepare_run_dir(config, folder)
    latest = find_latest(folder)
    if latest is not None and latest.name == f"step_{config.train.num_steps:06d}":
        say(f"done already: {latest}")
        return
    run_handler(target, [config, folder], config.parallel, folder)


def evaluate(pipeline: Pipeline, stage: str) -> None:
    """Evaluate the checkpoint of `stage`, unless its summary is there already."""
    folder = pipeline.folder / f"eval_{stage}"
    if (folder / "summary.json").exists():
        say(f"done already: {folder}")
        return
    prepare_run_dir(pipeline.eval, folder)
    arguments = [pipeline.eval, str(pipeline.folder / stage), folder]
    run_handler("phi4r.evaluate.run:main", arguments, pipeline.eval.parallel, folder)


# --- what comes out


def write_report(pipeline: Pipeline, seed: int, overrides: Sequence[str]) -> Report:
    """D/report.html from the stages' folders."""
    folder, model = pipeline.folder, pipeline.rl.model
    cleaned = json.loads((folder / "curate_sft" / "curation_report.json").read_text(encoding="utf-8"))
    raw, kept = cleaned["stages"][0], cleaned["stages"][-1]
    inputs = ReportInputs(
        title="phi4r quick start",
        description=(
            "Phi-4-reasoning's pipeline in miniature: a tiny Phi-4 learns left-to-right arithmetic from"
            " traces of which half skip the working, then GRPO rewards right answers."
        ),
        facts={
            "Task": pipeline.sft.data.task,
            "Model": f"{model.num_layers} layers, {model.hidden_size} wide, {model.dtype}",
            "SFT data": f"{kept['kept']:,} of {raw['before']:,} raw rows kept",
        },
        sft_metrics=folder / "sft" / "metrics.jsonl",
        rl_metrics=folder / "rl" / "metrics.jsonl",
        evals={"SFT": folder / "eval_sft" / "results.jsonl", "GRPO": folder / "eval_rl" / "results.jsonl"},
        curation=folder / "curate_rl" / "curation_report.json",
        config=folder / "rl" / "config.json",
        commands=[" ".join(["phi4r quickstart", f"--seed {seed}", *(f"--{o}" for o in overrides)])],
        seconds=pipeline.seconds,
        settings=SummarySettings(bootstrap=pipeline.eval.eval.bootstrap, seed=seed),
    )
    return build_report(inputs, folder)


def summarise(pipeline: Pipeline, report: Report) -> dict[str, Any]:
    """D/summary.json: {"sft", "grpo": {"avg_at_8", "ci95", "mean_length"}, "gain": {"mean", "ci95"},
    "seconds", "report"}."""
    k = pipeline.eval.eval.runs

    def brief(name: str) -> dict[str, Any]:
        summary = report.summaries[name]
        return {
            f"avg_at_{k}": summary["avg_at_k"],
            "ci95": summary["ci95"],
            "mean_length": summary["mean_length"],
        }

    assert report.gain is not None
    seconds = {**pipeline.seconds, "total": sum(pipeline.seconds.values())}
    return {
        "sft": brief("SFT"),
        "grpo": brief("GRPO"),
        "gain": {"mean": report.gain["mean"], "ci95": report.gain["ci95"]},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "report": str(report.path),
    }


def show(summary: dict[str, Any], report: Report) -> None:
    """The closing table."""
    console().print()
    console().print(summary_table(report.summaries, report.gain), soft_wrap=False)
    say(f"report: {summary['report']}    numbers: {Path(summary['report']).parent / 'summary.json'}")
