"""The settings of megatron-core's optimizer from ours."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from phi4r.configs.sections import ModelConfig, OptimizerConfig, ParallelConfig
from phi4r.core import optional
from phi4r.core.errors import UserError
from phi4r.models.gpt import DTYPES


def memory_options(optimizer: OptimizerConfig) -> dict[str, Any]:
    """What `optimizer.moments` and `optimizer.offload` are to megatron-core."""
    if optimizer.offload:
        return dict(
            optimizer_cpu_offload=True,
            optimizer_offload_fraction=optimizer.offload,
            overlap_cpu_optimizer_d2h_h2d=True,
            use_precision_aware_optimizer=True,  # gradients reach the host's optimizer by its path only
        )
    if optimizer.moments == "fp32":
        return {}
    return dict(
        use_precision_aware_optimizer=True,
        exp_avg_dtype=DTYPES[optimizer.moments],
        exp_avg_sq_dtype=DTYPES[optimizer.moments],
        # The low halves of master weights alone, beside bf16 weights, would make checkpoints that only
        # transformer-engine can read.
        store_param_remainders=False,
    )


def megatron_settings(
    model: ModelConfig, parallel: ParallelConfig, optimizer: OptimizerConfig
) -> MegatronOptimizerConfig:
    """megatron-core's optimizer settings; UserError for what this machine cannot do."""
    if optimizer.offload and not torch.cuda.is_available():
        raise UserError("optimizer.offload: there is no GPU here, so the state is in host memory; expected 0")
    if memory_options(optimizer):  # either asks megatron-core for transformer-engine's version
        optional.require("transformer_engine")
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
        bf16=model.dtype == "bf16",
        params_dtype=DTYPES[model.dtype],
        **memory_options(optimizer),
    )
