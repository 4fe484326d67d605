"""`phi4r plan RECIPE`: the layouts of a cluster for a recipe, ranked, with the command for the best."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from phi4r.configs.load import Loaded
from phi4r.configs.stages import RLConfig, SFTConfig
from phi4r.core.console import say
from phi4r.core.errors import UserError
from phi4r.plan import split
from phi4r.plan.hardware import find_gpu, load_rates
from phi4r.plan.search import Candidate, Cluster, Search, explain, layout_text, overrides, search
from phi4r.plan.speed import Work, tokens_per_step

DAY_S = 86_400


@dataclass(frozen=True)
class Options:
    """The command's own options; 0 means: taken from the recipe."""

    nodes: int = field(default=4, metadata={"min": 1})
    """Nodes"""
    gpus_per_node: int = field(default=8, metadata={"min": 1})
    """GPUs of a node"""
    gpu: str = field(default="h100", metadata={"metavar": "h100|h200"})
    """Kind of GPU"""
    tokens: float = field(default=0.0, metadata={"min": 0})
    """Tokens to train on (0: train.num_steps decides)"""
    document_tokens: int = field(default=0, metadata={"min": 0})
    """Mean length of documents (0: one fills a row)"""
    response_tokens: int = field(default=0, metadata={"min": 0})
    """Mean response of RL (0: a quarter of the longest)"""
    limit: int = field(default=8, metadata={"min": 1})
    """Layouts to list"""
    simulate: bool = False
    """RL with vLLM servers: simulate modes and splits of the nodes"""
    sync_seconds: float = field(default=0.0, metadata={"min": 0})
    """Weights to the servers (0: an estimate)"""
    plot: str = field(default="", metadata={"metavar": "FILE"})
    """Draw the simulation, as PNG, SVG or PDF"""


def the_work(config: SFTConfig | RLConfig, options: Options) -> Work:
    """Mean lengths: the options', else one document per row and responses of a quarter of the longest."""
    if isinstance(config, SFTConfig):
        return Work(options.document_tokens or config.data.seq_length, 0)
    response = options.response_tokens or config.sampling.max_new_tokens // 4
    return Work(options.document_tokens or response, response)


def num_steps(config: SFTConfig | RLConfig, work: Work, tokens: float) -> float:
    """Steps of the run: for a budget of tokens, or `train.num_steps`."""
    return tokens / tokens_per_step(config, work) if tokens else float(config.train.num_steps)


def prepare(loaded: Loaded, options: Options) -> tuple[SFTConfig | RLConfig, Cluster]:
    """The recipe with a neutral layout, and the cluster. UserError for a stage without training or an unknown
    vocabulary."""
    config = loaded.config
    if not isinstance(config, SFTConfig | RLConfig):
        raise UserError(f"plan: expected a recipe of sft or rl, got {loaded.stage}")
    if config.model.vocab_size == 0:
        raise UserError(
            "plan: model.vocab_size is 0 (taken from the tokenizer): set it with --model.vocab_size N"
        )
    if options.nodes < 1 or options.gpus_per_node < 1:
        raise UserError("plan: --nodes and --gpus-per-node must be at least 1")
    gpu = find_gpu(options.gpu)
    cluster = Cluster(options.nodes, options.gpus_per_node, load_rates(gpu))
    # Only whether it fits differs between layouts, not what the recipe's own layout says.
    neutral = dataclasses.replace(config.parallel, tp=1, pp=1, vpp=1, cp=1, dp=1, sp=False)
    return dataclasses.replace(config, parallel=neutral), cluster


def plan(loaded: Loaded, options: Options) -> tuple[Search, Cluster, Work]:
    """The search behind the command."""
    config, cluster = prepare(loaded, options)
    work = the_work(config, options)
    return search(config, cluster, work), cluster, work


def table(candidates: list[Candidate], cluster: Cluster, steps: float) -> list[str]:
    """A header and a line per candidate."""
    header = f"{'layout':<43} {'recompute':<9} {'GiB/GPU':>9} {'s/step':>8} {'tok/s/GPU':>10} {'MFU':>6}"
    lines = [f"   {header} {'days':>7}"]
    for number, c in enumerate(candidates, start=1):
        days = c.time.total * steps / DAY_S
        lines.append(
            f"{number:>2} {layout_text(c.config.parallel):<43} {c.config.train.recompute:<9}"
            f" {c.memory.total / 2**30:>9.1f} {c.time.total:>8.2f} {c.tokens_per_gpu_s:>10,.0f} {c.mfu:>6.1%}"
            f" {days:>7.1f}"
        )
    return lines


def main(loaded: Loaded, options: Options) -> None:
    """Print the plan."""
    if options.simulate or options.plot:
        simulated(loaded, options)
        return
    found, cluster, work = plan(loaded, options)
    config = loaded.config
    assert isinstance(config, SFTConfig | RLConfig)
    steps = num_steps(config, work, options.tokens)
    gpu = cluster.rates.gpu
    what = "SFT" if isinstance(config, SFTConfig) else "GRPO"
    lengths = f"documents of {work.document_tokens:,} tokens"
    if isinstance(config, RLConfig):
        lengths = f"responses of {work.response_tokens:,} tokens"
    say(
        f"{what} of {config.model.num_parameters:,} weights on {cluster.nodes} x {cluster.gpus_per_node}"
        f" {gpu.name} ({gpu.memory_gib:.1f} GiB), {steps:,.0f} steps, {lengths} on average"
    )
    say("")
    if found.fitting:
        for line in table(found.fitting[: options.limit], cluster, steps):
            say(line)
        best = found.fitting[0]
        say(f"\nbest: {explain(found, cluster)}.")
        say("\nmemory of its fullest GPU, GiB:")
        say("  " + ", ".join(f"{name} {gib:.1f}" for name, gib in best.memory.lines()))
    for reason in _misfits(found, cluster):
        say(reason)
    for name, reason in sorted(found.refused.items()):
        say(f"not legal: {name}: {reason}")
    say("\nrates:")
    for line in cluster.rates.lines():
        say(f"  {line}")
    if not found.fitting:
        raise UserError(
            "plan: no layout fits: more GPUs, larger ones, shorter rows or a smaller batch are needed"
        )
    words = " ".join(overrides(found.fitting[0].config))
    say(f"\noverrides: {words}")
    say(f"submit:    phi4r launch {loaded.stage} {loaded.recipe.name} --nodes {cluster.nodes} {words}")


def simulated(loaded: Loaded, options: Options) -> None:
    """Print how GRPO on vLLM servers shares the nodes out best; draw it where a file is named."""
    config, cluster = prepare(loaded, options)
    if not isinstance(config, RLConfig):
        raise UserError(f"plan: --simulate is for rl, got {loaded.stage}")
    growth = [options.response_tokens] if options.response_tokens else split.GROWTH
    if max(growth) >= config.sampling.max_new_tokens:
        raise UserError(
            f"plan: answers of {max(growth):,} tokens on average, but sampling.max_new_tokens is"
            f" {config.sampling.max_new_tokens:,}: set --response-tokens"
        )
    found = split.plan_splits(config, cluster, growth, options.sync_seconds)
    for line in split.lines(found, config.train.num_steps):
        say(line)
    if options.plot:
        from phi4r.plan.picture import draw

        draw(found, Path(options.plot))
        say(f"\nwritten: {options.plot}")


def _misfits(found: Search, cluster: Cluster) -> list[str]:
    """For each amount of recomputation, the layout that comes closest to fitting and does not."""
    lines = []
    for recompute in ("none", "selective", "full"):
        closest = next((c for c in found.too_big if c.config.train.recompute == recompute), None)
        if closest is not None:
            largest, gib = max(closest.memory.lines(), key=lambda line: line[1])
            lines.append(
                f"does not fit, recompute {recompute}: {layout_text(closest.config.parallel)} by"
                f" {closest.excess_gib(cluster):.1f} GiB (most of it {largest}: {gib:.1f} GiB)"
            )
    return lines
