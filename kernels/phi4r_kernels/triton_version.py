"""Which versions of Triton the kernels are for: `untested()` is what "auto" asks before it takes them."""

from __future__ import annotations

import functools
import importlib.util
import warnings

TESTED = ("3.6.0", "3.7.1")
"""With these every kernel that ships compiles without spills (`python -m benchmarks.compile_check`) and the
tests pass in the interpreter. torch 2.10 and 2.11 bring the first, 2.13 the second."""


@functools.cache
def untested() -> str:
    """Why "auto" does not take the Triton kernels here; "" if it may. Another version than those of TESTED is
    warned of once in a process."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton  # not at the top: it reads TRITON_INTERPRET when it is first imported

    version = triton.__version__.split("+")[0]
    if version in TESTED:
        return ""
    reason = f"the kernels are tested with triton {' and '.join(TESTED)}, this is {version}"
    warnings.warn(f"Triton kernels are not used by 'auto', torch's operators are: {reason}", stacklevel=2)
    return reason
