"""Arithmetic of a decoder layer: widths, weights, FLOPs. Everything that counts a model reads it here.

    D hidden    q, k  widths of all query heads and of all KV heads    F FFN    V vocabulary    L layers

    W   weights of a layer's matrix products = D (2 q + 2 k + 3 F)
    model FLOPs of training = 6 (L W + V D) tokens + 6 L q sum over documents of n^2

forward and backward, causal attention inside each document of n tokens, nothing for recomputation, padding or
the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSizes:
    """Widths of a decoder layer, as one tensor-parallel rank holds it."""

    hidden: int
    q: int
    """Query heads x head_dim."""
    kv: int
    """KV heads x head_dim, of keys alone."""
    ffn: int
    num_heads: int
    """Query heads."""
    head_dim: int
    qk_norm: bool
    """Whether queries and keys pass a norm of width head_dim."""

    @property
    def matrices(self) -> int:
        """Weights of the matrix products, W."""
        return self.hidden * (2 * self.q + 2 * self.kv + 3 * self.ffn)

    @property
    def parameters(self) -> list[int]:
        """Number of elements of every parameter, in megatron-core's order: norm, output projection, QKV
        (norms of queries and keys), norm, gate and up, down."""
        hidden = self.hidden
        attention = [self.q * hidden, (self.q + 2 * self.kv) * hidden]
        norms = [self.head_dim, self.head_dim] if self.qk_norm else []
        return [hidden, *attention, *norms, hidden, 2 * self.ffn * hidden, self.ffn * hidden]

    @property
    def cached_values(self) -> int:
        """Values that a KV cache keeps of a token."""
        return 2 * self.kv

    def attention_flops(self, num_tokens: float, document_tokens: float) -> float:
        """Forward FLOPs of causal attention of `num_tokens` tokens in documents of `document_tokens`."""
        return 2 * self.q * document_tokens * num_tokens
