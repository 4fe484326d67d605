"""Triton kernels are interpreted in the tests, on CPU tensors: triton reads this when it is first imported,
by whichever test comes first. `TRITON_INTERPRET=0 pytest -m gpu` compiles them instead."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
