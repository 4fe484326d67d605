"""The linear loss's Triton kernels as they are launched at Phi-4's vocabulary, to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from phi4r_kernels.aot import Variant
from phi4r_kernels.linear_loss import FusedLoss
from phi4r_kernels.linear_loss import elementwise_triton as kernels

VOCABULARY = 100_352
ARCHS = (80, 90, 100)

# What each name of a kernel's arguments is; the rest are fp32 numbers.
_INTS = ("count", "size", "stride", "grad_stride", "terms_stride")
_POINTERS = {"targets": "*i64", "stats": "*fp32", "terms": "*fp32"}
_POINTERS |= {"values": "*fp32", "points": "*fp32"}
_ALIGNED = ("size", "stride", "grad_stride")

SPECS = {
    "cross-entropy": (FusedLoss(), False),
    "on-policy": (FusedLoss(policy=True, kl_coef=1e-3, entropy_coef=1e-3), True),
    "all": (
        FusedLoss(
            policy=True,
            dual_clip=3.0,
            kl_coef=1e-3,
            kl_reference="ref",
            entropy_coef=1e-3,
            importance_cap=2.0,
        ),
        False,
    ),
}
"""Name -> the loss, and whether it is strictly on-policy."""


def _variant(
    name: str, arch: int, kernel: Any, logits: str, constexprs: dict[str, Any], num_warps: int
) -> Variant:
    types = dict.fromkeys(_INTS, "i32") | _POINTERS | {"logits": f"*{logits}", "grads": "*bf16"}
    signature = {a: types.get(a, "fp32") for a in kernel.arg_names if a not in constexprs}
    aligned = tuple(a for a, kind in signature.items() if kind[0] == "*" or a in _ALIGNED)
    return Variant(f"head {name} sm_{arch}", arch, kernel, signature, constexprs, aligned, num_warps, 3)


def variants() -> Iterator[Variant]:
    """Every kernel, for fp32 and bf16 logits and bf16 gradients, and the losses of SPECS."""
    for arch in ARCHS:
        launch = kernels.launch_of(VOCABULARY, arch)
        stats = {"LANES": launch.lanes, "STAGES": launch.num_stages}
        for logits in ("fp32", "bf16"):
            overlap = {"OVERLAP": logits == "fp32"}
            for name, (fused, on_policy) in SPECS.items():
                constants = {**kernels.constants_of(fused, on_policy), **overlap, **stats}
                yield _variant(
                    f"loss_and_grad {name} {logits}", arch, kernels._loss_and_grad_kernel, logits, constants,
                    launch.num_warps,
                )  # fmt: skip
            for entropy in (False, True):
                tag = f"{'with' if entropy else 'without'} entropy {logits}"
                yield _variant(
                    f"stats {tag}", arch, kernels._stats_kernel, logits, {"ENTROPY": entropy, **stats},
                    launch.num_warps,
                )  # fmt: skip
                yield _variant(
                    f"grad {tag}", arch, kernels._grad_kernel, logits,
                    {"ENTROPY": entropy, **overlap, "BLOCK": launch.block}, launch.num_warps,
                )  # fmt: skip
