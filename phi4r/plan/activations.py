"""Activations that one rank keeps for the backward pass, in bytes, counted from the tensors autograd saves.

    T  tokens of a row      t = T / cp  tokens of a context-parallel rank      s = t / tp under SP, else t
    D  hidden               q, k  widths of this rank's queries and of its keys (n_heads x head_dim / tp)
    F  ffn / tp             b  bytes of a value

One layer keeps two norms (s D in the forms their kernel saves), the inputs of the QKV and gate-up products
(s D each), what attention saves, the input of the output projection (t q), and in the MLP the gate-up product
(2 t F), silu(gate), up and their product (t F each). `tests/plan` holds the CPU kernels' forms to 10% of what
saved-tensor hooks count; the GPU forms follow from the kernels' definitions and are not measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phi4r.configs.sections import ModelConfig, ParallelConfig, TrainConfig
from phi4r.configs.stages import stage_layers
from phi4r.plan.states import BYTES, FP32

DENSE_MASK_TOKENS = 512
"""Rows up to this length go through one masked attention call on the CPU (`phi4r.models.backends`)."""


@dataclass(frozen=True)
class Kernels:
    """Which kernels run, as far as what they save differs.

    norm: "composite" upcasts to fp32 and saves x and x / rms; "fused" saves x as it came.
    attention: "flash" saves q, k, v, its output and a logsumexp; "per_document" the same with a call per
    document and the pieces joined (torch's sdpa); "masked" one call with a [t, T] mask; "written_out" the
    probabilities.
    """

    norm: Literal["composite", "fused"]
    attention: Literal["flash", "per_document", "masked", "written_out"]


def gpu_kernels(model: ModelConfig) -> Kernels:
    """What runs on a GPU."""
    return Kernels("fused", "per_document" if model.attention_backend == "sdpa" else "flash")


def cpu_kernels(model: ModelConfig, row_tokens: int) -> Kernels:
    """What runs on a machine without a GPU."""
    if model.attention_backend == "reference":
        return Kernels("composite", "written_out")
    return Kernels("composite", "masked" if row_tokens <= DENSE_MASK_TOKENS else "per_document")


class Activations:
    """Saved bytes of one microbatch (a packed row of `row_tokens` tokens) under a layout. document_tokens:
    length of its documents (0: one document fills the row, the most that attention can need)."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        train: TrainConfig,
        row_tokens: int,
        kernels: Kernels | None = None,
        document_tokens: int = 0,
    ) -> None:
        self.model, self.parallel, self.recompute = model, parallel, train.recompute
        self.kernels = kernels or gpu_kernels(model)
        self.row = row_tokens
        self.document_tokens = document_tokens or row_tokens
        self.tokens = row_tokens // parallel.cp
        self.residual_tokens = self.tokens // parallel.tp if parallel.sp else self.tokens
        self.width = BYTES[model.dtype]
        self.sizes = model.layer_sizes(parallel.tp)
        self.q, self.kv, self.ffn = self.sizes.q, self.sizes.kv, self.sizes.ffn

    @property
    def hidden_bytes(self) -> int:
        """The residual stream between two layers."""
        return self.residual_tokens * self.model.hidden_size * self.width

    def _norm(self) -> int:
        return self._normed(self.residual_tokens, self.model.hidden_size)

    def _normed(self, rows: int, width: int) -> int:
        """What a norm of `rows` vectors saves."""
        values = rows * width
        saved = 2 * FP32 * values if self.kernels.norm == "composite" else self.width * values
        return saved + FP32 * rows

    def _head_norms(self) -> int:
        """Norms of queries and keys, where the family has them."""
        if not self.sizes.qk_norm:
            return 0
        head_dim = self.sizes.head_dim
        return self._normed(self.tokens * (self.q + self.kv) // head_dim, head_dim)

    def core_attention(self) -> int:
        """What attention itself saves, apart from the output that the next product keeps anyway."""
        t, row, width, kernel = self.tokens, self.row, self.width, self.kernels.attention
        heads = self.sizes.num_heads
        if kernel == "written_out":
            return FP32 * (2 * row * self.q + t * self.q + heads * t * row) + t * row
        if self.parallel.cp > 1:
            keys = 2 * row * self.kv * width  # K and V of the whole row, gathered
        else:
            # V is a view of the QKV product and keeps all of it; K is a rotated copy.
            keys = t * (self.q + 2 * self.kv) * width + t * self.kv * width
        saved = keys + t * self.q * width + FP32 * heads * t
        if kernel == "per_document":
            saved += t * self.q * width + self._masks()
        if kernel == "masked":
            saved += t * row * width
        return saved

    def _masks(self) -> int:
        """Masks of the calls whose queries begin inside a document: the head of every zig-zag chunk but the
        row's first. Of the CP rank that has the most."""
        if self.parallel.cp == 1:
            return 0
        size, length = self.row // (2 * self.parallel.cp), self.document_tokens
        areas = []
        for chunk in range(2 * self.parallel.cp):
            start = chunk * size // length * length
            end = min((chunk + 1) * size, start + length)
            queries = end - chunk * size
            areas.append(queries * (end - start) if start < chunk * size else 0)
        return max(areas[i] + areas[-1 - i] for i in range(self.parallel.cp)) * self.width

    def layer(self) -> int:
        """A layer that keeps everything."""
        return self._around_attention() + self.core_attention()

    def _mlp(self) -> int:
        """A norm and the MLP behind it."""
        return self._norm() + self.hidden_bytes + 5 * self.tokens * self.ffn * self.width

    def _around_attention(self) -> int:
        projections = self._norm() + self.hidden_bytes + self.tokens * self.q * self.width
        return projections + self._head_norms() + self._mlp()

    def kept_layer(self) -> int:
        """What a layer keeps until its backward, under the run's recomputation."""
        if self.recompute == "full":
            return self.hidden_bytes
        if self.recompute == "selective":  # the inputs of core attention: a copy of Q, and the QKV product
            return self._around_attention() + self.tokens * (2 * self.q + 2 * self.kv) * self.width
        return self.layer()

    def recomputed_layer(self) -> int:
        """What comes on top for the one layer whose backward is running."""
        if self.recompute == "full":
            # An fp32 or fused norm keeps the layer's input itself, which is kept already.
            is_input = self.width == FP32 or self.kernels.norm == "fused"
            return self.layer() - (self.hidden_bytes if is_input else 0)
        if self.recompute == "selective":
            # The MLP's backward has run, and given its part back, before core attention is computed again.
            own_keys = self.parallel.cp == 1 and self.kernels.attention != "written_out"
            shared = self.tokens * (self.q + 2 * self.kv) * self.width if own_keys else 0  # V's storage
            return max(0, self.core_attention() - shared - self._mlp())
        return 0

    def rotary(self) -> int:
        """cos and sin of a row's positions, made once for all layers of a stage."""
        return 2 * FP32 * self.tokens * self.model.rotary.dim

    def head(self) -> int:
        """Final norm, and what the loss keeps per target: its hidden state, label and statistics. Every token
        is taken to be a target: prompts make it less."""
        per_target = self.model.hidden_size * self.width + 8 + 2 * FP32
        return self._norm() + self.tokens * (per_target + 1 + FP32)

    def microbatches_in_flight(self, pp_rank: int, num_microbatches: int) -> int:
        """Chunk-sized pieces of work whose backward is still to come, at the worst moment of the schedule."""
        pp, vpp = self.parallel.pp, self.parallel.vpp
        if vpp == 1:
            return min(num_microbatches, pp - pp_rank)
        return min(num_microbatches * vpp, (pp - pp_rank - 1) * 2 + (vpp - 1) * pp + 1)

    def layers_in_flight(self, pp_rank: int, num_microbatches: int) -> int:
        """Most layers, counted per microbatch, whose backward is still to come: a rank takes pp microbatches
        through each of its chunks in turn, and back through them in the other order."""
        pp, vpp = self.parallel.pp, self.parallel.vpp
        layers = stage_layers(self.model.num_layers, self.parallel)[pp_rank]
        pieces = self.microbatches_in_flight(pp_rank, num_microbatches)
        waiting = most = 0
        # Once the first backward has come, the pattern repeats after every chunk has had its turn.
        for forward in range(min(num_microbatches * vpp, pieces + pp * vpp)):
            waiting += layers[forward // pp % vpp]
            most = max(most, waiting)
            backward = forward - pieces + 1
            if backward >= 0:
                waiting -= layers[vpp - 1 - backward // pp % vpp]
        return most

    def peak(self, pp_rank: int, num_microbatches: int) -> int:
        """Most bytes saved at any moment on a pipeline rank."""
        parallel = self.parallel
        layers = self.layers_in_flight(pp_rank, num_microbatches)
        pieces = self.microbatches_in_flight(pp_rank, num_microbatches)
        rotary = 0 if self.recompute == "full" else self.rotary()
        kept = layers * self.kept_layer() + pieces * rotary
        extra = self.recomputed_layer() + (self.rotary() if self.recompute == "full" else 0)
        if pp_rank < parallel.pp - 1:
            return kept + extra
        # The head's part is given back before the first layer's backward.
        return kept + max(self.head(), extra)
