"""Triton kernels are interpreted in the tests, on CPU tensors: triton reads this when it is first imported,
by whichever test comes first. `TRITON_INTERPRET=0 pytest -m gpu` compiles them instead."""

from __future__ import annotations

import os
from collections.abc import Generator

import hypothesis
import pytest

from tests import preloaded
from tests.proved import pytest_addoption, pytest_collection_finish
from tests.timing import Timing

__all__ = ["pytest_addoption", "pytest_collection_finish"]

os.environ.setdefault("TRITON_INTERPRET", "1")
# No example may fail for taking long: machines differ by a factor of three, and others work on them too.
hypothesis.settings.register_profile("phi4r", deadline=None)
hypothesis.settings.load_profile("phi4r")
preloaded.install()


def pytest_configure(config: pytest.Config) -> None:
    """Every run ends with where its time went."""
    config.pluginmanager.register(Timing(), "timing")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with jobs of several ranks first: they are the longest, and workers should end together."""
    long = {item.path for item in items if item.get_closest_marker("multiprocess")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests marked `fresh` and their fixtures start every process from nothing."""
    if item.get_closest_marker("fresh"):
        with preloaded.fresh_processes():
            return (yield)
    return (yield)
