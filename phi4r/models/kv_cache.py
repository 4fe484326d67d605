"""Keys and values of sequences being sampled, per layer, in slots that are kept dense.

Live sequences always occupy slots 0 .. num_live - 1: when one ends, the last live sequence moves into its
slot, so that a decoding step reads plain slices and never gathers.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Rotated keys and values, [slots, max_tokens, K, H] per layer of this pipeline stage.

    One step is either a prefill (whole prompts, packed as documents: attention runs over the packed tokens
    and the cache is only written) or a decode (one token per live slot, in slot order: the cache is written,
    then read).
    """

    def __init__(self, num_slots: int, max_tokens: int, device: torch.device) -> None:
        self.num_slots, self.max_tokens, self.device = num_slots, max_tokens, device
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.decoding = False
        self.slots_T = torch.empty(0, dtype=torch.int64)
        self.positions_T = torch.empty(0, dtype=torch.int64)
        self.num_live = 0
        self.longest = 0

    def plan(self, slots_T: Tensor, positions_T: Tensor, *, decoding: bool) -> None:
        """Announce the next forward: where each of its tokens is stored; int64 [T] both. Tokens beyond T pad
        the step to a multiple of tp under sequence parallelism and are not stored."""
        self.decoding = decoding
        if decoding:
            self.num_live = slots_T.numel()
            self.longest = int(positions_T.max()) + 1
        self.slots_T, self.positions_T = slots_T.to(self.device), positions_T.to(self.device)

    def store(self, layer: int, k_TKH: Tensor, v_TKH: Tensor) -> tuple[Tensor, Tensor]:
        """Write this step's keys and values of `layer`; returns the layer's whole cache."""
        if layer not in self.layers:
            shape = (self.num_slots, self.max_tokens, *k_TKH.shape[1:])
            self.layers[layer] = (k_TKH.new_zeros(shape), v_TKH.new_zeros(shape))
        keys, values = self.layers[layer]
        count = self.slots_T.numel()
        keys[self.slots_T, self.positions_T] = k_TKH[:count]
        values[self.slots_T, self.positions_T] = v_TKH[:count]
        return keys, values

    def move(self, source: int, target: int) -> None:
        """Copy a sequence's cache from slot `source` to slot `target`."""
        for keys, values in self.layers.values():
            keys[target] = keys[source]
            values[target] = values[source]

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, scale: float) -> Tensor:
        """Decode: one query per live slot against its own keys so far; [T, N, H]."""
        keys, values = self.store(layer, k_TKH, v_TKH)
        live, kv_heads = self.num_live, keys.size(2)
        k_BKSH = keys[:live, : self.longest].transpose(1, 2)
        v_BKSH = values[:live, : self.longest].transpose(1, 2)
        q_BKGH = q_TNH[:live].reshape(live, kv_heads, -1, q_TNH.size(-1))
        future = torch.arange(self.longest, device=q_TNH.device)[None] > self.positions_T[:, None]
        scores = (q_BKGH.float() @ k_BKSH.float().transpose(2, 3)) * scale
        probs = scores.masked_fill(future[:, None, None], float("-inf")).softmax(-1)
        out = (probs @ v_BKSH.float()).to(q_TNH.dtype).reshape(live, -1, q_TNH.size(-1))
        return torch.cat([out, torch.zeros_like(q_TNH[live:])]) if live < q_TNH.size(0) else out
