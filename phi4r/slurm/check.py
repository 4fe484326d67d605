"""Are the nodes of a job fit to train? `python -m phi4r.slurm.check ATTEMPT_FOLDER`, one srun task per node.

Every task reports about its node into the folder, which shows that the folder is shared and writable; task 0
waits for the reports and judges. Exit code 0: fit. 1: `check_failed` is there, and `bad_nodes` if it is the
fault of some nodes, so that the job may go on without them. Each problem is a line "problem: ..." on stdout.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from phi4r.core.io import atomic_write_json, atomic_write_text

PACKAGES = ("phi4r", "torch", "megatron-core", "numpy")
MAX_SKEW_S = 30.0
BUSY_MIB = 2048
"""A GPU with more memory in use than this belongs to somebody else, or to a process that was left behind."""
QUERY_S = 60.0
PAUSE_S = 0.1


def gpu_problem(num_gpus: int) -> str:
    """What is wrong with this node's GPUs, of which the job was given `num_gpus`; "" if nothing."""
    if num_gpus == 0:
        return ""
    query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=QUERY_S, check=False)
    except FileNotFoundError:
        return f"{num_gpus} GPUs were asked for, and there is no nvidia-smi"
    except subprocess.TimeoutExpired:
        return f"nvidia-smi did not answer within {QUERY_S:g} s"
    if answer.returncode:
        return f"nvidia-smi: {' '.join((answer.stderr or answer.stdout).split())}"
    used = {}
    for line in answer.stdout.splitlines():
        index, _, mib = line.partition(",")
        used[index.strip()] = int(mib) if mib.strip().isdigit() else 0
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name in used]
    mine = given if len(given) == num_gpus else list(used)  # a cgroup shows only ours, renumbered
    if len(mine) < num_gpus:
        return f"{len(mine)} GPUs of {num_gpus} are there"
    busy = [f"GPU {index} ({used[index]} MiB in use)" for index in mine if used[index] > BUSY_MIB]
    return f"not idle: {', '.join(busy)}" if busy else ""


def report(folder: Path) -> dict[str, Any]:
    """This node's report. The clock is compared with the one that stamps files in `folder`."""
    probe = folder / f"probe_{_node()}"
    probe.touch()
    os.utime(probe)
    skew = time.time() - probe.stat().st_mtime
    probe.unlink()
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return {
        "node": _node(),
        "skew_s": skew,
        "free_gib": shutil.disk_usage(folder).free / 2**30,
        "versions": versions,
        "gpu_problem": gpu_problem(int(os.environ.get("SLURM_GPUS_ON_NODE", "0") or 0)),
    }


def judge(reports: list[dict[str, Any]], free_gib: float) -> tuple[list[str], dict[str, str]]:
    """(problems of the run as a whole, problem by node) of the reports of all nodes."""
    general: list[str] = []
    bad: dict[str, str] = {}
    for name in ("Python", *PACKAGES):
        found = {entry["node"]: entry["versions"][name] for entry in reports}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{version} on {node}" for node, version in found.items())
            general.append(f"the nodes have different versions of {name}: {listed}")
    free = min(entry["free_gib"] for entry in reports)
    if free < free_gib:
        general.append(
            f"the run folder has {free:.3g} GiB free, and {free_gib:g} are asked for (PHI4R_FREE_GIB)"
        )
    middle = sorted(entry["skew_s"] for entry in reports)[len(reports) // 2]
    for entry in reports:
        off = entry["skew_s"] - middle
        if entry["gpu_problem"]:
            bad[entry["node"]] = entry["gpu_problem"]
        elif abs(off) > MAX_SKEW_S:
            bad[entry["node"]] = f"its clock is {off:+.0f} s off the other nodes'"
    return general, bad


def wait_for_reports(folder: Path, num_nodes: int, seconds: float) -> list[dict[str, Any]]:
    """The reports that have arrived in `folder` by the deadline, or all `num_nodes` of them."""
    until = time.monotonic() + seconds
    while True:
        found = sorted(folder.glob("check_*.json"))
        if len(found) >= num_nodes or time.monotonic() > until:
            return [json.loads(path.read_text(encoding="utf-8")) for path in found]
        time.sleep(PAUSE_S)


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME", platform.node())


def main(folder: Path) -> int:
    """Report; on task 0 also judge. Returns the exit code."""
    seconds = float(os.environ.get("PHI4R_CHECK_S", "180"))
    try:
        mine = report(folder)
        atomic_write_json(folder / f"check_{_node()}.json", mine)
    except OSError as error:  # task 0 misses the report and says which node it was
        print(f"{_node()}: {folder} cannot be written: {error.strerror}", flush=True)
        return 1
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return 0
    num_nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    reports = wait_for_reports(folder, num_nodes, seconds)
    general, bad = judge(reports, float(os.environ.get("PHI4R_FREE_GIB", "1")))
    if len(reports) < num_nodes:
        there = ", ".join(entry["node"] for entry in reports)
        silent = f"{num_nodes - len(reports)} of {num_nodes} nodes wrote nothing into {folder}"
        general.append(f"{silent} within {seconds:g} s (there are {there}); is it shared by all nodes?")
    for line in [*(f"{node}: {why}" for node, why in bad.items()), *general]:
        print(f"problem: {line}", flush=True)
    if not general and not bad:
        free = min(entry["free_gib"] for entry in reports)
        names = ", ".join(f"{name} {version}" for name, version in mine["versions"].items())
        print(f"{num_nodes} nodes are fit: {names}; {free:.1f} GiB free", flush=True)
        return 0
    # All nodes of several being bad is no accident: other nodes would be as bad.
    if bad and not general and (len(bad) < num_nodes or num_nodes == 1):
        atomic_write_text(folder / "bad_nodes", ",".join(bad))
    atomic_write_text(folder / "check_failed", "")
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
