"""All layouts of a cluster for one run: which are legal, which fit, and which is fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from phi4r.configs.sections import ParallelConfig
from phi4r.configs.stages import RLConfig, SFTConfig, check_layout
from phi4r.core.errors import ConfigError
from phi4r.plan.hardware import Rates
from phi4r.plan.memory import FRAGMENTATION, GIB, Memory, worst_stage
from phi4r.plan.speed import StepTime, Work, model_flops_per_token, step_time, tokens_per_step

CONTEXT_RANKS = (1, 2, 4, 8)
MAX_VIRTUAL = 5
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Cluster:
    """nodes x gpus_per_node GPUs of one kind."""

    nodes: int
    gpus_per_node: int
    rates: Rates

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Of one GPU, less the margin for fragmentation."""
        return self.rates.gpu.memory_gib * GIB * (1 - FRAGMENTATION)


@dataclass(frozen=True)
class Candidate:
    """A legal layout with what it needs and how fast it is."""

    config: SFTConfig | RLConfig
    memory: Memory
    time: StepTime
    tokens_per_gpu_s: float
    """Trained tokens per second and GPU, over the whole step (RL: rollout included)."""
    mfu: float
    """Of the training part of the step."""

    def excess_gib(self, cluster: Cluster) -> float:
        """GiB beyond what is usable; negative where there is room."""
        return (self.memory.total - cluster.usable_bytes) / GIB


@dataclass
class Search:
    """The result: candidates that fit, fastest first; those that do not, closest first; and why others are
    not legal (a degree or a key -> the reason, of one
    example)."""

    fitting: list[Candidate] = field(default_factory=list)
    too_big: list[Candidate] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def legal_tp(config: SFTConfig | RLConfig, cluster: Cluster) -> tuple[list[int], dict[str, str]]:
    """(tensor-parallel degrees that the model and the nodes allow, why the other divisors of the KV heads are
    not)."""
    legal, refused = [], {}
    heads = config.model.num_query_groups
    for tp in (n for n in range(1, heads + 1) if heads % n == 0):
        try:
            check_layout(config.model, ParallelConfig(tp=tp))
        except ConfigError as error:
            refused[f"tp {tp}"] = error.reason
            continue
        if cluster.gpus_per_node % tp:
            refused[f"tp {tp}"] = f"{tp} does not divide the {cluster.gpus_per_node} GPUs of a node"
        else:
            legal.append(tp)
    return legal, refused


def cuts(config: SFTConfig | RLConfig, cluster: Cluster, degrees: list[int]) -> Iterator[dict[str, Any]]:
    """Every cut of the cluster into tp x pp x cp x dp with all GPUs in use and tp x cp inside a node."""
    gpus, num_layers = cluster.gpus, config.model.num_layers
    for tp in degrees:
        for cp in (n for n in CONTEXT_RANKS if cluster.gpus_per_node % (tp * n) == 0):
            for pp in (n for n in range(1, num_layers + 1) if gpus % (tp * cp * n) == 0):
                for vpp in range(1, MAX_VIRTUAL + 1) if pp > 1 else (1,):
                    if vpp == 1 or num_layers % (pp * vpp) == 0:
                        dp = gpus // (tp * cp * pp)
                        yield {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "dp": dp, "sp": tp > 1}


def search(config: SFTConfig | RLConfig, cluster: Cluster, work: Work) -> Search:
    """Tries every layout and recomputation mode; `config` says all the rest. `model.vocab_size` must be
    known."""
    degrees, refused = legal_tp(config, cluster)
    found = Search(refused=refused)
    for cut in cuts(config, cluster, degrees):
        overlap = cut["dp"] * cut["cp"] > 1
        parallel = dataclasses.replace(config.parallel, **cut, stage_layers="", overlap=overlap)
        try:
            legal = dataclasses.replace(config, parallel=parallel)
        except ConfigError as error:
            found.refused.setdefault(error.key, error.reason)
            continue
        for recompute in RECOMPUTE:
            tried = dataclasses.replace(legal, train=dataclasses.replace(config.train, recompute=recompute))
            candidate = evaluate(tried, cluster, work)
            (found.fitting if candidate.excess_gib(cluster) <= 0 else found.too_big).append(candidate)
    found.fitting.sort(key=lambda c: c.time.total)
    found.too_big.sort(key=lambda c: c.memory.total)
    return found


def evaluate(config: SFTConfig | RLConfig, cluster: Cluster, work: Work) -> Candidate:
    """Memory and speed of `config` as it is."""
    time = step_time(config, cluster.rates, cluster.gpus_per_node, work)
    tokens = tokens_per_step(config, work)
    length = work.document_tokens if isinstance(config, SFTConfig) else work.response_tokens
    flops = tokens * model_flops_per_token(config, length)
    peak = cluster.gpus * cluster.rates.gpu.peak_tflops * 1e12
    return Candidate(
        config=config,
        memory=worst_stage(config),
        time=time,
        tokens_per_gpu_s=tokens / time.total / cluster.gpus,
        mfu=flops / (time.training * peak),
    )


def layout_text(parallel: ParallelConfig) -> str:
    """`tp 2 x pp 4 (2 virtual) x cp 1 x dp 4`."""
    virtual = f" ({parallel.vpp} virtual)" if parallel.vpp > 1 else ""
    return f"tp {parallel.tp} x pp {parallel.pp}{virtual} x cp {parallel.cp} x dp {parallel.dp}"


def overrides(config: SFTConfig | RLConfig) -> list[str]:
    """The settings that make a recipe into `config`'s layout, as words of the command line."""
    p = config.parallel
    words = [f"--parallel.{name} {getattr(p, name)}" for name in ("tp", "pp", "vpp", "cp", "dp")]
    words += [f"--parallel.{name} {str(getattr(p, name)).lower()}" for name in ("sp", "overlap")]
    return [*words, f"--train.recompute {config.train.recompute}"]


def explain(found: Search, cluster: Cluster) -> str:
    """Why the first of the candidates that fit is first, in a sentence."""
    best = found.fitting[0]
    p, room = best.config.parallel, -best.excess_gib(cluster)
    mode = {
        "none": "without recomputation",
        "selective": "recomputing attention",
        "full": "recomputing layers",
    }
    text = f"{layout_text(p)} {mode[best.config.train.recompute]} leaves {room:.0f} GiB of each GPU free"
    for other in found.fitting[1:]:
        o = other.config.parallel
        if (o.tp, o.pp, o.cp) == (p.tp, p.pp, p.cp):
            continue
        gaps = {
            f.name: getattr(other.time, f.name) - getattr(best.time, f.name)
            for f in dataclasses.fields(StepTime)
        }
        worst = max(gaps, key=lambda name: gaps[name])
        slower = other.time.total / best.time.total - 1
        text += (
            f"; {layout_text(o)}, the next one, is {slower:.1%} slower, most of it {worst.replace('_', ' ')}"
        )
        break
    return text
