"""How long a step takes: a roofline of each part of the slowest pipeline stage, added up.

Nothing here was fitted to a run: rates are those of `hardware`, volumes follow from shapes, and what overlaps
is what megatron-core overlaps with `parallel.overlap`. Read the result as what good hardware can give, and
measure.

    MFU = model FLOPs (`ModelConfig.training_flops`) / (step time x GPUs x peak of the data sheet)
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from phi4r.configs.stages import RLConfig, SFTConfig, stage_layers
from phi4r.plan.activations import Activations
from phi4r.plan.hardware import NETWORK_GB_S, NVLINK_GB_S, PRODUCT_EFFICIENCY, Rates
from phi4r.plan.memory import num_microbatches, row_tokens
from phi4r.plan.states import BYTES, rank_elements, rank_states

BACKWARD_ATTENTION = 2.5
"""FLOPs of attention's backward, in forwards."""
HEAD_PRODUCTS = 3
"""Products of the size of the logits: the logits themselves, and two gradients."""
ADAM_BYTES = 30
"""Bytes moved per element of optimizer state: gradient, moments, master weights, weights."""
HOST_GB_S = 25.0
"""What a rank's AdamW in host memory moves (estimate: a socket's memory shared by four ranks)."""
DECODE_LAYER_S = 1.5e-4
"""Time of launching one layer of a decoding step, eager (estimate)."""
PROMPT_SHARE = 0.25
"""Mean prompt over rollout.max_prompt_tokens (assumption)."""


@dataclass(frozen=True)
class Work:
    """What the planner is told about the data: mean document length (by tokens), and for RL the mean
    response."""

    document_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they are spent on."""

    products: float
    attention: float
    elementwise: float
    head: float
    recomputation: float
    tensor_parallel: float
    context_parallel: float
    pipeline_transfer: float
    pipeline_bubble: float
    data_parallel: float
    optimizer: float
    generation: float
    reference_pass: float

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def training(self) -> float:
        """Without the rollout."""
        return self.total - self.generation


def model_flops_per_token(config: SFTConfig | RLConfig, document_tokens: float) -> float:
    """Forward and backward FLOPs per token of documents of `document_tokens`."""
    return config.model.training_flops(1, document_tokens)


def tokens_per_step(config: SFTConfig | RLConfig, work: Work) -> float:
    """Tokens that one step trains on: full rows, or the samples of a rollout."""
    if isinstance(config, SFTConfig):
        return float(config.train.global_batch_size * config.data.seq_length)
    rollout = config.rollout
    sample = work.response_tokens + PROMPT_SHARE * rollout.max_prompt_tokens
    return rollout.prompts_per_step * rollout.group_size * sample


def _link(ranks: int, gpus_per_node: int) -> float:
    """Bytes per second of a collective over consecutive ranks."""
    return (NVLINK_GB_S if ranks <= gpus_per_node else NETWORK_GB_S) * 1e9


def step_time(config: SFTConfig | RLConfig, rates: Rates, gpus_per_node: int, work: Work) -> StepTime:
    """`StepTime` of a step of `config`."""
    model, p = config.model, config.parallel
    row, width = row_tokens(config), BYTES[model.dtype]
    kept = Activations(model, p, config.train, row)
    t, hidden = kept.tokens, model.hidden_size
    document = min(work.document_tokens, row)
    microbatches = _microbatches(config, work)

    gemm = rates.gemm.value * 1e12 * PRODUCT_EFFICIENCY
    copy = rates.copy.value * 1e9
    products = 2 * t * model.layer_sizes().matrices / p.tp / gemm
    attention = model.layer_sizes().attention_flops(t, document) / p.tp
    forward_attention = attention / (rates.attention_forward.value * 1e12)
    backward_attention = BACKWARD_ATTENTION * attention / (rates.attention_backward.value * 1e12)
    moved = 2 * kept.layer() / copy  # written once, read once

    tp_volume = 2 * (p.tp - 1) / p.tp * t * hidden * width / _link(p.tp, gpus_per_node)
    tp_forward = 2 * tp_volume
    tp_backward = (3 if p.sp else 2) * tp_volume
    cp_volume = (p.cp - 1) / p.cp * 2 * row * kept.kv * width / _link(p.tp * p.cp, gpus_per_node)

    layers = max(sum(chunks) for chunks in stage_layers(model.num_layers, p))
    per_layer = microbatches * layers
    recomputed = {
        "none": 0.0,
        "selective": forward_attention + cp_volume,
        "full": products + forward_attention + moved + tp_forward + cp_volume,
    }[config.train.recompute]
    head = HEAD_PRODUCTS * 2 * t * hidden * model.vocab_size / p.tp / gemm
    layer = 3 * products + forward_attention + backward_attention + 2.5 * moved + recomputed
    layer += tp_forward + tp_backward + 2 * cp_volume
    stage = layers * layer + head
    transfer = 2 * p.vpp * kept.hidden_bytes / (NETWORK_GB_S * 1e9) if p.pp > 1 else 0.0
    parts = {
        "products": 3 * per_layer * products,
        "attention": per_layer * (forward_attention + backward_attention),
        "elementwise": 2.5 * per_layer * moved,
        "head": microbatches * head,
        "recomputation": per_layer * recomputed,
        "tensor_parallel": per_layer * (tp_forward + tp_backward),
        "context_parallel": per_layer * 2 * cp_volume,
        "pipeline_transfer": microbatches * transfer,
        "pipeline_bubble": (p.pp - 1) / p.vpp * stage,
    }
    forward = layers * (products + forward_attention + moved + tp_forward + cp_volume)
    parts["data_parallel"] = _data_parallel(config, gpus_per_node, forward, stage - forward)
    offloaded = config.optimizer.offload
    moved_bytes = ADAM_BYTES * rank_elements(model, p)[1]
    parts["optimizer"] = moved_bytes * ((1 - offloaded) / copy + offloaded / (HOST_GB_S * 1e9))
    parts["generation"] = parts["reference_pass"] = 0.0
    if isinstance(config, RLConfig):
        passes = config.needs_reference + config.objective.needs_old
        parts["reference_pass"] = passes * (microbatches + p.pp - 1) * (forward + head / HEAD_PRODUCTS)
        parts["generation"] = _generation(config, rates, work)
    return StepTime(**parts)


def _microbatches(config: SFTConfig | RLConfig, work: Work) -> float:
    if isinstance(config, SFTConfig):
        return float(num_microbatches(config))
    rows = tokens_per_step(config, work) / row_tokens(config)
    return float(max(1, -(-rows // config.parallel.dp)))


def _data_parallel(
    config: SFTConfig | RLConfig, gpus_per_node: int, forward: float, backward: float
) -> float:
    """Gradient reduction and parameter gathering that no computation hides. With overlap they hide behind the
    last microbatch's backward and the first one's forward."""
    p = config.parallel
    ranks = p.dp * p.cp
    if ranks == 1:
        return 0.0
    states = rank_states(config.model, p)
    link, share = _link(p.tp * ranks, gpus_per_node), (ranks - 1) / ranks
    reduce = share * states.gradients / link * (1 if p.distributed_optimizer else 2)
    gather = share * states.parameters / link if p.distributed_optimizer else 0.0
    if not p.overlap:
        return reduce + gather
    return max(0.0, reduce - backward) + max(0.0, gather - forward)


def _generation(config: RLConfig, rates: Rates, work: Work) -> float:
    """The embedded engine's rollout: decoding steps x (weights and keys read, layers launched). A replica
    decodes num_slots sequences at once and goes on until its longest one, taken to be the longest allowed,
    has ended."""
    model, p, rollout = config.model, config.parallel, config.rollout
    width = BYTES[model.dtype]
    samples = -(-rollout.prompts_per_step * rollout.group_size // (p.dp * p.cp))
    slots = min(config.sampling.num_slots, samples)
    steps = max(float(config.sampling.max_new_tokens), samples * work.response_tokens / slots)
    weights = model.num_parameters * width / p.tp
    per_token = model.layer_sizes().cached_values * width * model.num_layers / p.tp
    keys = slots * (work.response_tokens / 2) * per_token
    step = (weights + keys) / (rates.copy.value * 1e9) + DECODE_LAYER_S * model.num_layers
    return steps * step
