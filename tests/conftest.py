"""Triton kernels are interpreted in the tests, on CPU tensors: triton reads this when it is first imported,
by whichever test comes first. `TRITON_INTERPRET=0 pytest -m gpu` compiles them instead."""

from __future__ import annotations

import os

from tests.proved import pytest_addoption, pytest_collection_finish

__all__ = ["pytest_addoption", "pytest_collection_finish"]

os.environ.setdefault("TRITON_INTERPRET", "1")
