"""How the nodes of a GRPO run are best shared out between the trainer and vLLM servers, by simulation.

The trainer's step is the roofline of `speed` on its nodes' fastest layout, in proportion to the tokens of the
step; a server's step is a roofline too:

    decoding    max(weights / memory rate, 2 x weights x sequences / product rate)
                + keys and values / memory rate + launches
    prefill     2 x weights x tokens / product rate

with the rates of all GPUs of a server. What is an estimate is a constant here and is printed with the result.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from phi4r.configs.stages import RLConfig
from phi4r.core.errors import UserError
from phi4r.plan.hardware import PRODUCT_EFFICIENCY, Rates
from phi4r.plan.memory import GIB
from phi4r.plan.search import Candidate, Cluster, legal_tp, search
from phi4r.plan.simulate import (
    ONE_STEP_OFF,
    SYNCHRONOUS,
    Lengths,
    Loop,
    Mode,
    ServerCost,
    Servers,
    Simulated,
    over_sampled,
    simulate,
)
from phi4r.plan.speed import PROMPT_SHARE, Work, step_time, tokens_per_step
from phi4r.plan.states import BYTES

SIGMA = 0.8
"""Spread of the logarithm of response lengths: the longest 5% are over 3.7 times the median (estimate)."""
GROWTH = (4000, 9000, 14_000)
"""Mean response at the beginning, in the middle and at the end of the paper's run."""
MEMORY_SHARE = 0.9
"""Of a GPU, for vLLM (its default)."""
SERVER_GIB = 3.0
"""What a server needs beside weights, keys and values, on each GPU (estimate)."""
MIN_SEQUENCES = 4
"""Longest sequences whose keys and values a server must hold at least."""
LAUNCH_S = 2e-5
"""Time of launching a layer of a decoding step from a CUDA graph, with its collectives (estimate)."""
WEIGHTS_GB_S = 2.0
"""Weights from the trainer to all servers: written to a shared folder and read back (estimate)."""
DEFAULT_STALENESS = 2
MAX_SPLITS = 4
COUNTED_STEPS = 6
"""Divided by one more than the batches that are open ahead: over-sampled steps come in such turns."""


class Simulations:
    """Runs of one recipe on parts of one cluster; they share the lengths of their answers."""

    def __init__(self, config: RLConfig, cluster: Cluster, sync_s: float) -> None:
        self.config, self.cluster, self.sync_s = config, cluster, sync_s
        self._drawn: dict[tuple[int, int], list[int]] = {}

    def lengths(self, tokens: int, batch: int) -> list[int]:
        """Of a batch's answers, of `tokens` on average."""
        if (tokens, batch) not in self._drawn:
            rollout = self.config.rollout
            count = rollout.prompts_per_step * rollout.group_size
            spread = Lengths(tokens, SIGMA, self.config.sampling.max_new_tokens)
            self._drawn[tokens, batch] = spread.draw(count, self.config.seed, batch)
        return self._drawn[tokens, batch]

    def run(
        self, mode: Mode, servers: Servers, trainer: Candidate, tokens: int, record: bool = False
    ) -> Simulated:
        """One run with answers of `tokens` on average."""
        work = Work(tokens, tokens)
        training = step_time(trainer.config, self.cluster.rates, self.cluster.gpus_per_node, work).training
        per_token = training / tokens_per_step(trainer.config, work)
        warmup = mode.staleness + 1
        loop = Loop(
            mode=mode,
            servers=servers,
            lengths=lambda batch: self.lengths(tokens, batch),
            prompt_tokens=int(PROMPT_SHARE * self.config.rollout.max_prompt_tokens),
            train_s=lambda count: count * per_token,
            sync_s=self.sync_s,
            num_steps=warmup + COUNTED_STEPS,
            warmup=warmup,
        )
        return simulate(loop, record)


@dataclass(frozen=True)
class Split:
    """The nodes of trainer and servers, and what came out in each mode."""

    trainer_nodes: int
    rollout_nodes: int
    candidate: Candidate
    server_gpus: int
    servers: Servers
    results: dict[str, Simulated]

    def gpu_use(self, mode: str) -> float:
        """Share of all GPUs' time in which they train or sample."""
        found, nodes = self.results[mode], self.trainer_nodes + self.rollout_nodes
        busy = self.trainer_nodes * found.trainer_busy + self.rollout_nodes * found.rollouts_busy
        return busy / nodes

    @property
    def name(self) -> str:
        """Nodes of the trainer + nodes of the servers."""
        return f"{self.trainer_nodes} + {self.rollout_nodes}"


@dataclass(frozen=True)
class Plan:
    """splits: with answers of `tokens` on average, the fastest first by its best mode; growth: (mean tokens,
    results by mode) of the first of them."""

    runs: Simulations
    modes: list[Mode]
    tokens: int
    splits: list[Split]
    growth: list[tuple[int, dict[str, Simulated]]]

    @property
    def best_mode(self) -> str:
        """Of the first split."""
        return fastest(self.splits[0].results)


def fastest(results: dict[str, Simulated]) -> str:
    """The mode with the shortest step."""
    return min(results, key=lambda name: results[name].mean_step_s)


def make_servers(config: RLConfig, cluster: Cluster, nodes: int) -> dict[int, Servers]:
    """Servers that `nodes` nodes can be cut into, by the GPUs of each. UserError where none has room for the
    weights and a few of the longest sequences."""
    rollout, model, gpu = config.rollout, config.model, cluster.rates.gpu
    longest = rollout.max_prompt_tokens + config.sampling.max_new_tokens
    weights = model.num_parameters * BYTES[model.dtype]
    found = {}
    for tp in legal_tp(config, cluster)[0]:
        room = tp * (gpu.memory_gib * MEMORY_SHARE - SERVER_GIB) * GIB - weights
        kv_tokens = room / kv_token_bytes(config)
        if kv_tokens >= MIN_SEQUENCES * longest:
            found[tp] = Servers(
                count=nodes * cluster.gpus_per_node // tp,
                costs=(server_cost(config, cluster.rates, tp),),
                slots=config.sampling.max_in_flight,
                kv_tokens=kv_tokens,
            )
    if not found:
        raise UserError(
            f"plan: no vLLM server on a node's {gpu.name} GPUs holds the weights and {MIN_SEQUENCES}"
            f" sequences of {longest:,} tokens"
        )
    return found


def kv_token_bytes(config: RLConfig) -> int:
    """Keys and values of a token."""
    model = config.model
    return 2 * model.num_query_groups * model.head_dim * BYTES[model.dtype] * model.num_layers


def server_cost(config: RLConfig, rates: Rates, tp: int) -> ServerCost:
    """The roofline of a server of `tp` GPUs."""
    model = config.model
    width = BYTES[model.dtype]
    memory, products = tp * rates.copy.value * 1e9, tp * rates.gemm.value * 1e12 * PRODUCT_EFFICIENCY
    launches = LAUNCH_S * model.num_layers
    flops = 2 * model.num_parameters
    return ServerCost(
        fixed_s=model.num_parameters * width / memory + launches,
        compute_s=flops / products,
        context_s=kv_token_bytes(config) / memory,
        prefill_s=flops / products,
    )


def trainer_nodes(nodes: int) -> list[int]:
    """Numbers of trainer nodes to look at, at most `MAX_SPLITS`."""
    if nodes < 2:
        raise UserError(
            "plan: --simulate shares nodes out between trainer and servers: --nodes must be 2 or more"
        )
    if nodes <= MAX_SPLITS + 1:
        return list(range(1, nodes))
    return sorted({max(1, round(nodes * share)) for share in (1 / 8, 1 / 4, 3 / 8, 1 / 2)})


def plan_splits(config: RLConfig, cluster: Cluster, growth: Sequence[int], sync_s: float = 0.0) -> Plan:
    """Simulate every split in every mode. config: with a neutral layout, as for `search`; growth: mean
    responses, the splits are compared at the middle one; sync_s: 0 takes the estimate."""
    rollout = config.rollout
    modes = [SYNCHRONOUS, ONE_STEP_OFF, over_sampled(rollout.policy_lag or DEFAULT_STALENESS)]
    # The trainer's GPUs hold no keys and values.
    config = dataclasses.replace(
        config,
        sampling=dataclasses.replace(config.sampling, engine="vllm"),
        rollout=dataclasses.replace(rollout, mode="sync"),
    )
    weights = config.model.num_parameters * BYTES[config.model.dtype]
    runs = Simulations(config, cluster, sync_s or 2 * weights / (WEIGHTS_GB_S * 1e9))
    middle = growth[len(growth) // 2]
    splits = list[Split]()
    for nodes in trainer_nodes(cluster.nodes):
        fitting = search(config, dataclasses.replace(cluster, nodes=nodes), Work(middle, middle)).fitting
        if not fitting:
            continue
        best = min(fitting, key=lambda candidate: candidate.time.training)
        splits.append(_split(runs, nodes, best, middle, modes))
    if not splits:
        raise UserError("plan: the trainer fits no part of the nodes that leaves one for servers")
    splits.sort(key=lambda split: split.results[fastest(split.results)].mean_step_s)
    first = splits[0]
    grown = {middle: first.results} | {
        tokens: {mode.name: runs.run(mode, first.servers, first.candidate, tokens) for mode in modes}
        for tokens in growth
        if tokens != middle
    }
    return Plan(runs, modes, middle, splits, sorted(grown.items()))


def _split(runs: Simulations, nodes: int, trainer: Candidate, tokens: int, modes: Sequence[Mode]) -> Split:
    """The trainer on `nodes` nodes; servers of the size with which the first of `modes` is fastest."""
    left = runs.cluster.nodes - nodes
    cuts = make_servers(runs.config, runs.cluster, left)
    tried = {gpus: runs.run(modes[0], servers, trainer, tokens) for gpus, servers in cuts.items()}
    gpus = min(tried, key=lambda gpus: tried[gpus].mean_step_s)
    results = {modes[0].name: tried[gpus]}
    results |= {mode.name: runs.run(mode, cuts[gpus], trainer, tokens) for mode in modes[1:]}
    return Split(nodes, left, trainer, gpus, cuts[gpus], results)


# --- in words


def lines(plan: Plan, num_steps: float) -> list[str]:
    """The tables and the sentence."""
    first = plan.splits[0]
    spec = first.servers
    found = [
        f"simulated: {spec.slots} answers at most on a vLLM server (vllm.max_in_flight), lengths log-normal"
        f" (sigma {SIGMA}, estimate)",
        f"weights to the servers: {plan.runs.sync_s:.1f} s (--sync-seconds; else at {WEIGHTS_GB_S:g} GB/s,"
        " an estimate)",
        "",
        f"answers of {plan.tokens:,} tokens on average:",
        f"   {'nodes: trainer + servers':<25} {'mode':<22} {'s/step':>7} {'p95':>7} {'trainer':>8}"
        f" {'servers':>8} {'GPU use':>8} {'in flight':>9} {'tok/s':>8} {'age':>5}",
    ]
    for split in plan.splits:
        for name, one in split.results.items():
            servers = f"{split.name} ({split.servers.count} of {split.server_gpus} GPUs)"
            found.append(
                f"   {servers:<25} {name:<22} {one.mean_step_s:>7.1f} {one.p95_step_s:>7.1f}"
                f" {one.trainer_busy:>8.0%} {one.rollouts_busy:>8.0%} {split.gpu_use(name):>8.0%}"
                f" {one.occupancy:>9.1f} {one.tokens_per_s:>8,.0f} {one.mean_age:>5.2f}"
            )
    found += ["", f"best: {explain(plan)}", "", f"as answers grow, with {first.name} nodes, s/step:"]
    names = [mode.name for mode in plan.modes]
    found.append(f"   {'mean answer':<12}" + "".join(f" {name:>21}" for name in names))
    for tokens, results in plan.growth:
        found.append(f"   {tokens:<12,}" + "".join(f" {results[name].mean_step_s:>21.1f}" for name in names))
    means = {name: mean([results[name].mean_step_s for _, results in plan.growth]) for name in names}
    days = "".join(f" {means[name] * num_steps / 86_400:>21.2f}" for name in names)
    found.append(f"   {'days in all':<12}{days}")
    return found


def mean(values: Sequence[float]) -> float:
    """Over a run in which the value goes evenly from one to the next."""
    if len(values) == 1:
        return values[0]
    return sum((a + b) / 2 for a, b in itertools.pairwise(values)) / (len(values) - 1)


def explain(plan: Plan) -> str:
    """Why the first split and its mode are the best, in a sentence."""
    first, name = plan.splits[0], plan.best_mode
    best, synchronous = first.results[name], first.results[SYNCHRONOUS.name]
    text = f"{first.trainer_nodes} node(s) for the trainer and {first.rollout_nodes} for servers, {name}"
    text += f": {best.mean_step_s:.1f} s a step"
    if name != SYNCHRONOUS.name:
        text += f", {synchronous.mean_step_s / best.mean_step_s:.2f} times as fast as synchronous"
    if best.trainer_busy > best.rollouts_busy:
        text += f"; the trainer sets the pace (busy {best.trainer_busy:.0%} of the time)"
    else:
        text += f"; sampling sets the pace (servers busy {best.rollouts_busy:.0%} of the time)"
    if len(plan.splits) > 1:
        second = plan.splits[1]
        other = fastest(second.results)
        text += f"; next comes {second.name} nodes with {second.results[other].mean_step_s:.1f} s ({other})"
    return text + "."
