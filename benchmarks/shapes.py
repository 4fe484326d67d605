"""Shapes, mixes of documents, and how many FLOPs and bytes they cost.

    T tokens, D hidden, N query heads, K KV heads, H head dim, F FFN, V vocabulary, L layers, S one document

FLOP conventions, those of the published figures we compare with: a multiply-add counts two; causal attention
counts half of full attention, whatever an implementation computes; recomputation counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIXES = ("dense", "uniform", "lognormal", "giant")


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that the benchmarks need."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    num_layers: int

    @property
    def qkv(self) -> int:
        """Columns of the joint projection: N H + 2 K H."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def layer_parameters(self) -> int:
        """Weights of one layer's four matrix products: D (N + 2K) H + N H D + 3 D F."""
        return self.hidden * (self.qkv + self.num_heads * self.head_dim + 3 * self.ffn)


SHAPES = {
    "phi4": Shape("phi4", 5120, 40, 10, 128, 17_920, 100_352, 40),
    "tiny": Shape("tiny", 64, 4, 2, 16, 128, 512, 2),
}
TOKENS = {"phi4": (4096, 8192, 32_768), "tiny": (64, 128)}


def documents(mix: str, num_tokens: int, seed: int = 0) -> list[int]:
    """Lengths of the documents packed into one row; they sum to `num_tokens`.

    dense      one document
    uniform    eight of equal length
    lognormal  like reasoning traces: log-normal with median T/8 (4,096 of 32K) and sigma 0.9, none above T/4
    giant      one of 3T/4, and 32 that share the rest

    ValueError for another name, or where T is below 64.
    """
    if num_tokens < 64:
        raise ValueError(f"a mix needs at least 64 tokens, found {num_tokens}")
    if mix == "dense":
        return [num_tokens]
    if mix == "uniform":
        return _shares(num_tokens, 8)
    if mix == "giant":
        rest = num_tokens // 4
        return [num_tokens - rest, *_shares(rest, min(32, rest))]
    if mix != "lognormal":
        raise ValueError(f"mix must be one of {', '.join(MIXES)}, found {mix!r}")
    random = np.random.default_rng(seed)
    lengths: list[int] = []
    left = num_tokens
    while left:
        drawn = int(random.lognormal(np.log(num_tokens / 8), 0.9))
        lengths.append(min(left, max(1, min(drawn, num_tokens // 4))))
        left -= lengths[-1]
    return lengths


def _shares(total: int, count: int) -> list[int]:
    size, more = divmod(total, count)
    return [size + (i < more) for i in range(count)]


def attention_flops(shape: Shape, lengths: list[int], mode: str = "forward", causal: bool = True) -> float:
    """4 N H sum_S S^2 for the two products, half of it if causal; backward 2.5 times that (5 products)."""
    full = 4.0 * shape.num_heads * shape.head_dim * sum(float(n) ** 2 for n in lengths)
    return full * (0.5 if causal else 1.0) * {"forward": 1.0, "backward": 2.5}[mode]


def attention_bytes(shape: Shape, num_tokens: int, mode: str = "forward", itemsize: int = 2) -> float:
    """The least that must move: q, k, v in, out out; backward: these and dout in, three gradients out."""
    q = num_tokens * shape.num_heads * shape.head_dim * itemsize
    kv = 2 * num_tokens * shape.num_kv_heads * shape.head_dim * itemsize
    return float(2 * q + kv) if mode == "forward" else float(4 * q + 2 * kv)


def head_flops(num_tokens: int, hidden: int, vocab: int, backward: bool = True) -> float:
    """2 T D V for the logits; 6 T D V with dX and dW. Recomputed logits are not counted."""
    return (6.0 if backward else 2.0) * num_tokens * hidden * vocab


def head_bytes(num_tokens: int, hidden: int, vocab: int, backward: bool = True, itemsize: int = 2) -> float:
    """The least that must move: X and W in; with a backward also dX and dW out; no logits."""
    return float((hidden * (num_tokens + vocab)) * itemsize * (2 if backward else 1))


def step_flops(shape: Shape, num_layers: int, lengths: list[int]) -> float:
    """Model FLOPs of one forward and backward of `num_layers` layers and the head:

        6 T (L (layer parameters) + D V) + 3.5 L (causal attention forward)

    The embedding look-up and everything elementwise count nothing.
    """
    matrices = num_layers * shape.layer_parameters() + shape.hidden * shape.vocab
    attention = attention_flops(shape, lengths) + attention_flops(shape, lengths, "backward")
    return 6.0 * sum(lengths) * matrices + num_layers * attention
