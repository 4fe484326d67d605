"""What a run needs and how long it takes, before it is submitted: memory per rank, legal layouts, step time.

Arithmetic on configurations only, so it answers on a login node in under a second: no torch, no megatron, and
nothing here may import the trainer. What is exact (weights, gradients, optimizer state) and what is derived
(activations) is compared with real ranks by `tests/plan`; what is an estimate says so where it is printed.
"""

from phi4r.plan.verdict import PlanVerdict, check

__all__ = ["PlanVerdict", "check"]
