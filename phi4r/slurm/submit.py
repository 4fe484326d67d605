"""`phi4r launch`: check a recipe against the cluster, show what would be submitted, submit it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import phi4r
from phi4r.configs.load import Loaded, load_stage
from phi4r.configs.stages import STAGES, RLConfig, SFTConfig
from phi4r.core.console import say
from phi4r.core.errors import UserError
from phi4r.core.io import atomic_write_text
from phi4r.plan import check
from phi4r.plan.hardware import find_gpu
from phi4r.slurm.scheduler import ask, find_job

MAX_LEAD_S = 900
"""Longest time between the signal to save and the time limit; short jobs get a quarter of their time."""


@dataclass(frozen=True)
class LaunchRequest:
    """The options of `phi4r launch`; see its --help."""

    stage: str
    words: list[str]
    overrides: list[str]
    """`section.key=value`."""
    nodes: int = field(default=1, metadata={"min": 1})
    """Nodes of the job"""
    rollout_nodes: int = field(default=0, metadata={"min": 0})
    """rl: more nodes, for vLLM servers (a heterogeneous job)"""
    servers_per_node: int = field(default=0, metadata={"min": 0})
    """vLLM servers on a rollout node (0: one a GPU)"""
    time: str = field(default="", metadata={"metavar": "T"})
    """Time limit: minutes, H:M:S, D-H:M:S (default: the script's)"""
    run_dir: str = field(default="", metadata={"metavar": "D"})
    """Run folder, shared by all nodes"""
    gpus_per_node: int = field(default=0, metadata={"min": 0})
    """GPUs to ask for (0: as many as ranks)"""
    gpu: str = field(default="h100", metadata={"metavar": "h100|h200"})
    """Kind of GPU, for `phi4r plan`"""
    after: str = field(default="", metadata={"metavar": "JOB"})
    """Start when that job has succeeded"""
    array: int = field(default=0, metadata={"min": 0, "metavar": "N"})
    """eval: N jobs with runs of their own, and a merge"""
    recipe: str = ""
    """eval: recipe whose [eval] tables are used"""
    sbatch: str = field(default="", metadata={"metavar": "'...'"})
    """More options for sbatch, as one word"""


@dataclass(frozen=True)
class Submission:
    """What goes to sbatch."""

    run_dir: Path | None
    script: Path
    command: list[str]
    notes: list[str]


def scripts_folder() -> Path:
    """launch/ of the repository that this phi4r runs from."""
    home = Path(os.environ.get("PHI4R_HOME") or Path(phi4r.__file__).parents[1])
    folder = home / "launch"
    if not (folder / "job.sh").is_file():
        raise UserError(
            f"{folder}: no job scripts there; they come with the repository: set PHI4R_HOME to a clone"
        )
    return folder


def seconds_of(time: str) -> int:
    """A SLURM time limit (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise UserError(f"--time: expected minutes, H:M:S or D-H:M:S, got {time!r}")
    days, parts = match[1], [int(part) for part in match.groups()[1:] if part is not None]
    if days is not None or len(parts) == 3:
        hours, minutes, seconds = parts + [0] * (3 - len(parts))
    else:
        hours, minutes, seconds = 0, parts[0], parts[1] if len(parts) > 1 else 0
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _load(request: LaunchRequest) -> Loaded | None:
    """The stage's checked configuration (bench has none)."""
    if request.stage == "bench":
        if not request.words:
            raise UserError("launch bench: expected the name of a benchmark")
        return None
    if not request.words:
        raise UserError(
            f"launch {request.stage}: expected {'CHECKPOINT [TASK]' if request.stage == 'eval' else 'RECIPE'}"
        )
    source = (request.recipe or None) if request.stage == "eval" else request.words[0]
    # What phi4r.slurm.supervise adds; the trainer's memory is then free of the cache of an embedded sampler.
    added = ["sampling.engine=vllm", "vllm.registry=RUN/servers"] if request.rollout_nodes else []
    return load_stage(request.stage, source, [*request.overrides, *added])


def _tasks_per_node(request: LaunchRequest, world_size: int) -> int:
    if world_size % request.nodes:
        raise UserError(
            f"launch: the recipe's layout has {world_size} ranks, which do not spread evenly over --nodes"
            f" {request.nodes}"
        )
    tasks = world_size // request.nodes
    if request.gpus_per_node and tasks > request.gpus_per_node:
        raise UserError(
            f"launch: the recipe's layout has {world_size} ranks, and --nodes {request.nodes} with"
            f" {request.gpus_per_node} GPUs have {request.nodes * request.gpus_per_node}"
        )
    return tasks


def prepare(request: LaunchRequest) -> Submission:
    """The sbatch command of a request. UserError where the recipe is wrong, cannot fit, or runs already."""
    folder = scripts_folder()
    stages = [name for name in STAGES if (folder / f"{name}.sbatch").exists()]
    if request.stage not in (*stages, "bench"):
        raise UserError(f"launch: expected one of {', '.join(stages)} or bench, got {request.stage!r}")
    if request.rollout_nodes and request.stage != "rl":
        raise UserError(f"--rollout-nodes: is for rl, which samples while it trains; not for {request.stage}")
    script = folder / f"{request.stage}{'_vllm' if request.rollout_nodes else ''}.sbatch"
    loaded, notes, tasks = _load(request), [], 1
    run_dir = None
    words = [*request.words, *(f"--{override}" for override in request.overrides)]
    if loaded is not None:
        parallel = loaded.config.parallel
        # curate is one task that starts its own ranks
        tasks = 1 if request.stage == "curate" else _tasks_per_node(request, parallel.world_size)
        if isinstance(loaded.config, SFTConfig | RLConfig):
            gpu = find_gpu(request.gpu)
            verdict = check(loaded.config, gpus=parallel.world_size, gpu_memory_gib=gpu.memory_gib)
            if not verdict.fits:
                raise UserError(f"launch: {loaded.recipe.name} on {gpu.name}: {verdict.reason}")
            notes.append(f"{loaded.recipe.name} on {gpu.name}: {verdict.reason}")
        name = Path(request.words[0]).name if request.stage == "eval" else loaded.recipe.name
        run_dir = Path(request.run_dir or f"runs/{request.stage}_{name}").absolute()
        words += ["--recipe", request.recipe] if request.recipe and request.stage == "eval" else []
        words += ["--run-dir", str(run_dir)]
        _refuse_second_job(run_dir)
    elif request.run_dir:
        raise UserError("launch bench: has no run folder; results go where the benchmark says")
    gpus = request.gpus_per_node or tasks
    options = [f"--nodes={request.nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={gpus}"]
    if request.time:
        lead = max(1, min(MAX_LEAD_S, seconds_of(request.time) // 4))
        options += [f"--time={request.time}", f"--signal=B:USR2@{lead}"]
    if run_dir is not None:
        options += [f"--output={run_dir}/logs/job-%j.out", f"--comment={run_dir}"]
    if request.after:
        options += [f"--dependency=afterok:{request.after}", "--kill-on-invalid-dep=yes"]
    if request.array:
        if request.stage != "eval":
            raise UserError(f"--array: is for eval, whose runs are independent; not for {request.stage}")
        options.append(f"--array=0-{request.array - 1}")
    options += shlex.split(request.sbatch)
    if request.rollout_nodes:
        options += [":", *_rollout_options(request, gpus)]
    command = ["sbatch", "--parsable", *options, str(script), *words]
    return Submission(run_dir, script, command, notes)


def _rollout_options(request: LaunchRequest, gpus: int) -> list[str]:
    """sbatch's options for the second component, which inherits time limit and comment; `gpus`: of a node."""
    servers = request.servers_per_node or gpus
    if gpus % servers:
        raise UserError(f"--servers-per-node: {servers} servers cannot share {gpus} GPUs evenly")
    nodes, tasks = f"--nodes={request.rollout_nodes}", f"--ntasks-per-node={servers}"
    return [nodes, tasks, f"--gpus-per-node={gpus}", *shlex.split(request.sbatch)]


def _refuse_second_job(run_dir: Path) -> None:
    path = run_dir / "slurm" / "job"
    if path.exists() and shutil.which("scontrol"):
        job = find_job(path.read_text(encoding="utf-8").strip())
        if job is not None and job.is_queued:
            raise UserError(
                f"{run_dir}: job {job.job_id} ({job.state}) has this run folder; scancel it first"
            )


def _in_site(command: Sequence[str]) -> list[str]:
    """The command as a job's environment has it: launch/site.sh may set account, partition and more."""
    return ["bash", "-c", 'source "$PHI4R_HOME/launch/env.sh" && exec "$@"', "bash", *command]


def _environment() -> Mapping[str, str]:
    return {**os.environ, "PHI4R_HOME": str(scripts_folder().parent)}


def rendered(command: Sequence[str]) -> str:
    """The command for people: an option a line."""
    lines, rest = [command[0]], list(command[1:])
    while rest and (rest[0].startswith("-") or rest[0] == ":"):
        lines.append("  " + shlex.quote(rest.pop(0)))
    return " \\\n".join([*lines, "  " + shlex.join(rest)])


def main(request: LaunchRequest, dry_run: bool, parsable: bool) -> None:
    """Show the command, let sbatch check it, submit it, and say how to follow it.

    dry_run: show command and script, and submit nothing. parsable: print the job's id and nothing else.
    """
    submission = prepare(request)
    if not parsable:
        for note in submission.notes:
            say(note)
        say(rendered(submission.command))
    can_submit = shutil.which("sbatch") is not None
    if dry_run:
        say(f"\n# {submission.script}")
        say(submission.script.read_text(encoding="utf-8").rstrip())
        if not can_submit:
            say("\nnot checked by SLURM: there is no sbatch on this machine")
            return
    test = [submission.command[0], "--test-only", *submission.command[2:]]
    ask(_in_site(test), _environment())
    if dry_run:
        say("\nSLURM accepts this (sbatch --test-only); nothing was submitted")
        return
    job_id = _submit(submission)
    merge_id = _submit_merge(submission, job_id) if request.array else ""
    if parsable:
        print(merge_id or job_id)
        return
    say(f"\nsubmitted as job {job_id}" + (f"; job {merge_id} puts its parts together" if merge_id else ""))
    if submission.run_dir is not None:
        say(f"  phi4r status {submission.run_dir}")
        say(f"  phi4r logs {submission.run_dir} -f")
    say(f"  scancel {job_id}   (ends it for good; the same command goes on from its last checkpoint)")


def _submit(submission: Submission) -> str:
    if submission.run_dir is not None:  # a job whose log folder is missing fails without a log
        (submission.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    job_id = ask(_in_site(submission.command), _environment()).strip().partition(";")[0]
    if submission.run_dir is not None:
        atomic_write_text(submission.run_dir / "slurm" / "job", job_id + "\n")
        atomic_write_text(submission.run_dir / "slurm" / "command", rendered(submission.command) + "\n")
    return job_id


def _submit_merge(submission: Submission, array_id: str) -> str:
    script, folder = submission.script.with_name("merge.sbatch"), submission.run_dir
    command = [
        "sbatch", "--parsable", f"--dependency=afterok:{array_id}", "--kill-on-invalid-dep=yes",
        f"--output={folder}/logs/job-%j.out", f"--comment={folder}", str(script), str(folder),
    ]  # fmt: skip
    return ask(_in_site(command), _environment()).strip().partition(";")[0]
