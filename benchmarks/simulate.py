"""The simulated GRPO loop of `phi4r plan --simulate` beside the real one: vLLM servers on this machine and a
trainer of known time; appends rows to results/simulate.csv.

    python -m benchmarks.simulate [--steps 6] [--train 1.0] [--cases "MODE SERVERS, ..."]

Needs `make vllm-deps` (or PHI4R_VLLM_PYTHON). What the simulator is told is measured first, on servers that
sample answers of a fixed length: what a decoding step costs, a sequence in it, a request and a call, with one
and with all servers busy (they share this machine's cores), and the seconds of giving them weights. Then each
case runs the loop as `phi4r rl` does, on a model that ends its answers by chance, with `--train` seconds of
sleep for the training; the simulator gets the lengths of the answers, and its seconds per step are compared
with the clock's. Columns: date (UTC), commit, dirty, cpu, mode, servers, requests of a draw, slots of a
server, counted steps, train_s, sync_s (measured before), tokens of an answer (mean, sigma of the logarithm,
longest), decode_ms of a step of one sequence alone and decode_all_ms of one with all slots of all servers in
use, step_predicted_s, step_s, error (predicted / measured - 1). It fails where an error is over 15 %.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.rows import append_rows, provenance
from benchmarks.suite import require_vllm
from phi4r.configs.sections import ModelConfig, ParallelConfig, SamplingConfig, TrainConfig, VLLMConfig
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.plan.simulate import (
    ONE_STEP_OFF,
    SYNCHRONOUS,
    Loop,
    Mode,
    ServerCost,
    Servers,
    over_sampled,
    simulate,
)
from phi4r.sampling.types import Completion, SampleRequest, SamplingOptions
from phi4r.sampling.vllm.engine import VLLMEngine
from phi4r.train.engine import Engine

COLUMNS = [
    "date", "commit", "dirty", "cpu", "mode", "servers", "requests", "slots", "steps", "train_s", "sync_s",
    "mean_tokens", "sigma", "longest", "decode_ms", "decode_all_ms", "step_predicted_s", "step_s", "error",
]  # fmt: skip
LIMIT = 0.15
VOCAB, STOP_IDS = 64, (3, 4)
MODEL = ModelConfig.from_preset("tiny", vocab_size=VOCAB, max_position_embeddings=512)
HEAD_SCALE = 3.0
"""Makes some tokens much likelier than others, so that how soon an answer ends depends on how it began."""
PROMPT_TOKENS, MAX_NEW_TOKENS, SLOTS, REQUESTS = 8, 320, 16, 48
FIXED_LENGTHS = (8, 136)
WARMUP = 3
CASES = "synchronous 1, synchronous 2, ahead 2, continuous 2"
MODES = {"synchronous": SYNCHRONOUS, "ahead": ONE_STEP_OFF, "continuous": over_sampled(2)}


def requests(stream: int, count: int) -> list[SampleRequest]:
    """Prompts of random tokens, each with a random stream of its own; the same for the same arguments."""
    random = np.random.default_rng(stream)
    prompts = random.integers(5, VOCAB, (count, PROMPT_TOKENS)).tolist()
    return [SampleRequest(tuple(prompt), (31, stream, number)) for number, prompt in enumerate(prompts)]


def make_trainer() -> Engine:
    """The model behind the servers."""
    engine = Engine(MODEL, ParallelConfig(), init_layout(ParallelConfig()), TrainConfig())

    def weights(name: str) -> Any:
        return random_weights(MODEL, 7)(name) * (HEAD_SCALE if name == "lm_head.weight" else 1.0)

    load_weights(engine.models, MODEL, weights, 0, 1)
    return engine


class Bench:
    """The servers, and what was measured of them."""

    def __init__(self, engine: VLLMEngine) -> None:
        self.engine, self.members = engine, engine.fleet.members
        self.stream = 1000

    def fixed_s(self, sequences: int, length: int, servers: int) -> float:
        """Seconds in which each of so many servers samples so many answers of exactly `length` tokens."""
        fleet, options = self.engine.fleet, SamplingOptions(length)
        self.stream += 1
        made = [requests(100 * self.stream + number, sequences) for number in range(servers)]
        stops, fleet.stop_ids = fleet.stop_ids, []

        async def ask() -> None:
            members = zip(made, self.members, strict=False)
            await asyncio.gather(*(fleet.generate(one, options, only=member) for one, member in members))

        began = time.perf_counter()
        try:
            asyncio.run(ask())
        finally:
            fleet.stop_ids = stops
        return time.perf_counter() - began

    def cost(self, servers: int, repeats: int = 3) -> tuple[ServerCost, float]:
        """(cost of a server, seconds of a call): non-negative least squares of what `fixed_s` takes, relative
        errors, medians of `repeats`:
        call + request x sequences + (tokens - 1) x (fixed + sequence x sequences)."""
        rows, seconds = [], []
        for sequences in (1, SLOTS // 4, SLOTS):
            for length in FIXED_LENGTHS:
                found = np.median([self.fixed_s(sequences, length, servers) for _ in range(repeats)])
                rows.append([1, sequences, length - 1, (length - 1) * sequences])
                seconds.append(float(found))
        scaled = np.array(rows) / np.array(seconds)[:, None]
        call, request, fixed, sequence = nnls(scaled, np.ones(len(rows)))[0].tolist()
        return ServerCost(fixed_s=fixed, sequence_s=sequence, request_s=request), call

    def sync_s(self, servers: int, repeats: int = 3) -> float:
        """Median seconds of giving idle servers weights."""
        self.engine.fleet.members = self.members[:servers]
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            self.engine.sync((self.engine.version or 0) + 1)
            found.append(time.perf_counter() - began)
        return float(np.median(found))

    def run(
        self, mode: Mode, servers: int, steps: int, train_s: float
    ) -> tuple[list[float], list[list[int]]]:
        """The loop as `rl.train` and `rl.queue` run it: (seconds of each step, lengths of each batch's
        answers)."""
        engine, options = self.engine, SamplingOptions(MAX_NEW_TOKENS)
        engine.fleet.members = self.members[:servers]
        seconds, lengths = list[float](), list[list[int]]()
        num_open, ready = 0, list[list[Completion]]()

        def open_through(last: int) -> None:
            nonlocal num_open
            while num_open <= min(last, steps - 1):
                engine.open(num_open, requests(num_open, REQUESTS), options, [Completion()] * REQUESTS)
                num_open += 1

        for step in range(steps):
            began = time.perf_counter()
            if num_open > step and not mode.continuous:
                ready.append(engine.finish(step))
            engine.sync((engine.version or 0) + 1)
            open_through(step + mode.staleness if mode.continuous else step)
            found = ready.pop() if ready else engine.finish(step)
            lengths.append([len(completion.tokens) for completion in found])
            if mode.staleness and not mode.continuous:
                open_through(step + 1)
            time.sleep(train_s)
            seconds.append(time.perf_counter() - began)
        return seconds, lengths


def compare(
    bench: Bench, name: str, servers: int, costs: Sequence[ServerCost], call_s: float, options: Any
) -> dict[str, Any]:
    """Run a case and simulate it; its columns."""
    mode, steps = MODES[name], options.steps + WARMUP
    sync_s = bench.sync_s(servers)
    seconds, lengths = bench.run(mode, servers, steps, options.train)
    loop = Loop(
        mode=mode,
        servers=Servers(count=servers, costs=tuple(costs[:servers]), slots=SLOTS),
        lengths=lambda draw: lengths[draw] if draw < steps else [],
        prompt_tokens=PROMPT_TOKENS,
        train_s=lambda tokens: options.train,
        sync_s=sync_s,
        between_s=call_s,
        num_steps=steps,
        warmup=WARMUP,
    )
    predicted, measured = simulate(loop).mean_step_s, float(np.mean(seconds[WARMUP:]))
    tokens = np.concatenate(lengths)
    all_busy = costs[servers - 1]
    values = {
        "train_s": options.train, "sync_s": sync_s, "mean_tokens": tokens.mean(),
        "sigma": np.log(tokens).std(), "decode_ms": 1e3 * costs[0].step_s(1),
        "decode_all_ms": 1e3 * all_busy.step_s(SLOTS), "step_predicted_s": predicted, "step_s": measured,
        "error": predicted / measured - 1,
    }  # fmt: skip
    return {
        "mode": mode.name, "servers": servers, "requests": REQUESTS, "slots": SLOTS, "steps": options.steps,
        "longest": int(tokens.max()), **{key: f"{value:.4g}" for key, value in values.items()},
    }  # fmt: skip


def main() -> int:
    """Measure, run, simulate, print and append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="counted steps of each case")
    parser.add_argument("--train", type=float, default=1.0, help="seconds of a step's training")
    parser.add_argument("--cases", default=CASES, help="MODE SERVERS, ...")
    options = parser.parse_args()
    require_vllm(parser)
    cases = [(name, int(number)) for name, number in (case.split() for case in options.cases.split(","))]
    shared = provenance("phi4r", "benchmarks/simulate.py")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = VLLMConfig(num_servers=max(number for _, number in cases))
        sampling = SamplingConfig(engine="vllm", max_in_flight=SLOTS)
        engine = VLLMEngine(
            make_trainer(), STOP_IDS, config, sampling, Path(folder),
            max_model_len=PROMPT_TOKENS + MAX_NEW_TOKENS,
            probe_prompts=[request.prompt_tokens for request in requests(0, 2)],
        )  # fmt: skip
        try:
            engine.sync(0)
            bench = Bench(engine)
            bench.fixed_s(SLOTS, FIXED_LENGTHS[0], len(bench.members))  # the first answers take longer
            costs, call_s = list[ServerCost](), 0.0
            for number in range(1, len(bench.members) + 1):
                cost, call_s = bench.cost(number)
                costs.append(cost)
                print(
                    f"{number} busy: call {1e3 * call_s:.0f} ms, step {1e3 * cost.fixed_s:.2f} ms, sequence"
                    f" {1e3 * cost.sequence_s:.3f} ms, request {1e3 * cost.request_s:.2f} ms",
                    flush=True,
                )
            for name, number in cases:
                row = compare(bench, name, number, costs, call_s, options)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                rows.append(shared | row)
        finally:
            engine.close()
    print(f"written to {append_rows('simulate', COLUMNS, rows)}")
    wrong = [row for row in rows if not abs(float(row["error"])) <= LIMIT]
    for row in wrong:
        print(
            f"{row['mode']} with {row['servers']} server(s) is off by {float(row['error']):.1%}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
