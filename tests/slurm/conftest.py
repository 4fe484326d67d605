"""One cluster for all tests of this folder. Without SLURM they are skipped; CI installs it, and there they
fail."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes of 8 CPUs and 4 GPUs."""
    missing = missing_programs()
    if missing:
        reason = f"needs {', '.join(missing)} (apt-get install slurm-wlm munge)"
        if os.environ.get("CI"):
            pytest.fail(reason + ", which CI must have")
        pytest.skip(reason)
    with Cluster() as running:
        yield running
