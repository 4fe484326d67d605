"""A real SLURM on one machine, for tests: munged, slurmctld and several slurmds on loopback, as this user.

Nothing is installed: it needs the distribution's `slurm-wlm` and `munge`. The daemons are children of this
process in the foreground, so they die with it; all they write lies in one short-lived folder under /tmp
(short: the paths of unix sockets must stay under 108 characters).
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
FINAL = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")
)
START_S = 60.0
STOP_S = 20.0
COMMAND_S = 300.0
PATH = os.environ["PATH"] + ":/usr/sbin"

CONFIGURATION = """\
ClusterName=phi4rtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
# Job ids, and with them the ports that job scripts choose, differ between clusters on one machine.
FirstJobId={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is how long a requeued job waits before it starts: 120 s by default, 5 is the least.
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
# No cgroups, no binding, no database: the virtual nodes share this machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=2
# Finished jobs stay visible to scontrol.
MinJobAge=3600
KillWait=5
SlurmdTimeout=5
UnkillableStepTimeout=15
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory=65536 \
Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE \
GraceTime=30 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing_programs() -> list[str]:
    """The daemons that this machine lacks."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed test run leaves no daemon


def _free_ports(count: int) -> int:
    """The first of `count` free TCP ports in a row, below the range that the kernel hands out."""
    for base in range(12_000 + os.getpid() % 400 * 16, 20_000, 16):
        sockets = []
        try:
            for port in range(base, base + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise RuntimeError(f"no {count} free ports in a row below 20000")


class Cluster:
    """`num_nodes` virtual nodes of `cpus` CPUs and `gpus` GPUs that are links to /dev/null.

    Nodes are named 127.0.0.1, 127.0.0.2, ...: all of 127/8 is loopback on Linux, so that a node's name
    resolves with nothing to configure.
    """

    def __init__(self, num_nodes: int = 4, cpus: int = 8, gpus: int = 4) -> None:
        self.num_nodes, self.cpus, self.gpus = num_nodes, cpus, gpus
        self.nodes = [f"127.0.0.{index + 1}" for index in range(num_nodes)]
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "PHI4R_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.environment |= {"SLURM_CONF": str(self.root / "etc/slurm.conf"), "PATH": PATH}

    # --- life

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _configure(self) -> None:
        root, port = self.root, _free_ports(self.num_nodes + 1)
        for name in ("etc", "run", "log", "state", "dev", *(f"spool/{node}" for node in self.nodes)):
            (root / name).mkdir(parents=True)
        for index in range(self.gpus):  # a gpu gres wants device files, and a link to a device is one
            (root / "dev" / f"nvidia{index}").symlink_to("/dev/null")
        key = root / "etc/munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        names = f"127.0.0.[1-{self.num_nodes}]"
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            port=port,
            first=port + 1,
            last=port + self.num_nodes,
            user=getpass.getuser(),
            root=root,
            names=names,
            cpus=self.cpus,
            gpus=self.gpus,
        )
        (root / "etc/slurm.conf").write_text(text)
        (root / "etc/gres.conf").write_text(
            f"NodeName={names} Name=gpu File={root}/dev/nvidia[0-{self.gpus - 1}]\n"
        )
        version = re.search(r"(\d+)\.(\d+)", self.run("slurmd", "-V"))
        assert version is not None
        # Before 24.05 the plugin cannot be disabled; naming v1 keeps it from probing, and it creates nothing.
        disabled = (int(version[1]), int(version[2])) >= (24, 5)
        plugin = "CgroupPlugin=disabled\n" if disabled else "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"
        (root / "etc/cgroup.conf").write_text(plugin)

    def _start(self) -> None:
        run, etc = self.root / "run", self.root / "etc"
        self._spawn(
            "munged", "--foreground", "--force", "--num-threads=4", f"--key-file={etc}/munge.key",
            f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid",
            f"--log-file={self.root}/log/munged.log", f"--seed-file={etc}/munged.seed",
        )  # fmt: skip
        self.wait_for("munged's socket", (run / "munge.sock").exists, START_S)
        self._spawn("slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for("idle nodes", lambda: self._ended() or set(self.states().values()) == {"idle"}, START_S)
        assert not self._ended(), self._ended()

    def _ended(self) -> str:
        """What a daemon that has ended said, "" if all run."""
        for name, process in self.daemons.items():
            if process.poll() is not None:
                return f"{name} ended: {(self.root / 'log' / f'{name}.out').read_text()[-2000:]}"
        return ""

    def _spawn(self, program: str, *arguments: str, name: str = "") -> None:
        name = name or program
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                [shutil.which(program, path=PATH) or program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.root / "log",
                preexec_fn=_die_with_parent,
                start_new_session=True,
            )

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._spawn("slurmd", "-D", "-N", node, name=node)

    def crash_node(self, node: str) -> None:
        """As a power cut does: slurmd, step daemons and tasks of a node end at once, without a word."""
        for pid in [self.daemons[node].pid, *self._processes_of(node)]:
            _kill(pid)
        self.daemons.pop(node).wait(STOP_S)

    def stop(self) -> None:
        """End every job and daemon, by process id, and remove the folder."""
        controller = self.daemons.get("slurmctld")
        if controller is not None and controller.poll() is None:
            self.run("scancel", "--user", getpass.getuser(), check=False)
            until = time.monotonic() + STOP_S
            while self.run("squeue", "-h", "-t", "R,CG", check=False) and time.monotonic() < until:
                time.sleep(0.1)
        leftovers = self._processes_of("")
        for process in self.daemons.values():
            if process.poll() is None:
                process.kill()
        for pid in leftovers:
            _kill(pid)
        for process in self.daemons.values():
            process.wait(STOP_S)
        shutil.rmtree(self.root, ignore_errors=True)

    def _processes_of(self, node: str) -> list[int]:
        """Step daemons and tasks of a node ("": of all), told by what their environment says."""
        conf = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        found = set()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                is_stepd = (entry / "cmdline").read_bytes().startswith(b"slurmstepd")
                if conf not in variables:
                    continue
                names = [v.split(b"=")[1].decode() for v in variables if v.startswith(b"SLURMD_NODENAME=")]
                if (not node and (names or is_stepd)) or node in names:
                    found.add(int(entry.name))
                    match = re.search(r"^PPid:\s+(\d+)", (entry / "status").read_text(), re.MULTILINE)
                    parent = int(match[1]) if match else 0
                    if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd"):
                        found.add(parent)
            except OSError:
                continue
        return sorted(found)

    # --- use

    def run(self, *command: object, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """Run a command as a user of the cluster; its stdout."""
        ended = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        said = f"{command}: {ended.returncode}\n{ended.stdout}{ended.stderr}"
        assert not check or ended.returncode == 0, said
        return ended.stdout

    def job(self, job_id: int) -> dict[str, str]:
        """What scontrol says about a job: JobState, Restarts, ExitCode, NodeList, ..."""
        text = self.run("scontrol", "show", "job", "-o", job_id).splitlines()[-1]
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait(self, job_id: int, states: Collection[str] = FINAL, seconds: float = 240.0) -> dict[str, str]:
        """The job's record once it is in one of `states`."""
        self.wait_for(
            f"job {job_id} to be {'/'.join(sorted(states))}",
            lambda: self.job(job_id)["JobState"] in states,
            seconds,
            lambda: str(self.job(job_id)),
        )
        return self.job(job_id)

    def wait_for(
        self,
        what: str,
        condition: Callable[[], object],
        seconds: float = 240.0,
        details: Callable[[], str] = lambda: "",
    ) -> None:
        """Wait for a condition; past the deadline the failure says what for."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"waited {seconds:g} s for {what}; {details()}"
            time.sleep(0.2)

    def states(self) -> dict[str, str]:
        """Node -> state, empty while the controller does not answer."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
