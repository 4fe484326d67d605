"""The CPU platform is as small as it can be: without any one of its patches something phi4r does on a CPU
breaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phi4r.parallel import cpu
from phi4r.parallel.launch import RankError, run_ranks

ON_ONE_RANK = "redirect_cuda_call"
"""Without it the rank breaks that hands out what it has read of a checkpoint, while the other waits."""
ASKED_FOR_CUDA = "Torch not compiled with CUDA|Found no NVIDIA driver|Cannot re-initialize CUDA"
"""What a CPU build of torch says, a CUDA build, and a CUDA build in a forked process."""


@pytest.mark.multiprocess
@pytest.mark.proves("Every patch of the CPU platform is needed", how="each left out once")
def test_every_patch_is_needed(tmp_path: Path) -> None:
    names = [name for name in cpu.PATCHES if name != ON_ONE_RANK]
    payload = {"run_dir": str(tmp_path / "run"), "names": names}
    found = run_ranks("tests.parallel.platform_probe:main", payload, 2, tmp_path, timeout_s=120)
    assert set(found) == set(names)
    assert [name for name, error in found.items() if not error] == []
    payload = {"run_dir": str(tmp_path / "run"), "name": ON_ONE_RANK}
    with pytest.raises(RankError, match=ASKED_FOR_CUDA):
        run_ranks("tests.parallel.platform_probe:main_without", payload, 2, tmp_path, timeout_s=120)


@pytest.mark.proves(
    "The CPU platform is inert where CUDA is available", how="a machine that says it has CUDA"
)
def test_the_platform_does_nothing_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu.install() is False
    assert torch.cuda.current_device is before
