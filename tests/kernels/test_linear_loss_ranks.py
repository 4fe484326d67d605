"""The head whose vocabulary, or whose sequences, are spread over ranks, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phi4r.parallel.launch import run_ranks
from tests.kernels import linear_loss_ranks

pytest.importorskip("triton")
pytestmark = pytest.mark.multiprocess


@pytest.mark.proves(
    "The head over ranks that share vocabulary or sequences equals one process",
    how="loss and gradients of real ranks",
    layouts="vocabulary over 2, sequences over 2",
)
def test_ranks_that_share_vocabulary_or_sequences_equal_one_process(tmp_path: Path) -> None:
    found = run_ranks("tests.kernels.linear_loss_ranks:run", {}, 2, tmp_path, timeout_s=300, threads=1)
    assert len(found) == 2 * len(linear_loss_ranks.SPECS) - 1 + 2 * len(linear_loss_ranks.SPECS)
    # Kernels are held to their budget by the ranks; this is float64, sums of some hundred terms up to 30.
    assert max(found.values()) <= 1e5 * torch.finfo(torch.float64).eps, found
