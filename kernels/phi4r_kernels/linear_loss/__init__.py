"""The head and its loss in one pass: `head` drives, `tokens` is what an objective sees, and the elementwise
steps exist twice, in plain PyTorch and as Triton kernels."""

from phi4r_kernels.linear_loss.head import Backend, LinearLossResult, linear_logprobs, linear_loss
from phi4r_kernels.linear_loss.tokens import FusedLoss, Objective, Tokens, cross_entropy

__all__ = [
    "Backend",
    "FusedLoss",
    "LinearLossResult",
    "Objective",
    "Tokens",
    "cross_entropy",
    "linear_logprobs",
    "linear_loss",
]
