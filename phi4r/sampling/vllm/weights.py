"""What proves that a server holds the weights that were sent: the SHA-256 of each parameter.

vLLM answers with digests of its parameters as they lie in its memory, under their Hugging Face names. Cut
over tensor-parallel ranks they are parts of ours, so ours are cut in the same way. Where vLLM has repacked a
matrix for its kernels (its linear layers on a CPU) the parameter is left empty and cannot be compared: what
such matrices hold is seen by the probe alone (`engine`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from phi4r.configs.sections import ModelConfig
from phi4r.models.names import Weight, read, weight_table

EMPTY = hashlib.sha256(b"").hexdigest()
VOCAB_PADDING = 64
VOCAB_WEIGHTS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Comparison:
    """num_equal: parameters whose digests are ours; num_unreadable: those that the server has repacked;
    differing: names of the others."""

    num_equal: int
    num_unreadable: int
    differing: list[str]


def served_part(weight: Weight, tensor: Tensor, tp_rank: int, tp: int) -> Tensor:
    """The part of a full HF tensor that rank `tp_rank` of a server of `tp` ranks holds."""
    if weight.hf in VOCAB_WEIGHTS:  # vLLM pads the vocabulary with rows of zeros
        tensor = pad(tensor, (0, 0, 0, -len(tensor) % VOCAB_PADDING))
    if tp == 1 or weight.shard_dim is None:
        return tensor
    if weight.kind == "gate_up":
        return torch.cat([half.chunk(tp)[tp_rank] for half in tensor.chunk(2)])
    if weight.qkv is not None:
        N, K, H = weight.qkv
        q, k, v = tensor.split([N * H, K * H, K * H])
        copies = max(1, tp // K)  # more ranks than KV heads share them
        kv_rank, kv_parts = tp_rank // copies, tp // copies
        return torch.cat([q.chunk(tp)[tp_rank], k.chunk(kv_parts)[kv_rank], v.chunk(kv_parts)[kv_rank]])
    return tensor.chunk(tp, weight.shard_dim)[tp_rank]


def digest(tensor: Tensor) -> str:
    """SHA-256 of the values as they lie in memory."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def split_key(key: str) -> tuple[int, str]:
    """vLLM's "dp0:pp0:pcp0:tp1:model.norm.weight" -> (1, "model.norm.weight")."""
    *coordinates, name = key.split(":")
    return next(int(part[2:]) for part in coordinates if part.startswith("tp")), name


def compare(get_tensor: Callable[[str], Tensor], model: ModelConfig, found: dict[str, str]) -> Comparison:
    """The digests `found` on a server against the weights that were sent, whole under the names of a file."""
    tp = 1 + max(split_key(key)[0] for key in found)
    ours: dict[tuple[int, str], str] = {}
    for weight in weight_table(model):
        tensor = read(weight, get_tensor)  # servers join what files hold in parts
        for tp_rank in range(tp):
            ours[tp_rank, weight.hf] = digest(served_part(weight, tensor, tp_rank, tp))
    unreadable = [key for key, value in found.items() if value == EMPTY]
    equal = [key for key, value in found.items() if ours.get(split_key(key)) == value]
    missing = ours.keys() - {split_key(key) for key in found}
    differing = [key for key in found if key not in {*unreadable, *equal}]
    return Comparison(len(equal), len(unreadable), sorted([*differing, *(name for _, name in missing)]))
