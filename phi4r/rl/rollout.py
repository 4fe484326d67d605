"""The embedded rollout engine: samples from the trainer's own weights, in the trainer's own processes.

Sequences live in KV-cache slots; when some end, waiting prompts are prefilled into the free slots, so that
the longest answer does not idle the rest. Every (data-parallel, context-parallel) rank samples its share of
the requests; the ranks of one model copy (TP x PP) work in lockstep, and the last pipeline stage draws each
token and tells the others.

Seeds are counters (design contract 4): a request's key alone fixes its stream of uniform numbers, so the
same samples come out whatever the number of slots, the order, or the layout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from phi4r.model.kv_cache import KVCache
from phi4r.model.packed import HeadRequest, PackedContext
from phi4r.parallel.attempt import beat
from phi4r.parallel.layout import Layout
from phi4r.train.engine import Engine

PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn. temperature 0 takes the likeliest token; top_p and top_k filter (never in RL: a
    filtered sampler is not the policy). Log-probs are those of the unfiltered distribution at this
    temperature."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class SampleRequest:
    """A prompt and the counters, such as (run seed, step, prompt, sample), that fix its random stream."""

    prompt_tokens: tuple[int, ...]
    key: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """tokens: sampled ids, the end token included where one came; logprobs: float32 [len(tokens)], natural
    log; finished: False where max_new_tokens ended it; version: optimizer steps behind the weights that
    sampled every one of the tokens."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool
    version: int = 0


@dataclass
class _Sequence:
    index: int
    prompt: tuple[int, ...]
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def uniforms(key: Sequence[int], count: int) -> np.ndarray:
    """The first `count` uniform numbers in [0, 1), float64, of the stream named by `key` (non-negative
    integers).
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key)))).random(count)


def draw_tokens(logits_BV: Tensor, uniforms_B: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at a given uniform number.

    logits_BV fp32, uniforms_B fp64 in [0, 1). Returns (tokens int64 [B], log-probs fp32 [B]).
    """
    if options.temperature == 0:
        logprobs_BV = logits_BV.log_softmax(-1)
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
    logprobs_BV = (logits_BV / options.temperature).log_softmax(-1)
    probs_BV = logprobs_BV.double().exp()
    if options.top_k > 0 and options.top_k < probs_BV.size(1):
        threshold = probs_BV.topk(options.top_k, dim=1).values[:, -1:]
        probs_BV = probs_BV.where(probs_BV >= threshold, 0.0)
    if options.top_p < 1:
        ordered, order = probs_BV.sort(dim=1, descending=True)
        before = ordered.cumsum(1) - ordered
        keep = before < options.top_p * ordered.sum(1, keepdim=True)
        probs_BV = torch.zeros_like(probs_BV).scatter_(1, order, ordered.where(keep, 0.0))
    cumulative_BV = probs_BV.cumsum(1)
    targets_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    tokens_B = torch.searchsorted(cumulative_BV, targets_B1, right=True)[:, 0]
    # Rounding in the cumulative sum must never select a token of probability zero past the end.
    last_B = (probs_BV > 0).long().mul_(torch.arange(probs_BV.size(1), device=probs_BV.device)).amax(1)
    tokens_B = torch.minimum(tokens_B, last_B)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


Pending = Callable[[], list[Completion]]
"""Waits for the completions of requests that were started; collective, the same on every rank."""
Done = Callable[[list[Completion]], None]
"""Called with the completions on rank 0 as soon as they are there, perhaps in another thread."""


class RolloutEngine(Protocol):
    """What the GRPO loop needs of an engine. All ranks call, with the same arguments."""

    @property
    def layout(self) -> Layout:
        """This rank's place."""

    def sync(self, version: int) -> dict[str, float]:
        """Sample from now on with the trainer's weights as they are, after `version` optimizer steps; returns
        metrics."""

    def start(self, requests: Sequence[SampleRequest], options: SamplingOptions, done: Done) -> Pending:
        """Begin to sample the completions of `requests`, in order, with the weights of the last `sync`. They
        must be waited for before the next `start` or `sync`."""


class EmbeddedEngine:
    """Samples with the weights of `engine`. stop_ids: token ids that end a sequence; num_slots: sequences
    decoded at once on each model copy; samples do not depend on it."""

    def __init__(self, engine: Engine, stop_ids: Sequence[int], num_slots: int) -> None:
        self.engine, self.layout = engine, engine.layout
        self.stop_ids = frozenset(stop_ids)
        self.num_slots = num_slots
        self.version = 0

    def sync(self, version: int) -> dict[str, float]:
        """Nothing has to move: the weights are the trainer's own."""
        self.version = version
        return {}

    def start(self, requests: Sequence[SampleRequest], options: SamplingOptions, done: Done) -> Pending:
        """Sample at once: these are the trainer's own processes, and they cannot train meanwhile."""
        completions = self.generate(requests, options)
        if self.layout.is_main:
            done(completions)
        return lambda: completions

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[SampleRequest],
        options: SamplingOptions,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Completions of `requests`, in order, on every rank. All ranks must call with the same arguments.

        on_token(id) is called with every new token of request 0 on the ranks that sample it (to stream it).
        """
        for chunk in self.engine.chunks:
            chunk.eval()
        mine = range(self.layout.replica, len(requests), self.layout.num_replicas)
        local = self._generate_local({i: requests[i] for i in mine}, options, on_token)
        if self.layout.num_replicas > 1:
            shares: list[dict[int, Completion] | None] = [None] * self.layout.world_size
            dist.all_gather_object(shares, local if self.layout.reports else None)
            local = {i: completion for share in shares if share for i, completion in share.items()}
        return [local[i] for i in range(len(requests))]

    def _generate_local(
        self,
        requests: dict[int, SampleRequest],
        options: SamplingOptions,
        on_token: Callable[[int], None] | None,
    ) -> dict[int, Completion]:
        if not requests:
            return {}
        waiting = deque(
            _Sequence(i, r.prompt_tokens, uniforms(r.key, options.max_new_tokens))
            for i, r in requests.items()
        )
        longest = max(len(r.prompt_tokens) for r in requests.values()) + options.max_new_tokens
        slots = min(self.num_slots, len(requests))
        cache = KVCache(slots, longest, self.layout.device)
        live: list[_Sequence] = []
        done: dict[int, Completion] = {}
        while live or waiting:
            beat()
            free = slots - len(live)
            # Prefilling in batches costs less than one by one: up to an eighth of the slots may stay empty,
            # but not where the last prompts would fit.
            if waiting and (not live or free >= max(1, min(len(waiting), slots // 8))):
                new = self._take(waiting, free)
                self._prefill(cache, new, len(live), options)
                live += new
            else:
                self._decode(cache, live, options)
                new = live
            if on_token:
                for sequence in new:
                    if sequence.index == 0:
                        on_token(sequence.tokens[-1])
            self._retire(cache, live, done, options)
        return done

    def _take(self, waiting: deque[_Sequence], free: int) -> list[_Sequence]:
        taken: list[_Sequence] = []
        num_tokens = 0
        while (
            waiting
            and len(taken) < free
            and (not taken or num_tokens + len(waiting[0].prompt) <= PREFILL_TOKENS)
        ):
            taken.append(waiting.popleft())
            num_tokens += len(taken[-1].prompt)
        return taken

    def _retire(
        self, cache: KVCache, live: list[_Sequence], done: dict[int, Completion], options: SamplingOptions
    ) -> None:
        """Move ended sequences to `done`, filling their slots from the end so that live slots stay dense."""
        slot = 0
        while slot < len(live):
            sequence = live[slot]
            finished = sequence.tokens[-1] in self.stop_ids
            if not finished and len(sequence.tokens) < options.max_new_tokens:
                slot += 1
                continue
            done[sequence.index] = Completion(sequence.tokens, sequence.logprobs, finished, self.version)
            last = live.pop()
            if slot < len(live):
                live[slot] = last
                cache.move(len(live), slot)

    # --- one forward through all pipeline stages

    def _prefill(
        self, cache: KVCache, new: list[_Sequence], first_slot: int, options: SamplingOptions
    ) -> None:
        lengths = [len(s.prompt) for s in new]
        slots_T = torch.repeat_interleave(
            torch.arange(first_slot, first_slot + len(new)), torch.tensor(lengths)
        )
        positions_T = torch.cat([torch.arange(n) for n in lengths])
        ids_T = torch.tensor([t for s in new for t in s.prompt])
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        cache.plan(slots_T, positions_T, decoding=False)
        last_B = torch.from_numpy(bounds[1:] - 1)
        self._sample(self._forward(cache, ids_T, positions_T, bounds, last_B), new, options)

    def _decode(self, cache: KVCache, live: list[_Sequence], options: SamplingOptions) -> None:
        ids_T = torch.tensor([s.tokens[-1] for s in live])
        positions_T = torch.tensor([len(s.prompt) + len(s.tokens) - 1 for s in live])
        cache.plan(torch.arange(len(live)), positions_T, decoding=True)
        bounds = np.arange(len(live) + 1)
        self._sample(self._forward(cache, ids_T, positions_T, bounds, torch.arange(len(live))), live, options)

    def _forward(
        self, cache: KVCache, ids_T: Tensor, positions_T: Tensor, bounds: np.ndarray, logits_at: Tensor
    ) -> Tensor | None:
        """Logits [B, vocabulary] of the tokens `logits_at` on the last stage, None on the others."""
        device = self.layout.device
        padding = -len(ids_T) % self.layout.tp if self.layout.sp else 0
        if padding:
            zeros = torch.zeros(padding, dtype=torch.int64)
            ids_T, positions_T = torch.cat([ids_T, zeros]), torch.cat([positions_T, zeros])
            bounds = np.append(bounds, bounds[-1] + padding)
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32)).to(device)
        longest = int(np.diff(bounds).max())
        context = PackedContext(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            position_ids=positions_T.to(device),
            num_tokens=len(ids_T),
            host_bounds=bounds.tolist(),
            head=HeadRequest(logits_at=logits_at.to(device)),
            kv_cache=cache,
        )
        ids = ids_T.to(device)[None]
        models = self.engine.models
        output = None
        for model in models:
            if not model.pre_process:
                model.set_input_tensor(self._receive(len(ids_T), output if self.layout.pp == 1 else None))
            output = model(ids, context)
            if not model.post_process and self.layout.pp > 1:
                dist.send(output.contiguous(), self.layout.next_stage)
        return output if models[-1].post_process else None

    def _receive(self, num_tokens: int, previous: Tensor | None) -> Tensor:
        if previous is not None:
            return previous
        config = self.engine.config
        shape = (num_tokens // (self.layout.tp if self.layout.sp else 1), 1, config.hidden_size)
        hidden = torch.empty(shape, dtype=config.params_dtype, device=self.layout.device)
        dist.recv(hidden, self.layout.previous_stage)
        return hidden

    def _sample(self, logits_BV: Tensor | None, sequences: list[_Sequence], options: SamplingOptions) -> None:
        """Draw one token per sequence on the last stage and append it on all ranks of the model copy."""
        drawn = torch.zeros(2, len(sequences), dtype=torch.float64, device=self.layout.device)
        if logits_BV is not None:
            uniforms_B = torch.tensor([s.uniforms[len(s.tokens)] for s in sequences], dtype=torch.float64)
            tokens_B, logprobs_B = draw_tokens(logits_BV.float(), uniforms_B.to(logits_BV.device), options)
            drawn = torch.stack([tokens_B.double(), logprobs_B.double()])
        if self.layout.tp * self.layout.pp > 1:
            dist.broadcast(drawn, src=self.layout.head_rank, group=self.layout.copy_group)
        for sequence, token, logprob in zip(sequences, *drawn.tolist(), strict=True):
            sequence.tokens.append(int(token))
            sequence.logprobs.append(logprob)
