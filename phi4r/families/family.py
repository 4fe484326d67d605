"""What one family of models says about itself; see `phi4r.families.phi4` for the first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from phi4r.core.problem import ROLES

Kind = Literal["plain", "qkv", "gate_up"]
Option = Literal["tied_embeddings", "partial_rotary", "longrope"]


@dataclass(frozen=True)
class LayerTensor:
    """A weight of every decoder layer.

    hf: its name in a Hugging Face file, after `model.layers.<i>.`; mcore: in megatron-core, after
    `decoder.layers.<i>.`. parts: where files hold it cut by rows, the names of the pieces in order ((): they
    hold it whole); then `hf` is only what servers call the joined tensor. shard_dim: the dimension that
    tensor parallelism cuts (None: every rank holds all of it).
    """

    hf: str
    mcore: str
    kind: Kind = "plain"
    shard_dim: int | None = None
    parts: tuple[str, ...] = ()


THINK, END_THINK = "<think>", "</think>"

REASONING_MESSAGE = (
    "You are a careful assistant who works a question out before answering it. Write your reply in two "
    "sections, in this order: <think> {Thought section} </think> {Solution section}. In the Thought section "
    "reason step by step: explore, check intermediate results, and go back when something does not fit. In "
    "the Solution section state, clearly and briefly, the solution you arrived at, with the steps that are "
    "needed to follow it and the final answer."
)
"""The system message "reasoning" of every family."""


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation is written: `header` with the role in it, the content, `end`, for every turn; a
    prompt ends with the assistant's header. Special tokens, `<|...|>`, stand in the texts by name.

    after_end: text between an end and the next header. end_of_text: the special token that ends a document.
    pad: special tokens that can pad, the first that a tokenizer has is taken.
    """

    header: str
    end: str
    after_end: str = ""
    end_of_text: str = "<|endoftext|>"
    pad: tuple[str, ...] = ("<pad>", "<|pad|>", "<|endoftext|>")
    think_placeholders: tuple[str, str] | None = None
    """Two unused special tokens of the family's own tokenizer that become <think> and </think> where it has
    no such tokens. None: they are added behind its last token, in rows of the embedding that nothing uses."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """What a tokenizer must have to write it, without the think tokens."""
        headers = "".join(self.header.format(role=role) for role in ROLES)
        return tuple(dict.fromkeys([*re.findall(r"<\|.*?\|>", headers), self.end, self.end_of_text]))


@dataclass(frozen=True)
class Sampling:
    """The settings that the makers of a family recommend for sampling from it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of decoders.

    Pre-norm layers with grouped-query attention, RoPE, a gated SiLU MLP and RMSNorm are common to all
    families; what differs stands here or in the numbers of `ModelConfig`.
    """

    title: str
    """For people: "Phi-4"."""
    presets: Mapping[str, Mapping[str, Any]]
    """Named sizes: fields of `ModelConfig`, `family` left out."""
    qk_norm: bool = False
    """Queries and keys of every head pass an RMSNorm before they are rotated."""
    options: frozenset[Option] = frozenset()
    """What a model of the family may have and need not."""

    architecture: str
    """`architectures` of config.json."""
    model_type: str
    """`model_type` of config.json."""
    tensors: tuple[LayerTensor, ...]
    """Weights of a layer, in the order of the forward pass."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for a number that config.json leaves out."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of config.json that the arithmetic depends on, with the values it is right for."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Keys that every config.json of the family has besides the numbers."""

    chat: ChatFormat
    sampling: Sampling = Sampling()
