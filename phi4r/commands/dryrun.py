"""What `--dry-run` prints: the resolved configuration with the origin of every value, and what the run would
do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from phi4r.configs.load import Loaded
from phi4r.configs.schema import fields_of, sections_of
from phi4r.configs.sections import ModelConfig, ParallelConfig
from phi4r.configs.stages import STAGES, RLConfig, SFTConfig, StageConfig
from phi4r.core.console import console, say
from phi4r.plan.memory import GIB, worst_stage

FILES = {
    "sft": ("config.json", "metrics.jsonl", "checkpoints/step_*/", "logs/"),
    "rl": ("config.json", "metrics.jsonl", "rollouts/step_*.jsonl", "checkpoints/step_*/", "logs/"),
    "curate": ("config.json", "problems kept and removed, with reasons", "report"),
    "eval": ("config.json", "ledger/answers_*.jsonl", "results.jsonl", "summary.json"),
    "generate": ("config.json", "ledger/answers_*.jsonl", "answers.jsonl"),
}
"""What each stage writes into its run folder."""


def toml_value(value: Any) -> str:
    """A setting as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def resolved_lines(loaded: Loaded) -> list[tuple[str, str]]:
    """The resolved configuration as TOML lines, each with who set it ("" for a default, a header or a blank
    line)."""
    config = loaded.config
    lines = [("seed = " + toml_value(config.seed), loaded.sources.get("seed", ""))]
    for name, cls in sections_of(STAGES[loaded.stage]).items():
        lines += [("", ""), (f"[{name}]", "")]
        section = getattr(config, name)
        for field in fields_of(cls).values():
            value = getattr(section, field.name)
            lines.append(
                (f"{field.name} = {toml_value(value)}", loaded.sources.get(f"{name}.{field.name}", ""))
            )
    return lines


def layout_text(parallel: ParallelConfig) -> str:
    """`8 ranks: tp 2 (with sequence parallelism) x pp 2 x cp 2 x dp 1`."""
    parts = [f"tp {parallel.tp}" + (" (with sequence parallelism)" if parallel.sp else "")]
    parts.append(f"pp {parallel.pp}" + (f" ({parallel.vpp} virtual stages each)" if parallel.vpp > 1 else ""))
    parts += [f"cp {parallel.cp}", f"dp {parallel.dp}"]
    ranks = parallel.world_size
    return f"{ranks} rank{'s' if ranks > 1 else ''}: " + " x ".join(parts)


def parameters_text(model: ModelConfig) -> str:
    """The exact number of weights, or what is known of it before the tokenizer is read."""
    if model.vocab_size:
        return f"{model.num_parameters:,}"
    # Whatever the vocabulary, its two matrices are all that is missing.
    per_token = 2 * model.hidden_size
    rest = dataclasses.replace(model, vocab_size=1).num_parameters - per_token
    return f"{rest:,} + {per_token:,} per token of the vocabulary (the tokenizer decides)"


def memory_text(config: SFTConfig | RLConfig) -> str:
    """What the fullest GPU would hold, by the plan."""
    if not config.model.vocab_size:
        return "not planned: the vocabulary comes from the tokenizer"
    memory = worst_stage(config)
    parts = sorted(memory.lines(), key=lambda line: -line[1])[:3]
    most = ", ".join(f"{name} {gib:.1f}" for name, gib in parts)
    return f"{memory.total / GIB:.1f} GiB on the fullest GPU ({most}, ...); see `phi4r plan`"


def _path_text(path: str, otherwise: str) -> str:
    if not path:
        return otherwise
    return path if Path(path).exists() else f"{path} (not there yet)"


def plan_lines(stage: str, config: StageConfig, run_dir: Path) -> list[tuple[str, str]]:
    """(what, value) lines that say what the run would do."""
    lines = [("ranks", layout_text(config.parallel))]
    if isinstance(config, SFTConfig | RLConfig):
        lines.append(("parameters", parameters_text(config.model)))
        lines.append(("starts from", _path_text(config.init.checkpoint, "random weights")))
        lines.append(("memory", memory_text(config)))
    if isinstance(config, SFTConfig):
        tokens = config.train.global_batch_size * config.data.seq_length
        generated = f"{config.data.num_generated:,} generated documents ({config.data.task})"
        lines.append(("data", _path_text(config.data.path, generated)))
        lines.append(("steps", f"{config.train.num_steps:,}"))
        rows = config.train.global_batch_size
        lines.append(("tokens per step", f"{tokens:,} ({rows:,} rows of {config.data.seq_length:,})"))
        lines.append(("tokens in all", f"{tokens * config.train.num_steps:,}"))
    elif isinstance(config, RLConfig):
        rollout = config.rollout
        samples = rollout.prompts_per_step * rollout.group_size
        longest = samples * (rollout.max_prompt_tokens + config.sampling.max_new_tokens)
        lines.append(("problems", _problems_text(config)))
        lines.append(("steps", f"{config.train.num_steps:,}"))
        how = f"{rollout.prompts_per_step:,} problems x {rollout.group_size:,}"
        lines.append(("samples per step", f"{samples:,} ({how})"))
        lines.append(("tokens per step", f"at most {longest:,}"))
    else:
        lines.append(("problems", _problems_text(config)))
    lines.append(("run folder", f"{run_dir}" + (" (exists: continues there)" if run_dir.exists() else "")))
    lines.append(("writes", ", ".join(FILES[stage])))
    return lines


def _problems_text(config: Any) -> str:
    problems = config.problems
    return _path_text(problems.path, f"{problems.num_generated:,} generated ({problems.task})")


def show(loaded: Loaded, run_dir: Path) -> None:
    """Print both; nothing is written."""
    from rich.markup import escape

    out = console()
    lines = resolved_lines(loaded)
    width = min(48, max(len(text) for text, _ in lines))
    for text, source in lines:
        origin = f"  [dim]# {escape(source)}[/dim]" if source else ""
        shown = (
            f"[bold cyan]{escape(text)}[/bold cyan]" if text.startswith("[") else escape(text.ljust(width))
        )
        out.print((shown + origin).rstrip())
    say("")
    out.print(f"[bold]phi4r {loaded.stage}[/bold] would do this (nothing is done now):")
    for what, value in plan_lines(loaded.stage, loaded.config, run_dir):
        say(f"  {what:<16} {value}")
