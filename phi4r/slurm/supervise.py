"""Supervise a job: check its nodes, start one srun task per rank, watch them, and when they have ended say
why and decide: done, restart here, requeue, or fail.

    supervise.py [SRUN_OPTION ...] -- STAGE WORD ...

launch/job.sh runs this file on the first node. It needs only the standard library of Python 3.9 or newer,
because the Python of a container may see neither SLURM's commands nor the node.

The ranks report by files in the attempt's folder (`phi4r.parallel.attempt`). Exit codes alone would not do:
srun kills the others for the first rank that ends with a code, and then returns theirs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICK_S = 0.5
SLURM_S = 60
"""Seconds that a question to SLURM may take."""
SERVERS_END_S = 60
SLACK_S = 2
"""Clocks of file systems are this coarse."""
ROOM_BYTES = 256 * 1024
MAX_WHY = 500
WAITING = ("torch/distributed/", "megatron/core/")
"""Code in which a rank waits for others: the innermost frame of a rank that does not hang itself."""


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended: finished, stopped, failed, hung or lost; and why, in one line."""

    how: str
    why: str


@dataclass(frozen=True)
class Heartbeat:
    """What a rank wrote when it started; its file is touched as long as the rank gets on."""

    rank: int
    limit_s: int
    """Seconds of silence after which the rank counts as hung (0: never)."""
    step_id: str
    node: str
    silent_s: float


@dataclass(frozen=True, order=True)
class Report:
    """The error that ended a rank. kind: "peer" where it only lost another rank, else "user" or "error"."""

    time: float
    kind: str
    rank: int
    node: str
    text: str


# --- what an attempt's folder says


def read_reports(folder: Path) -> list[Report]:
    """The errors of all ranks, the earliest first."""
    found = []
    for path in folder.glob("error_*"):
        head, *rest = _read(path).splitlines() or [""]
        with contextlib.suppress(ValueError):  # a report that is cut off
            kind, when, rank, node = head.split()
            found.append(Report(float(when), kind, int(rank), node, rest[0] if rest else ""))
    return sorted(found)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """The ranks that run, with their silence by the clock of the folder's file system."""
    clock = folder / "clock"
    try:
        clock.touch()
        now = clock.stat().st_mtime
    except OSError:
        return []
    found = []
    for path in sorted(folder.glob("heartbeat_*")):
        with contextlib.suppress(OSError, ValueError):  # a rank that has just ended, or is about to write it
            limit_s, _, step_id, node = path.read_text(encoding="utf-8").split()
            silent_s = now - path.stat().st_mtime
            found.append(Heartbeat(_rank_of(path), int(limit_s), step_id, node, silent_s))
    return found


def is_silent(beat: Heartbeat) -> bool:
    """Whether a rank has been silent for longer than its own limit."""
    return beat.limit_s > 0 and beat.silent_s > beat.limit_s + SLACK_S


def main_frame(stack: str) -> str:
    """The innermost frame of the main thread in faulthandler's dump, which has that thread last."""
    frame, is_next = "", False
    for line in stack.splitlines():
        if line.startswith(("Thread", "Current thread")):
            is_next = True
        elif is_next:
            frame, is_next = line.strip(), False
    return frame


def describe_hang(folder: Path) -> str:
    """Which rank hangs: one whose stack does not wait in a collective for the others, or that left none."""
    culprits, waiting, limit_s = [], [], "?"
    for beat in read_heartbeats(folder):
        limit_s = str(beat.limit_s)
        stack = _read(folder / f"stack_{beat.rank:05d}")
        frame = main_frame(stack)
        if not stack.strip() and not is_silent(beat):
            continue  # it waits since later than the others, or works
        if not stack.strip():
            culprits.append(f"rank {beat.rank} on {beat.node} left no stack (stopped, or in the kernel)")
        elif any(place in frame for place in WAITING):
            waiting.append(str(beat.rank))
        else:
            culprits.append(f"rank {beat.rank} on {beat.node} is at {frame}")
    text = "; ".join(culprits) or "all ranks wait for each other"
    waits = f"; waiting for it: rank {' '.join(waiting)}" if waiting else ""
    return f"{text} (no sign of life for {limit_s} s{waits}; stacks in {folder})"


def has_room(folder: Path) -> bool:
    """Whether 256 KiB more fit into the folder."""
    path = folder / "room"
    try:
        with open(path, "wb") as file:
            file.write(bytes(ROOM_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return True


def judge(folder: Path, code: int) -> Verdict:
    """Why the ranks of an attempt have ended; `code`: srun's exit code."""
    srun = _read(folder / "srun.err").splitlines()
    died = [line for line in srun if "task" in line and not re.search("Exited with exit code|launch/", line)]
    reports = read_reports(folder)
    own = [report for report in reports if report.kind != "peer"]
    hung = _read(folder / "hung").strip()
    if (folder / "finished").exists():
        return Verdict("finished", "all steps are done")
    if (folder / "stopped").exists():
        return Verdict("stopped", "saved after a signal (time limit or preemption)")
    if own:
        return Verdict("failed", f"rank {own[0].rank} on {own[0].node}: {own[0].text}")
    if not has_room(folder):  # the ranks could not write down why they ended either
        usage = shutil.disk_usage(folder)
        free = f"{usage.free / 2**30:.3g} of {usage.total / 2**30:.3g} GiB free"
        return Verdict("failed", f"the disk of {folder} is full: {free}")
    if hung:
        return Verdict("hung", hung)
    if died:
        return Verdict("lost", re.sub("^srun: error: ", "", died[0]))
    if any(path.stat().st_size for path in folder.glob("stack_*")):
        return Verdict("hung", describe_hang(folder))
    if reports:
        return Verdict("lost", f"{reports[0].text} (error_{reports[0].rank:05d})")
    printed = _read(next(iter(sorted(folder.glob("rank_*.log"))), folder / "none")).splitlines()
    last = next((lines[-1] for lines in (printed, srun) if lines), "")
    return Verdict("lost", f"{last} (exit code {code}; logs in {folder})".strip())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _rank_of(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


# --- what is done about it


def progress(run: Path) -> int:
    """The step that a restart would go on from."""
    steps = [int(path.name[5:]) for path in run.glob("checkpoints/step_*") if path.name[5:].isdigit()]
    return max(steps, default=0)


def count_restart(run: Path) -> int:
    """Restarts in a row that ended where the one before ended, this one included; counted over requeues."""
    path, now = run / "slurm" / "restarts", progress(run)
    last, _, tries = _read(path).strip().partition(" ")
    count = int(tries) + 1 if tries.isdigit() and now <= int(last) else 0
    with contextlib.suppress(OSError):  # a full disk: judge says so
        path.write_text(f"{now} {count}\n", encoding="utf-8")
    return count


def next_move(how: str, state: str, signalled: bool) -> str:
    """After an attempt: "done", "fail", "leave" (SLURM is ending the job), "requeue" or "restart".

    state: the job's, as squeue has it; one that is not RUNNING was cancelled or is being requeued already,
    and our requeue would undo that. signalled: its time is nearly over.
    """
    if how in ("finished", "failed"):
        return "done" if how == "finished" else "fail"
    if state != "RUNNING":
        return "leave"
    return "requeue" if how == "stopped" or signalled else "restart"


def run_dir_of(words: Sequence[str]) -> Path | None:
    """The value of the last --run-dir."""
    found = None
    for place, word in enumerate(words):
        if word == "--run-dir" and place + 1 < len(words):
            found = words[place + 1]
        elif word.startswith("--run-dir="):
            found = word.partition("=")[2]
    return Path(os.path.abspath(found)) if found else None


def job_words(words: Sequence[str], run: Path, env: Mapping[str, str]) -> tuple[list[str], Path]:
    """(the words of `phi4r`, its run folder): a task of an array does its own part of an evaluation, and the
    trainer of a heterogeneous job is told where its servers are."""
    if words[0] == "eval" and "SLURM_ARRAY_TASK_ID" in env:
        part = env["SLURM_ARRAY_TASK_ID"]
        run = run / f"part_{int(part):04d}"
        return [*words, "--run-dir", str(run), "--eval.part", part], run
    if has_servers(env):
        number = env["SLURM_NTASKS_HET_GROUP_1"]
        servers = ["--sampling.engine", "vllm", "--vllm.num_servers", number]
        return [*words, *servers, "--vllm.registry", str(run / "servers")], run
    return list(words), run


def has_servers(env: Mapping[str, str]) -> bool:
    """Whether a second component of the job runs vLLM servers; what has no --het-group is about the first."""
    return int(env.get("SLURM_HET_SIZE", "1")) > 1


def ask(*words: str) -> tuple[int, str]:
    """(exit code, stdout) of a SLURM command; code 124 where it did not answer."""
    try:
        ended = subprocess.run(words, capture_output=True, text=True, timeout=SLURM_S, check=False)
    except subprocess.TimeoutExpired:
        return 124, ""
    return ended.returncode, ended.stdout


# --- the job


class Job:
    """This job and its attempt. `run`: the run folder; `folder`: the attempt's."""

    def __init__(self, srun_options: Sequence[str], words: Sequence[str], run: Path) -> None:
        self.env = dict(os.environ)
        self.srun_options = list(srun_options)
        self.words, self.run = job_words(words, run, self.env)
        self.id = self.env["SLURM_JOB_ID"]
        self.restart = int(self.env.get("SLURM_RESTART_COUNT", "0"))
        self.attempt = 0
        self.folder = self.run
        self.signals: list[int] = []
        self.is_near_end = False
        self.servers: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """job.restart"""
        return f"{self.id}.{self.restart}"

    def say(self, text: str) -> None:
        """A line of the job's log."""
        with contextlib.suppress(OSError):  # the log may be on the disk that is full
            print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} [{self.name}] {text}", flush=True)

    def note(self, how: str, why: str) -> None:
        """Append to RUN/slurm/history.tsv: time, job.restart.attempt, step, how it ended, why. `phi4r status`
        shows the last line. Where none can be written, the job's comment has it, behind the run folder."""
        why = " ".join(why.split())[:MAX_WHY]
        self.say(f"{how}: {why}")
        when, attempt = time.strftime("%Y-%m-%dT%H:%M:%S%z"), f"{self.name}.{self.attempt}"
        try:
            with open(self.run / "slurm" / "history.tsv", "a", encoding="utf-8") as file:
                file.write("\t".join((when, attempt, str(progress(self.run)), how, why)) + "\n")
        except OSError:
            ask("scontrol", "update", f"JobId={self.id}", f"Comment={self.run} | {how}: {why}")

    def state(self) -> str:
        """PENDING, RUNNING, ... as squeue has it; "gone" where it does not know the job."""
        return (ask("squeue", "-h", "-j", self.id, "-o", "%T")[1].split() or ["gone"])[0]

    def steps_of(self, component: str) -> list[str]:
        """The running steps of a component of this job, as scancel names them: 17.3"""
        listed = ask("squeue", "-h", "-s", "-j", component, "-o", "%i")[1].split()
        return [step for step in listed if re.fullmatch(rf"{component}\.\d+", step)]

    def signal_ranks(self) -> None:
        """Ask the ranks to save, and not the servers: a signal to a heterogeneous job reaches both."""
        targets = self.steps_of(self.id) if has_servers(self.env) else [self.id]
        for target in targets:
            ask("scancel", "--signal=USR2", target)

    def handle_signals(self) -> None:
        """Act on what has arrived since; the handler itself only keeps it."""
        while self.signals:
            number = self.signals.pop(0)
            self.is_near_end = True
            if number == signal.SIGUSR2:
                self.say("signal: time limit near")
                self.signal_ranks()
            else:
                self.say("signal: SLURM wants the nodes back")

    def give_up(self, how: str, why: str) -> None:
        self.note(how, why)
        sys.exit(1)

    def spend_restart(self, why: str) -> None:
        """Exits where there were too many restarts without a new checkpoint."""
        limit, tries = int(self.env["PHI4R_MAX_RESTARTS"]), count_restart(self.run)
        if tries >= limit:
            reason = f"{tries} restarts without a new checkpoint (PHI4R_MAX_RESTARTS={limit}); last: {why}"
            self.give_up("gave up", reason)

    def requeue(self, bad_nodes: str = "") -> None:
        """Back to the queue, without the nodes given. Only while RUNNING: after scancel it would undo what
        the user wants. Never returns."""
        state = self.state()
        if state != "RUNNING":
            self.give_up("ended by SLURM", f"not requeued, because the job is {state}")
        without = f", without {bad_nodes}" if bad_nodes else ""
        self.note("requeued", f"goes on from step {progress(self.run)}{without}")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if ask("scontrol", "requeue", self.id)[0]:
            self.give_up("failed", "scontrol requeue was refused: does the site forbid it?")
        if bad_nodes:  # possible now that the job waits; nodes that were left out before stay out
            shown = ask("scontrol", "show", "job", "-o", self.id)[1]
            before = re.search(r" ExcNodeList=(\S*) ", shown)
            left_out = f"{before[1]},{bad_nodes}" if before and before[1] != "(null)" else bad_nodes
            for component in filter(None, (self.id, self.env.get("SLURM_JOB_ID_HET_GROUP_1"))):
                ask("scontrol", "update", f"JobId={component}", f"ExcNodeList={left_out}")
        time.sleep(300)  # SLURM ends this process before
        sys.exit(1)

    # --- before the ranks

    def srun(self, options: Sequence[str], words: Sequence[str], errors: Path) -> subprocess.Popen[bytes]:
        """Start a step that runs `python WORDS`."""
        command = ["srun", *options, *self.srun_options, self.env["PHI4R_PYTHON"], *words]
        with open(errors, "wb") as file:
            return subprocess.Popen(command, env=self.env, stderr=file, stdin=subprocess.DEVNULL)

    def check_nodes(self) -> None:
        """Comes back where the nodes of each component are fit."""
        self._check(self.folder, self.env["SLURM_JOB_NUM_NODES"])
        if has_servers(self.env):
            nodes = self.env["SLURM_JOB_NUM_NODES_HET_GROUP_1"]
            self._check(self.folder / "rollout_nodes", nodes, "--het-group=1")

    def _check(self, folder: Path, num_nodes: str, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        log, errors = folder / "check.log", folder / "check_srun.err"
        tasks = [f"--ntasks={num_nodes}", "--ntasks-per-node=1", "--wait=0", f"--output={log}"]
        step = self.srun([*options, *tasks], ["-m", "phi4r.slurm.check", str(folder)], errors)
        if wait(step, int(self.env["PHI4R_CHECK_S"]) + 30) == 0:
            return
        problems = [line for line in _read(log).splitlines() if line.startswith("problem:")]
        why = ([*problems, *_read(errors).splitlines()] or ["it did not end in time"])[0].removeprefix(
            "problem: "
        )
        bad_nodes = _read(folder / "bad_nodes").strip()
        if (folder / "check_failed").exists() and not bad_nodes:  # nothing that other nodes would mend
            self.give_up("failed", f"check of the nodes: {why}")
        self.note("bad node", f"check of the nodes: {why}")
        self.spend_restart(why)
        self.requeue(bad_nodes)

    def set_environment(self) -> None:
        """What ranks and servers are told about this attempt."""
        hosts = ask("scontrol", "show", "hostnames", self.env["SLURM_JOB_NODELIST"])[1].split()
        # Another port for every attempt, below those that the kernel hands out.
        port = 20000 + (int(self.id) * 7 + self.restart * 31 + self.attempt) % 10000
        self.env |= {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(port)}
        self.env |= {"PHI4R_ATTEMPT": str(self.attempt), "PHI4R_ATTEMPT_DIR": str(self.folder)}

    # --- while they run

    def run_ranks(self) -> int:
        """Start one task per rank and watch them until they have ended; srun's exit code."""
        cpus = self.env.get("SLURM_CPUS_PER_TASK") or self.env.get("SLURM_CPUS_PER_TASK_HET_GROUP_0", "1")
        options = ["--kill-on-bad-exit=1", "--wait=120", "--distribution=block", f"--cpus-per-task={cpus}"]
        options.append(f"--output={self.folder}/rank_%5t.log")
        step = self.srun(options, ["-m", "phi4r", *self.words], self.folder / "srun.err")
        began = last = time.monotonic()
        is_ended_by_us = False
        while (code := wait(step, TICK_S, kill=False)) is None:
            self.handle_signals()
            if not is_ended_by_us and time.monotonic() - last >= float(self.env["PHI4R_WATCH_S"]):
                last = time.monotonic()
                is_ended_by_us = self._end_if_hung(step, last - began)
        return code

    def _end_if_hung(self, step: subprocess.Popen[bytes], seconds: float) -> bool:
        """End the step when a rank has been silent for longer than its own limit, or none has started."""
        beats, start_s = read_heartbeats(self.folder), int(self.env["PHI4R_START_S"])
        silent = next(filter(is_silent, beats), None)
        if silent is not None:
            self._write_hung(describe_hang(self.folder))
            ask("scancel", "--signal=KILL", f"{self.id}.{silent.step_id}")
            return True
        signs = ("heartbeat_*", "finished", "stopped", "error_*")
        if seconds > start_s and not any(any(self.folder.glob(sign)) for sign in signs):
            self._write_hung(f"no rank has started Python within {start_s} s (PHI4R_START_S)")
            step.terminate()
            return True
        return False

    def _write_hung(self, text: str) -> None:
        with contextlib.suppress(OSError):
            (self.folder / "hung").write_text(text, encoding="utf-8")

    # --- the vLLM servers of a heterogeneous job, one task each

    def start_servers(self) -> None:
        if not has_servers(self.env):
            return
        tasks, cpus = (self.env.get(f"SLURM_{name}_HET_GROUP_1", "1") for name in ("NTASKS", "CPUS_PER_TASK"))
        options = ["--het-group=1", f"--ntasks={tasks}", "--kill-on-bad-exit=0", "--wait=0"]
        options += [
            "--distribution=block",
            f"--cpus-per-task={cpus}",
            f"--output={self.folder}/server_%5t.log",
        ]
        words = ["-m", "phi4r", "serve", *self.words[1:]]
        self.servers = self.srun(options, words, self.folder / "servers.err")

    def end_servers(self) -> None:
        """They end with the attempt: the next one has another key and other weights."""
        if self.servers is None:
            return
        for step in self.steps_of(self.env["SLURM_JOB_ID_HET_GROUP_1"]):
            ask("scancel", "--signal=TERM", step)
        wait(self.servers, SERVERS_END_S)
        self.servers = None

    # --- all of it

    def prepare(self) -> None:
        """Make the run folder and tell `phi4r status` about the job."""
        for name in ("logs", "slurm"):
            (self.run / name).mkdir(parents=True, exist_ok=True)
        (self.run / "slurm" / "job").write_text(f"{self.id}\n", encoding="utf-8")
        ask("scontrol", "update", f"JobId={self.id}", f"Comment={self.run}")
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, lambda received, _: self.signals.append(received))

    def do_attempt(self) -> Verdict:
        """Check the nodes, run ranks and servers to their end, and say why they ended."""
        name = f"{self.name}.{self.attempt}"
        self.folder = self.run / "logs" / name
        self.folder.mkdir(exist_ok=True)
        latest = self.run / "logs" / "latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(name)
        self.check_nodes()
        if self.signals:
            self.is_near_end = True
            return Verdict("stopped", "a signal came before the ranks started")
        nodes, tasks = self.env["SLURM_JOB_NODELIST"], self.env["SLURM_NTASKS"]
        self.say(
            f"attempt {self.attempt}: phi4r {' '.join(self.words)} on {nodes}, {tasks} ranks,"
            f" from step {progress(self.run)}; logs in {self.folder}"
        )
        self.set_environment()
        self.start_servers()
        code = self.run_ranks()
        self.end_servers()
        self.handle_signals()
        if not (self.folder.is_dir() and (self.run / "slurm").is_dir()):
            # Made anew, it would be an empty run that starts from nothing.
            self.say(f"failed: the run folder {self.run} is lost")
            sys.exit(1)
        return judge(self.folder, code)

    def attempts(self) -> None:
        """Attempt after attempt until the run is done. Never returns."""
        while True:
            verdict = self.do_attempt()
            self.note(verdict.how, verdict.why)
            state = self.state()
            move = next_move(verdict.how, state, self.is_near_end)
            if move in ("done", "fail"):
                sys.exit(0 if move == "done" else 1)
            if move == "leave":
                self.give_up("ended by SLURM", f"the job is {state}")
            self.spend_restart(verdict.why)
            if move == "requeue":
                self.requeue()
            self.attempt += 1


def wait(step: subprocess.Popen[bytes], seconds: float, kill: bool = True) -> int | None:
    """The exit code of a step; after `seconds` it is ended (`kill`), or None."""
    try:
        return step.wait(seconds)
    except subprocess.TimeoutExpired:
        if not kill:
            return None
    step.terminate()
    try:
        return step.wait(30)
    except subprocess.TimeoutExpired:
        step.kill()
        return step.wait(30)


def main(arguments: Sequence[str]) -> None:
    """Run the job that the words describe. Never returns."""
    if sys.version_info < (3, 9):  # noqa: UP036  (the node's own Python, not phi4r's)
        sys.exit("error: PHI4R_HOST_PYTHON must be Python 3.9 or newer")
    place = list(arguments).index("--")
    words = arguments[place + 1 :]
    run = run_dir_of(words)
    if run is None:
        print("error: --run-dir D is missing: a folder that all nodes share", file=sys.stderr)
        sys.exit(2)
    job = Job(arguments[:place], words, run)
    try:
        job.prepare()
        job.attempts()
    except OSError as error:
        job.give_up("failed", str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
