"""The CPU platform: lets megatron-core 0.16.1 run over gloo on a machine without CUDA.

megatron-core names CUDA in a few places even where the arithmetic is device-neutral (buffers created on
``torch.cuda.current_device()``, ``device="cuda"`` scalars, ``param.type() == "torch.cuda.FloatTensor"``
checks). `install` redirects exactly these to the CPU. It is the only place in phi4r that touches foreign
attributes, it does nothing where CUDA is available, and `PATCHES` names every patch so that a test can leave
each one out and see what breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

PATCHES: dict[str, str] = {
    "redirect_device": 'device="cuda" given to tensor factories: token counts, gradient-norm scalars',
    "redirect_cuda_call": "Tensor.cuda(): slices and checkpoint exchange buffers",
    "claim_cuda_type": "Tensor.type() says torch.cuda.* and Float for fp64: optimizers accept no other types",
    "keep_double": "Tensor.float() leaves fp64 alone: optimizers cast gradients to fp32 with it",
    "current_device": "torch.cuda.current_device(): gradient buffers, receive buffers, SP collectives",
    "synchronize": "torch.cuda.synchronize(): checkpoint saving shared by data-parallel ranks",
    "rng_state": "CUDA RNG state calls, used by activation recomputation, act on the CPU generator",
}


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites explicit CUDA requests in torch calls; `left_out` holds names of `PATCHES` to disable (tests
    only)."""

    def __init__(self, left_out: Collection[str]) -> None:
        super().__init__()
        self.redirect_device = "redirect_device" not in left_out
        self.redirect_cuda_call = "redirect_cuda_call" not in left_out
        self.claim_cuda_type = "claim_cuda_type" not in left_out
        self.keep_double = "keep_double" not in left_out

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if self.redirect_device and device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": CPU}
        if self.redirect_cuda_call and func is torch.Tensor.cuda:
            return args[0]
        if self.keep_double and func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        result = func(*args, **kwargs)
        if self.claim_cuda_type and func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1).replace("Double", "Float")
        return result


_active: list[_CudaMeansCpu] = []


def install(left_out: Collection[str] = ()) -> bool:
    """Make megatron-core run on the CPU; call once, before any megatron object is built.

    left_out: names from `PATCHES` to leave unpatched, for the test that shows each to be needed.
    Returns True where the platform is active (no CUDA), False where CUDA is available and nothing was
    touched.
    """
    unknown = set(left_out) - set(PATCHES)
    assert not unknown, f"unknown patch names: {sorted(unknown)}"
    if torch.cuda.is_available():
        return False
    if _active:
        return True
    # A mode stays entered for the life of the process; megatron's schedules run in this thread.
    mode = _CudaMeansCpu(left_out)
    mode.__enter__()
    _active.append(mode)
    if "current_device" not in left_out:
        torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    if "synchronize" not in left_out:
        torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    if "rng_state" not in left_out:
        import megatron.core.tensor_parallel.random as megatron_random

        torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()  # type: ignore[assignment]
        torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
        torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
        megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
            state
        )
    return True
