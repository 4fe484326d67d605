"""Memory of every pipeline stage of a run, line by line, and the worst of them.

Exact: weights, gradients, optimizer state (`states`), the KV cache. Counted: saved activations
(`activations`). Estimates, marked so where they are printed: working memory, communication buffers, the
runtime's own memory, and a margin for fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from phi4r.configs.stages import RLConfig, SFTConfig, stage_layers, vocab_rows
from phi4r.plan.activations import Activations, Kernels
from phi4r.plan.states import BYTES, FP32, States, rank_chunks, rank_elements, rank_states

GIB = 2**30
RUNTIME_GIB = 2.0
"""CUDA context, cuBLAS workspaces and NCCL's channels of a rank (estimate)."""
FRAGMENTATION = 0.05
"""Share of the GPU's memory left free because the allocator cannot use all of it (estimate)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the ranks of one pipeline stage, by what they are for."""

    pp_rank: int
    parameters: int
    gradients: int
    optimizer: int
    reference: int
    """Frozen copy of the weights (RL)."""
    activations: int
    head: int
    """Logits of one chunk of tokens, and the gradients that the one-pass head makes in the forward."""
    working: int
    """Temporary tensors of the busiest layer, or of the optimizer's step where that is more."""
    communication: int
    """Buffers that SP, CP and PP gather into."""
    kv_cache: int
    """Keys and values of the rollout; they are gone when the training pass begins."""
    runtime: int

    @property
    def states(self) -> States:
        """Weights, gradients and optimizer state: what is there between steps."""
        return States(self.parameters, self.gradients, self.optimizer)

    @property
    def total(self) -> int:
        """Bytes at the worst moment: the training pass or the rollout, whichever is more."""
        steady = self.states.total + self.reference + self.runtime
        training = self.activations + self.head + self.working + self.communication
        return steady + max(training, self.kv_cache)

    def lines(self) -> list[tuple[str, float]]:
        """(name, GiB) of every part that is not zero."""
        parts = [(f.name, getattr(self, f.name) / GIB) for f in fields(self) if f.name != "pp_rank"]
        return [(name.replace("_", " "), gib) for name, gib in parts if gib > 0]


def row_tokens(config: SFTConfig | RLConfig) -> int:
    """Tokens of a packed row."""
    if isinstance(config, SFTConfig):
        return config.data.seq_length
    rollout = config.rollout
    longest = rollout.max_prompt_tokens + config.sampling.max_new_tokens
    return config.parallel.fit_row(max(longest, rollout.row_tokens))


def num_microbatches(config: SFTConfig | RLConfig) -> int:
    """Rows of a data-parallel rank in one optimizer step. For RL: as if every sample were as long as
    possible."""
    if isinstance(config, SFTConfig):
        return max(1, config.train.global_batch_size // config.parallel.dp)
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    return max(1, -(-samples // (config.parallel.dp * config.objective.updates_per_rollout)))


def kv_bytes(config: RLConfig, layers: int) -> int:
    """The embedded engine's cache on one rank: slots x longest sequence x this rank's layers and KV heads."""
    model, rollout, parallel = config.model, config.rollout, config.parallel
    replicas = parallel.dp * parallel.cp
    samples = rollout.prompts_per_step * rollout.group_size
    slots = min(config.sampling.num_slots, -(-samples // replicas))
    longest = rollout.max_prompt_tokens + config.sampling.max_new_tokens
    per_token = 2 * model.num_query_groups // parallel.tp * model.head_dim * BYTES[model.dtype]
    return slots * longest * layers * per_token


def stage_memory(config: SFTConfig | RLConfig, pp_rank: int, kernels: Kernels | None = None) -> Memory:
    """`Memory` of the ranks of pipeline stage `pp_rank`."""
    model, parallel, chunk = config.model, config.parallel, config.train.logit_chunk_size
    states = rank_states(model, parallel, pp_rank, optimizer=config.optimizer)
    activations = Activations(model, parallel, config.train, row_tokens(config), kernels)
    tokens, width, hidden = activations.tokens, activations.width, model.hidden_size
    is_last = pp_rank == parallel.pp - 1
    vocabulary = vocab_rows(model.vocab_size, parallel.tp)
    head = 0
    if is_last:
        # One chunk's fp32 logits, which become their own gradient, and the gradients of hidden states and
        # head that wait for the backward: `phi4r_kernels.linear_loss`.
        head = FP32 * min(chunk, tokens) * vocabulary + tokens * hidden * width
        head += (FP32 + width) * vocabulary * hidden
    # Backward of the MLP: gradients of the gate-up product and of what follows it, and one weight gradient.
    gradients = 4 * tokens * activations.ffn * width + 2 * tokens * hidden * width
    layer = gradients + 2 * activations.ffn * hidden * width
    adam = FP32 * rank_elements(model, parallel, pp_rank)[1]  # one temporary per element
    training = activations.peak(pp_rank, num_microbatches(config)) + head + layer
    working = layer + max(0, adam - training)
    communication = 0
    if parallel.sp:
        communication += 2 * tokens * hidden * width
    if parallel.cp > 1:
        communication += 4 * activations.row * activations.kv * width
    if parallel.pp > 1:
        communication += 4 * activations.hidden_bytes
    reference = kv = 0
    if isinstance(config, RLConfig):
        chunks = rank_chunks(model, parallel, pp_rank)
        if config.needs_reference:
            reference = width * sum(sum(weights) for weights in chunks)
        layers = sum(stage_layers(model.num_layers, parallel)[pp_rank])
        if config.sampling.engine == "embedded":
            kv = kv_bytes(config, layers)
    return Memory(
        pp_rank=pp_rank,
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        reference=reference,
        activations=activations.peak(pp_rank, num_microbatches(config)),
        head=head,
        working=working,
        communication=communication,
        kv_cache=kv,
        runtime=int(RUNTIME_GIB * GIB),
    )


def worst_stage(config: SFTConfig | RLConfig, kernels: Kernels | None = None) -> Memory:
    """The stage that needs the most memory. `model.vocab_size` must be known.

    Stages between the second and the last are like the second with less in flight, so three are looked at
    unless `parallel.stage_layers` makes them differ.
    """
    last = config.parallel.pp - 1
    ranks = range(last + 1) if config.parallel.stage_layers else sorted({0, min(1, last), last})
    return max(
        (stage_memory(config, rank, kernels) for rank in ranks),
        key=lambda memory: memory.total,
    )
