"""Skips what needs a GPU where there is none, with the reason."""

from __future__ import annotations

import os

import pytest
import torch


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()}, kernels need 8.0"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1: this process interprets kernels"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why_not = _why_not()
    for item in items:
        if why_not and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=why_not))
