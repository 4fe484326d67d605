"""Keys and values of sequences being sampled, per layer, in blocks of `BLOCK` tokens (PagedAttention's
layout, arXiv 2309.06180): a sequence holds as many blocks as its length needs and gives them back when it
ends.

Live sequences always occupy slots 0 .. num_live - 1: when one ends, the last live sequence takes its slot,
which moves a row of block numbers and no keys. The pool of blocks grows by a quarter where it is used up.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
GROWTH = 1.25


class KVCache:
    """Rotated keys and values, [blocks, BLOCK, K, H] per layer of this pipeline stage. max_tokens: of the
    longest sequence.

    One step is either a prefill (whole prompts, packed as documents: attention runs over the packed tokens
    and the cache is only written) or a decode (one token per live slot, in slot order: the cache is written,
    then read).
    """

    def __init__(self, num_slots: int, max_tokens: int, device: torch.device) -> None:
        self.device = device
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.decoding = False
        self.num_live = 0
        self.longest = 0
        self.num_blocks = 0
        self._max_blocks = num_slots * -(-max_tokens // BLOCK)
        self._table = torch.zeros(num_slots, -(-max_tokens // BLOCK), dtype=torch.int64)
        """[slots, blocks of a sequence]: numbers of blocks in the pool; beyond a sequence's own, 0."""
        self._held = [0] * num_slots
        self._free: list[int] = []
        self._rows_T = torch.empty(0, dtype=torch.int64)
        self._positions_T = torch.empty(0, dtype=torch.int64)
        self._live_table = torch.empty(0, dtype=torch.int64)

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return sum(self._held)

    def plan(self, slots_T: Tensor, positions_T: Tensor, *, decoding: bool) -> None:
        """Announce the next forward: where each of its tokens is stored; int64 [T] both, on the CPU. Tokens
        beyond T pad the step to a multiple of tp under sequence parallelism and are not stored."""
        self.decoding = decoding
        for slot, position in zip(slots_T.tolist(), positions_T.tolist(), strict=True):
            while self._held[slot] * BLOCK <= position:
                self._table[slot, self._held[slot]] = self._take_block()
                self._held[slot] += 1
        rows_T = self._table[slots_T, positions_T // BLOCK] * BLOCK + positions_T % BLOCK
        self._rows_T = rows_T.to(self.device)
        if decoding:
            self.num_live = slots_T.numel()
            self.longest = int(positions_T.max()) + 1
            self._live_table = self._table[: self.num_live, : -(-self.longest // BLOCK)].to(self.device)
            self._positions_T = positions_T.to(self.device)

    def _take_block(self) -> int:
        if not self._free:
            grown = min(max(int(self.num_blocks * GROWTH), self.num_blocks + 1), self._max_blocks)
            assert grown > self.num_blocks, "every slot holds its longest sequence"
            self._free = list(range(grown - 1, self.num_blocks - 1, -1))
            self.num_blocks = grown
        return self._free.pop()

    def store(self, layer: int, k_TKH: Tensor, v_TKH: Tensor) -> tuple[Tensor, Tensor]:
        """Write this step's keys and values of `layer`; returns the layer's pools."""
        old = self.layers.get(layer)
        if old is None or len(old[0]) < self.num_blocks:
            pools = [new.new_zeros(self.num_blocks, BLOCK, *new.shape[1:]) for new in (k_TKH, v_TKH)]
            for index in range(2 if old is not None else 0):
                pools[index][: len(old[index])] = old[index]  # type: ignore[index]
            self.layers[layer] = (pools[0], pools[1])
        count = self._rows_T.numel()
        for pool, new in zip(self.layers[layer], (k_TKH, v_TKH), strict=True):
            pool.flatten(0, 1)[self._rows_T] = new[:count]
        return self.layers[layer]

    def move(self, source: int, target: int) -> None:
        """The sequence in slot `source` takes slot `target`, which was released."""
        assert self._held[target] == 0
        self._table[target] = self._table[source]
        self._held[target], self._held[source] = self._held[source], 0
        self._table[source] = 0

    def release(self, slot: int) -> None:
        """The sequence in `slot` has ended: its blocks are free."""
        self._free += self._table[slot, : self._held[slot]].tolist()
        self._held[slot] = 0
        self._table[slot] = 0

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, scale: float) -> Tensor:
        """Decode: one query per live slot against its own keys so far; [T, N, H]."""
        pools = self.store(layer, k_TKH, v_TKH)
        live, kv_heads = self.num_live, k_TKH.size(1)
        k_BKSH, v_BKSH = (
            pool[self._live_table].flatten(1, 2)[:, : self.longest].transpose(1, 2) for pool in pools
        )
        q_BKGH = q_TNH[:live].reshape(live, kv_heads, -1, q_TNH.size(-1))
        future = torch.arange(self.longest, device=q_TNH.device)[None] > self._positions_T[:, None]
        scores = (q_BKGH.float() @ k_BKSH.float().transpose(2, 3)) * scale
        probs = scores.masked_fill(future[:, None, None], float("-inf")).softmax(-1)
        out = (probs @ v_BKSH.float()).to(q_TNH.dtype).reshape(live, -1, q_TNH.size(-1))
        return torch.cat([out, torch.zeros_like(q_TNH[live:])]) if live < q_TNH.size(0) else out
