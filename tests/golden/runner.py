"""Runs the golden cases of one layout through the command line of any phi4r source tree, and collects values.

Only `python -m phi4r`, its settings and the files it writes are used, so the same cases run on any commit;
what was renamed since 0.1.0 stands in tables below. Each rank is one process that runs one command after
another, as torchrun would start it (importing torch costs more than a case).

    run(tree, layout, cases) -> {case: [row, ...]}      rows are metrics, graded answers or log-probs
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TREE = HERE.parents[1]
CHECKPOINT = HERE / "checkpoint_0.1.0"
"""Written by commit 8169e13; GRPO, evaluation and scoring start from it."""
TIMEOUT_S = 900

Row = dict[str, Any]
Settings = Mapping[str, Any]

LAYOUTS: dict[str, Settings] = {
    "one": {},
    "tp2": {"parallel.tp": 2, "parallel.sp": True},
    "pp2": {"parallel.pp": 2},
    "cp2": {"parallel.cp": 2},
    "dp2": {"parallel.dp": 2},
    "tp2pp2": {"parallel.tp": 2, "parallel.pp": 2},
    "tp2cp2": {"parallel.tp": 2, "parallel.cp": 2},
}

ONE_STEP: Settings = {"rollout.staleness": 1}
CONTINUOUS: Settings = {"rollout.staleness": 2, "rollout.continuous": True}

SPELLINGS: list[tuple[Settings, Settings]] = [
    (ONE_STEP, {"rollout.mode": "one_step"}),
    (CONTINUOUS, {"rollout.mode": "continuous", "rollout.max_policy_lag": 2}),
]
"""(settings as 0.1.0 spells them, as later commits do)."""
RENAMED_KEYS = {
    **{f"rollout.{key}": f"sampling.{key}" for key in ("temperature", "max_new_tokens", "num_slots")},
    "rollout.max_draws": "rollout.max_prompt_batches",
    "eval.max_new_tokens": "sampling.max_new_tokens",
}
"""Key in 0.1.0 -> its name in later commits, where only the name has changed."""

MEASURED_BY_DEFAULT: Settings = {"log.ref_kl": True}
"""What 0.1.0 measured in every run of RL and later commits measure when asked to."""
RENAMED_METRICS = {
    "prompt_batches": "draws",
    "policy_lag": "staleness",
    "mean_policy_lag": "mean_staleness",
}
"""Today's name of a metric -> its name in 0.1.0, under which values are compared."""

WALL_CLOCK = ("seconds", "per_second", "mfu", "memory", "slowest", "timeline")
"""Columns of metrics.jsonl whose names have one of these words differ from run to run."""

MODEL: Settings = {
    "model.preset": "tiny", "model.num_layers": 2, "model.hidden_size": 12, "model.ffn_hidden_size": 24,
    "model.num_attention_heads": 2, "model.num_query_groups": 2, "model.head_dim": 6, "model.dtype": "fp64",
}  # fmt: skip
SFT: Settings = {
    **MODEL, "data.num_generated": 96, "data.heldout": 8, "data.seq_length": 96, "train.global_batch_size": 2,
    "train.num_steps": 4, "train.eval_every": 2, "train.logit_chunk_size": 40, "optimizer.warmup_steps": 2,
    "checkpoint.save_final": False, "checkpoint.every": 0,
}  # fmt: skip
RL: Settings = {
    **MODEL, "init.checkpoint": str(CHECKPOINT), "problems.num_generated": 16, "rollout.prompts_per_step": 4,
    "rollout.group_size": 4, "rollout.max_prompt_tokens": 24, "rollout.max_new_tokens": 40,
    "rollout.row_tokens": 96, "rollout.num_slots": 5, "objective.min_informative": 0.0, "train.num_steps": 3,
    "train.logit_chunk_size": 40, "optimizer.lr": 1e-3, "optimizer.warmup_steps": 1,
    "checkpoint.save_final": False, "checkpoint.every": 0, "reward.verifier_workers": 1,
}  # fmt: skip
EVAL: Settings = {
    "eval.runs": 2, "eval.num_problems": 8, "eval.max_new_tokens": 40, "eval.bootstrap": 100,
    "reward.verifier_workers": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One command and its settings, on top of those of its stage."""

    stage: str
    settings: Settings = field(default_factory=dict)


OFF_POLICY: Settings = {"objective.updates_per_rollout": 2, "optimizer.lr": 5e-3}
CASES: dict[str, Case] = {
    "sft": Case("sft"),
    "sft_recompute": Case("sft", {"train.recompute": "full", "parallel.distributed_optimizer": False}),
    "grpo": Case("rl"),
    "grpo_two_updates": Case(
        "rl",
        {
            **OFF_POLICY, "objective.normalization": "sequence", "objective.kl_reference": "ref",
            "objective.kl_coef": 0.1, "objective.kl_estimator": "k2", "objective.dual_clip": 3.0,
            "objective.clip_high": 0.28,
        },
    ),
    "grpo_constant": Case(
        "rl",
        {
            "objective.normalization": "constant", "objective.advantage_norm": "none",
            "objective.kl_reference": "ref", "objective.kl_estimator": "k1", "objective.entropy_coef": 0.0,
        },
    ),
    "grpo_filtered": Case(
        "rl",
        {
            "objective.advantage_norm": "batch", "objective.group_keep": 3,
            "objective.group_filter": "efficiency", "rollout.max_draws": 2, "rollout.curriculum": "pass_rate",
            "rollout.temperature": 0.8, "reward.overlong_weight": 0.5,
        },
    ),
    "gspo": Case("rl", {**OFF_POLICY, "objective.ratio": "sequence", "objective.clip_low": 0.01}),
    "cispo": Case("rl", {**OFF_POLICY, "objective.surrogate": "cispo", "objective.clip_low": 1.0}),
    "grpo_one_step": Case("rl", {**ONE_STEP, "objective.importance_cap": 2.0}),
    "grpo_continuous": Case("rl", {**CONTINUOUS, "objective.importance_cap": 2.0, "train.num_steps": 4}),
    "sft_resumed": Case("resume"),
    "eval": Case("eval"),
    "score": Case("score"),
}  # fmt: skip
DEFAULT: dict[str, tuple[str, ...]] = {
    "one": tuple(CASES),
    "tp2": ("sft", "grpo_two_updates", "eval"),
}
"""What the default test suite runs; the rest of the matrix is marked slow."""


# --- in the parent


def run(tree: Path, layout: str, cases: tuple[str, ...]) -> dict[str, list[Row]]:
    """The rows of each case, run by the phi4r of `tree`. Raises RuntimeError with a rank's output if it
    failed."""
    from benchmarks.trees import environment  # not at the top: the ranks of an older tree have no such module

    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name)
        variables = environment(tree, folder) | {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
        parallel = LAYOUTS[layout]
        num_ranks = 1
        for key in ("tp", "pp", "cp", "dp"):
            num_ranks *= parallel.get(f"parallel.{key}", 1)
        ports = _free_ports(2 * len(cases))  # a case is at most two commands
        arguments = [sys.executable, str(Path(__file__)), str(folder), layout, ",".join(cases), ports]
        ranks = []
        for rank in range(num_ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            with open(folder / f"log_{rank}", "wb") as log:
                ranks.append(
                    subprocess.Popen(
                        arguments,
                        env=variables | place,
                        cwd=tree,
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        _wait(ranks, folder, f"golden values of {layout} in {tree}")
        return {case: json.loads((folder / f"{case}.json").read_text()) for case in cases}


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, what: str) -> None:
    """Until all ranks are done, one fails, or TIMEOUT_S is over; then none is left."""
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            codes = [rank.poll() for rank in ranks]
            if any(codes) or None not in codes:
                break
            time.sleep(0.05)
    finally:
        ended = [number for number, rank in enumerate(ranks) if rank.poll()]
        running = [number for number, rank in enumerate(ranks) if rank.poll() is None]
        for rank in ranks:
            rank.kill()
            rank.communicate()
    if ended or running:
        number = (ended or running)[0]
        output = (folder / f"log_{number}").read_text(errors="replace")
        how = "failed" if ended else f"did not finish in {TIMEOUT_S} s"
        raise RuntimeError(f"{what}: rank {number} {how}\n{output[-4000:]}")


def _free_ports(count: int) -> str:
    """A port for the rendezvous of each command, as words with commas between: below the ports that systems
    hand out by themselves, so that nobody else gets them before they are used."""
    ports: list[str] = []
    for port in random.sample(range(10_000, 32_000), 2_000):
        with socket.socket() as holder, contextlib.suppress(OSError):
            holder.bind(("127.0.0.1", port))
            ports.append(str(port))
        if len(ports) == count:
            break
    return ",".join(ports)


# --- in a rank

_ports: list[str] = []
"""Rendezvous ports of the commands to come: a port that was just closed may refuse the next ones."""


def main() -> None:
    """Run the cases of the command line in this rank; rank 0 writes each one's rows."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, layout, cases, ports = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","), sys.argv[4]
    _ports.extend(ports.split(","))
    for name in cases:
        rows = _rows(CASES[name], LAYOUTS[layout], folder / name)
        if os.environ["RANK"] == "0":
            (folder / f"{name}.json").write_text(json.dumps(rows))


def _end_with_parent() -> None:
    """Nothing is ever written to the pipe that is stdin: it ends when the parent does."""
    os.read(0, 1)
    os._exit(1)


def _rows(case: Case, parallel: Settings, folder: Path) -> list[Row]:
    is_main = os.environ["RANK"] == "0"
    result = folder / "metrics.jsonl"
    if case.stage in ("sft", "rl"):
        stage = SFT if case.stage == "sft" else RL
        settings = {**stage, **parallel, **case.settings}
        _phi4r(case.stage, "tiny", "--run-dir", str(folder), *options(case.stage, settings))
    elif case.stage == "resume":
        if is_main:
            shutil.copytree(CHECKPOINT, folder.with_suffix(".copied"))
            folder.with_suffix(".copied").rename(folder)
        _wait_for(folder)
        settings = {"train.num_steps": 702, "checkpoint.save_final": False, **parallel}
        _phi4r("sft", str(CHECKPOINT), "--run-dir", str(folder), *options("sft", settings))
    elif case.stage == "eval":
        result = folder / "results.jsonl"
        settings = {**EVAL, **parallel}
        _phi4r(
            "eval", _fp64(parallel, folder), "modchain", "--run-dir", str(folder), *options("eval", settings)
        )
    else:
        given, result = folder.with_suffix(".in.jsonl"), folder.with_suffix(".out.jsonl")
        if is_main:
            tokens = [[(7 * i + 3 * j * j) % 40 for i in range(n)] for j, n in enumerate((2, 5, 17, 33))]
            part = given.with_suffix(".part")
            part.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in tokens))
            part.rename(given)
        _wait_for(given)
        _phi4r("score", _fp64(parallel, folder), str(given), str(result), *options("score", parallel))
    return [_metrics(json.loads(line)) for line in result.read_text().splitlines()] if is_main else []


def _fp64(parallel: Settings, folder: Path) -> str:
    """A checkpoint in fp64 with the weights of the one of 0.1.0: a training step at learning rate 0 saves
    it."""
    copy = folder.with_name(f"{folder.name}_fp64")
    settings = {
        **SFT,
        **parallel,
        "init.checkpoint": str(CHECKPOINT),
        "train.num_steps": 1,
        "optimizer.lr": 0.0,
    }
    settings |= {"checkpoint.save_final": True, "data.num_generated": 16}
    _phi4r("sft", "tiny", "--run-dir", str(copy), *options("sft", settings))
    return str(copy)


def _wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise RuntimeError(f"{path} did not appear in 60 s")


def _metrics(row: Row) -> Row:
    kept = {key: value for key, value in row.items() if not any(word in key for word in WALL_CLOCK)}
    return {RENAMED_METRICS.get(key, key): value for key, value in kept.items()}


def options(stage: str, settings: Settings) -> list[str]:
    """`--key=value` in the spelling of this tree."""
    known = _help(stage)
    result = dict(settings)
    for old, new in SPELLINGS:
        if all(f"{key} " in known for key in new) and {k: result.get(k) for k in _MODE_KEYS} == {
            k: old.get(k) for k in _MODE_KEYS
        }:
            result = {key: value for key, value in result.items() if key not in old} | dict(new)
    result = {key if f"{key} " in known else RENAMED_KEYS.get(key, key): v for key, v in result.items()}
    if stage == "rl":
        result |= {key: value for key, value in MEASURED_BY_DEFAULT.items() if f"{key} " in known}
    texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in result.items()}
    return [f"--{key}={text}" for key, text in texts.items()]


_MODE_KEYS = sorted({key for old, _ in SPELLINGS for key in old})


def _help(stage: str) -> str:
    """What `phi4r STAGE --help` prints: every key that this tree knows."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        _phi4r(stage, "--help")
    return text.getvalue()


def _phi4r(*words: str) -> None:
    """`python -m phi4r words` in this process."""
    sys.argv = ["phi4r", *words]
    if "--help" not in words:
        os.environ["MASTER_PORT"] = _ports.pop(0)
    try:
        runpy.run_module("phi4r", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"phi4r {' '.join(words)} ended with exit code {end.code}") from None


if __name__ == "__main__":
    main()
