"""A decoder as a megatron-core GPTModel: config, layer spec, head, and the model chunks of this rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from phi4r_kernels.linear_loss import LinearLossResult
from torch import Tensor

from phi4r.configs.sections import ModelConfig, ParallelConfig, TrainConfig
from phi4r.configs.stages import stage_layers, vocab_rows
from phi4r.core import optional
from phi4r.core.errors import UserError
from phi4r.families.family import Family
from phi4r.models.attention import CoreAttention
from phi4r.models.backends import select_backend
from phi4r.models.head import HeadRequest, LogprobHead
from phi4r.models.packed import PackedContext

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, variance in fp32; unlike megatron's torch norm it allows sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # finalize_model_grads sums the gradients of parameters so marked over the TP group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


def layer_spec(family: Family, kind: str = "local") -> ModuleSpec:
    """A decoder layer, its matrix products from megatron-core ("local") or from transformer-engine.

    Norms and core attention are ours in both, so that parameters have the same names: weights, checkpoints,
    exports and the memory plan do not depend on `kind`."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention = layer.submodules.self_attention.submodules
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention.core_attention = CoreAttention
    if family.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if kind == "transformer_engine":
        # megatron-core imports transformer-engine where it finds it, and has stand-ins otherwise.
        from megatron.core.extensions import transformer_engine as te

        mlp = layer.submodules.mlp.submodules
        attention.linear_qkv, attention.linear_proj = te.TEColumnParallelLinear, te.TERowParallelLinear
        mlp.linear_fc1, mlp.linear_fc2 = te.TEColumnParallelLinear, te.TERowParallelLinear
    return layer


class DecoderModel(GPTModel):
    """GPTModel whose last stage answers a `HeadRequest` instead of returning logits."""

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, *, layers: str = "local", **stage: Any
    ) -> None:
        layer = layer_spec(model.description, layers)
        tp = config.tensor_model_parallel_size
        num_layers = get_num_layers_to_build(config, stage["vp_stage"])
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[layer] * num_layers, layer_norm=RMSNorm
            ),
            vocab_size=vocab_rows(model.vocab_size, tp) * tp,
            max_sequence_length=model.max_position_embeddings,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="none",  # CoreAttention rotates
            parallel_output=True,
            **stage,
        )
        if self.post_process:
            # GPTModel names its output layer's class itself; ours adds no state, so the built one is retyped.
            self.output_layer.__class__ = LogprobHead
            self.output_layer.vocab_size = model.vocab_size

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, context: PackedContext, request: HeadRequest
    ) -> Tensor | LinearLossResult:
        """input_ids int64 [1, T local]; returns hidden states between stages, the answer to `request` on the
        last."""
        hidden = super().forward(input_ids, None, None, packed_seq_params=context)
        if not self.post_process:
            return hidden
        table = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            table = self.shared_embedding_or_output_weight()
        answer: Tensor | LinearLossResult = self.output_layer(
            hidden, table, request, self.config.sequence_parallel
        )
        return answer

    def _postprocess(self, hidden_states: Tensor, **unused: Any) -> Tensor:
        return hidden_states


FP8_FORMATS = {"tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""train.fp8 -> number format. Where a whole tensor shares a scale, gradients need E5M2's range. These recipes
keep no history of scales, so that a checkpoint holds none."""


def pipeline_layout(num_layers: int, parallel: ParallelConfig) -> list[list[str]]:
    """megatron-core's list of what every pipeline stage holds, in the order of the layers."""
    by_rank = stage_layers(num_layers, parallel)
    counts = [by_rank[rank][stage] for stage in range(parallel.vpp) for rank in range(parallel.pp)]
    stages = [["decoder"] * count for count in counts]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig | None = None
) -> TransformerConfig:
    """Megatron-core's config for a model under a layout. Of `train`: recompute and fp8."""
    train = train or TrainConfig()
    dtype = DTYPES[model.dtype]
    on_cpu = not torch.cuda.is_available()
    if dtype == torch.float64 and not on_cpu:
        raise UserError("model.dtype: fp64 trains on CPU only, expected fp32 or bf16 where there is a GPU")
    options: dict[str, Any] = {}
    if train.recompute == "full":
        options = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif train.recompute == "selective":
        options = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    interleaved = parallel.vpp > 1
    if parallel.pp > 1:
        options["pipeline_model_parallel_layout"] = pipeline_layout(model.num_layers, parallel)
    if train.fp8 != "off":
        options |= dict(fp8=FP8_FORMATS[train.fp8], fp8_recipe=train.fp8)
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        qk_layernorm=model.description.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,  # weights come from the name table, independent of the layout
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if interleaved else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sp,
        # Fusions compile with C++ on CPU or need transformer-engine.
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        batch_p2p_sync=False,
        # On gloo a freed tensor may still be in flight: silently wrong losses with interleaving.
        deallocate_pipeline_outputs=not on_cpu,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        **options,
    )
    config.phi4r_rotary = model.rotary
    config.phi4r_attention_backend = select_backend(model.attention_backend, model.head_dim, model.dtype)
    return config


def _mark_sharded_parameters(chunk: DecoderModel) -> None:
    """Tell megatron which parameters are slices. It only does so itself while it initialises weights, and
    counts an unmarked slice once instead of once per TP rank in the gradient norm: clipping would be silently
    wrong."""
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, 0, 1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, 1, 1)


def build_model(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig | None = None
) -> list[DecoderModel]:
    """This rank's model chunks (one per virtual stage), parameters allocated but not filled. Of `train`:
    recompute, layers and fp8.

    Call after `init_layout`. `model.vocab_size` must be set. UserError where transformer-engine is asked for
    and not installed.
    """
    train = train or TrainConfig()
    if train.layers == "transformer_engine":
        optional.require("transformer_engine")
    config = transformer_config(model, parallel, train)
    chunks = []
    for stage in range(parallel.vpp):
        vp_stage = stage if parallel.vpp > 1 else None
        ignore_virtual = vp_stage is None
        chunk = DecoderModel(
            config,
            model,
            layers=train.layers,
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        _mark_sharded_parameters(chunk)
        chunks.append(chunk)
    return chunks
