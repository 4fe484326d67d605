"""The cluster of these tests is a real one."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_a_step_runs_on_two_nodes_with_two_gpus_each(cluster: Cluster) -> None:
    text = cluster.run(
        "srun", "-N2", "--ntasks-per-node=2", "--gpus-per-node=2", "bash", "-c",
        "echo $SLURM_PROCID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES",
    )  # fmt: skip
    assert sorted(text.splitlines()) == [
        "0 127.0.0.1 0,1", "1 127.0.0.1 0,1", "2 127.0.0.2 0,1", "3 127.0.0.2 0,1",
    ]  # fmt: skip
