"""`python -m benchmarks.compile_check`: every shipped kernel compiles for Hopper as it should, and kernels
that should not pass do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from phi4r_kernels.aot import REGISTER_FILE, Report, problems

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton")


def compile_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that compiles, as no process of these tests does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "kernels")]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_check", *arguments],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip


@pytest.mark.proves(
    "Every kernel that ships compiles for Hopper without spills and with wgmma", how="ptxas' report for sm_90"
)
def test_every_shipped_kernel_compiles_for_hopper_without_spills() -> None:
    done = compile_check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"variants, 0 errors", done.stdout)
    for kernel in ("attention fwd", "attention fused", "attention hopper fwd", "head loss_and_grad"):
        assert kernel in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "100"])
@pytest.mark.proves("The same for Ampere and datacentre Blackwell", how="ptxas' report for sm_80 and sm_100")
def test_every_kernel_compiles_for_other_architectures_without_spills(arch: str) -> None:
    done = compile_check("--arch", arch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"attention fused sm_{arch} H128" in done.stdout


def test_planted_kernels_are_caught_and_named(tmp_path: Path) -> None:
    done = compile_check("--modules", "planted_variants", "--cache", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"error: spilling: spills \d+ bytes", done.stderr)
    assert "wgmma.mma_async instructions are serialized" in done.stderr
    assert re.search(r"error: oversized: 3\d\d,\d\d\d bytes of shared memory of 232,448", done.stderr)
    assert "error: broken: does not compile: CompileTimeAssertionFailure" in done.stderr
    assert "error: crashing: does not compile: the compiler died" in done.stderr
    assert "error: sound" not in done.stderr
    # What compiled is remembered; what failed is not, so that a mended compiler gets another try.
    assert len(list(tmp_path.glob("*.json"))) == 4


def test_an_unknown_variant_is_an_error_and_not_an_empty_success() -> None:
    done = compile_check("--modules", "planted_variants", "--only", "nothing of this name")
    assert done.returncode == 2
    assert "no variant for [90] contains 'nothing of this name'" in done.stderr


def sound(**changes: object) -> Report:
    fields: dict = {"name": "x", "arch": 90, "registers": 168, "num_warps": 12, "has_dot": True, "wgmma": 8}
    return Report(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"stack_bytes": 16}, "stack 16"),
        ({"shared_bytes": 232_449}, "232,449 bytes of shared memory"),
        ({"registers": 171}, f"171 registers x 384 threads of {REGISTER_FILE:,}"),
        ({"wgmma": 0}, "no MMA instruction"),
        ({"mma": 2, "wgmma": 0}, "2 mma.sync and no wgmma"),
        ({"arch": 100, "wgmma": 0}, "no MMA instruction"),
        ({"has_copies": True}, "without TMA"),
        ({"warning": "(C7511) Potential Performance Loss"}, "C7511"),
    ],
)
def test_each_rule_alone_makes_a_problem(changes: dict[str, object], words: str) -> None:
    assert problems(sound()) == []
    assert words in "; ".join(problems(sound(**changes)))
