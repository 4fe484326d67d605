"""The embedded rollout engine: samples from the trainer's own weights, in the trainer's own processes.

Sequences live in KV-cache slots; when some end, waiting prompts are prefilled into the free slots, so that
the longest answer does not idle the rest. Every (data-parallel, context-parallel) rank samples its share of
the requests; the ranks of one model copy (TP x PP) work in lockstep, and the last pipeline stage draws each
token and tells the others.

Seeds are counters (`core.seeds`): a request's key alone fixes its stream of uniform numbers, so the
same samples come out whatever the number of slots, the order, or the layout.

Batches stay open until they are finished: while the engine finishes one, free slots sample the later ones,
and their partial rollouts are resumed after the next update of the weights from their tokens so far.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from phi4r.core.console import say
from phi4r.core.errors import UserError
from phi4r.models.head import HeadRequest
from phi4r.models.kv_cache import BLOCK, KVCache
from phi4r.models.packed import PackedContext
from phi4r.parallel.heartbeat import beat
from phi4r.sampling.types import Completion, OnAnswer, PromptBatch, SampleRequest, SamplingOptions, Span
from phi4r.train.engine import Engine

PREFILL_TOKENS = 2048
GIB = 2**30
SAID = GIB // 8
"""Bytes of keys and values from which they are worth a line."""


Key = tuple[int, int]
"""(batch, request) of a sequence."""


class _Waiting(NamedTuple):
    """A request that has no slot yet, and its partial rollout."""

    key: Key
    request: SampleRequest
    begun: Completion

    @property
    def num_tokens(self) -> int:
        """To be prefilled."""
        return len(self.request.prompt_tokens) + len(self.begun.tokens)


@dataclass
class _Sequence:
    key: Key
    prompt: tuple[int, ...]
    uniforms: np.ndarray
    begun: Completion
    tokens: list[int]
    """All so far, those of `begun` included; `logprobs` goes with them."""
    logprobs: list[float]

    @classmethod
    def of(cls, waiting: _Waiting, options: SamplingOptions) -> _Sequence:
        """The request, to be resumed after what it has already."""
        request, begun = waiting.request, waiting.begun
        stream = uniforms(request.key, options.max_new_tokens)
        return cls(waiting.key, request.prompt_tokens, stream, begun, [*begun.tokens], [*begun.logprobs])

    def completion(self, finished: bool, version: int) -> Completion:
        """What there is of it; what is new was sampled by the weights `version`."""
        first = len(self.begun.tokens)
        spans = [(version, len(self.tokens) - first)] if len(self.tokens) > first else []
        return self.begun.followed_by(Completion(self.tokens[first:], self.logprobs[first:], finished, spans))


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


def free_bytes(device: torch.device) -> int:
    """Memory that more tensors of this process can take: what the GPU, or this machine, has left."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


class EmbeddedEngine:
    """Samples with the weights of `engine`. stop_ids: token ids that end a sequence; num_slots: sequences
    decoded at once on each model copy; samples do not depend on it."""

    is_concurrent = False

    def __init__(self, engine: Engine, stop_ids: Sequence[int], num_slots: int) -> None:
        self.engine, self.layout = engine, engine.layout
        self.stop_ids = frozenset(stop_ids)
        self.num_slots = num_slots
        self.version = 0
        self._open: dict[int, PromptBatch] = {}
        self._busy: list[Span] = []
        self._room_checked = 0
        """Bytes of keys and values that were found to fit."""

    def sync(self, version: int) -> dict[str, float]:
        """Nothing has to move: the weights are the trainer's own."""
        self.version = version
        return {}

    def generate(
        self,
        requests: Sequence[SampleRequest],
        options: SamplingOptions,
        on_answer: OnAnswer = lambda number, answer, server: None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Completions of `requests`, in order, on every rank. All ranks must call with the same arguments.

        on_answer: called on one rank of the copy of the model that sampled the answer. on_token(id) is called
        with every new token of request 0 on the ranks that sample it (to stream it).
        """
        batch = PromptBatch(requests, options, [Completion()] * len(requests))

        def tell(key: Key, answer: Completion) -> None:
            if self.layout.reports:
                on_answer(key[1], answer, f"embedded {self.layout.replica}")

        self._advance({0: batch}, 0, tell, on_token)
        return batch.answers

    def open(
        self,
        number: int,
        requests: Sequence[SampleRequest],
        options: SamplingOptions,
        begun: Sequence[Completion],
    ) -> None:
        """See `RolloutEngine`; sampled in `finish`."""
        self._open[number] = PromptBatch(requests, options, [*begun])

    def finish(self, number: int) -> list[Completion]:
        """See `RolloutEngine`; slots that this batch leaves free sample the later ones, whose partial
        rollouts stay as they are when this batch is complete."""
        if not self._open[number].is_complete:
            began = time.perf_counter()
            self._advance(self._open, number)
            self._busy.append((began, time.perf_counter()))
        return self._open.pop(number).answers

    def unfinished(self) -> dict[int, list[Completion]]:
        """See `RolloutEngine`; exact, on every rank."""
        return {number: batch.answers for number, batch in self._open.items()}

    def take_busy(self) -> list[Span]:
        """See `RolloutEngine`."""
        taken, self._busy = self._busy, []
        return taken

    @torch.no_grad()
    def _advance(
        self,
        batches: dict[int, PromptBatch],
        needed: int,
        tell: Callable[[Key, Completion], None] = lambda key, answer: None,
        on_token: Callable[[int], None] | None = None,
    ) -> None:
        """Sample on every replica its share of `batches`, the lowest number first, until batch `needed` is
        complete; the answers come to all ranks."""
        for chunk in self.engine.chunks:
            chunk.eval()
        options, layout = batches[needed].options, self.layout
        assert all(batch.options == options for batch in batches.values())
        waiting = deque(
            _Waiting((number, index), batch.requests[index], batch.answers[index])
            for number, batch in sorted(batches.items())
            for index in range(layout.replica, len(batch.requests), layout.num_replicas)
            if not batch.answers[index].is_complete(options)
        )
        local = self._sample_until(needed, waiting, options, len(batches) > 1, tell, on_token)
        if layout.num_replicas > 1:
            shares: list[dict[Key, Completion] | None] = [None] * layout.world_size
            dist.all_gather_object(shares, local if layout.reports else None)
            local = {key: completion for share in shares if share for key, completion in share.items()}
        for (number, index), completion in local.items():
            batches[number].answers[index] = completion

    def _sample_until(
        self,
        needed: int,
        waiting: deque[_Waiting],
        options: SamplingOptions,
        has_more: bool,
        tell: Callable[[Key, Completion], None],
        on_token: Callable[[int], None] | None,
    ) -> dict[Key, Completion]:
        """Sample until no sequence of the batch `needed` is left, here or, where there is more to do
        meanwhile (`has_more`), on any replica. Returns what was begun or ended."""
        longest = max((len(one.request.prompt_tokens) for one in waiting), default=0) + options.max_new_tokens
        slots = min(self.num_slots, len(waiting))
        if reason := self.engine.model_config.rotary.why_not_sampled(longest):
            raise UserError(f"the embedded engine cannot sample this model: prompts and answers of {reason}")
        self._require_room(slots, longest)
        cache = KVCache(slots, longest, self.layout.device)
        left = sum(one.key[0] == needed for one in waiting)
        live: list[_Sequence] = []
        done: dict[Key, Completion] = {}
        while self._is_needed(left, has_more):
            beat()
            if not (live or waiting):
                continue  # the other replicas still sample
            free = slots - len(live)
            # Prefilling in batches costs less than one by one: up to an eighth of the slots may stay empty,
            # but not where the last prompts would fit.
            if waiting and (not live or free >= max(1, min(len(waiting), slots // 8))):
                new = self._take(waiting, free, options)
                self._prefill(cache, new, len(live), options)
                live += new
            else:
                self._decode(cache, live, options)
                new = live
            if on_token:
                for sequence in new:
                    if sequence.key[1] == 0:
                        on_token(sequence.tokens[-1])
            for key in self._retire(cache, live, done, options):
                left -= key[0] == needed
                tell(key, done[key])
        return done | {sequence.key: sequence.completion(False, self.version) for sequence in live}

    def _require_room(self, slots: int, longest: int) -> None:
        """Say what keys and values may take, and refuse more than is free: UserError."""
        config = self.engine.config
        layers = sum(len(model.decoder.layers) for model in self.engine.models)
        width = config.num_query_groups // self.layout.tp * config.kv_channels * config.params_dtype.itemsize
        sequence = 2 * layers * width * -(-longest // BLOCK) * BLOCK
        if slots * sequence <= self._room_checked:
            return
        self._room_checked, free = slots * sequence, free_bytes(self.layout.device)
        what = f"{slots:,} sequences of at most {longest:,} tokens"
        if slots * sequence > free:
            raise UserError(
                f"sampling.num_slots: keys and values of {what} take up to {slots * sequence / GIB:,.2f} GiB,"
                f" and {free / GIB:,.2f} GiB are free: at most {free // sequence:,} fit"
            )
        if slots * sequence >= SAID:
            say(f"sampling: keys and values of {what} take up to {slots * sequence / GIB:,.2f} GiB")

    def _is_needed(self, left: int, has_more: bool) -> bool:
        """Whether sampling continues with `left` needed sequences here. Replicas that may sample later
        batches meanwhile agree on it in every round, so that all stop in the same one, run after run."""
        if not has_more or self.layout.num_replicas == 1:
            return left > 0
        most = torch.tensor([left], device=self.layout.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return bool(most.item())

    def _take(self, waiting: deque[_Waiting], free: int, options: SamplingOptions) -> list[_Sequence]:
        """The next requests that a prefill takes, at least one and at most `free`."""
        taken: list[_Sequence] = []
        num_tokens = 0
        while (
            waiting
            and len(taken) < free
            and (not taken or num_tokens + waiting[0].num_tokens <= PREFILL_TOKENS)
        ):
            num_tokens += waiting[0].num_tokens
            taken.append(_Sequence.of(waiting.popleft(), options))
        return taken

    def _retire(
        self, cache: KVCache, live: list[_Sequence], done: dict[Key, Completion], options: SamplingOptions
    ) -> list[Key]:
        """Move ended sequences to `done`, filling their slots from the end so that live slots stay dense;
        returns their keys."""
        slot, ended = 0, list[Key]()
        while slot < len(live):
            sequence = live[slot]
            finished = sequence.tokens[-1] in self.stop_ids
            if not finished and len(sequence.tokens) < options.max_new_tokens:
                slot += 1
                continue
            done[sequence.key] = sequence.completion(finished, self.version)
            ended.append(sequence.key)
            cache.release(slot)
            last = live.pop()
            if slot < len(live):
                live[slot] = last
                cache.move(len(live), slot)
        return ended

    # --- one forward through all pipeline stages

    def _prefill(
        self, cache: KVCache, new: list[_Sequence], first_slot: int, options: SamplingOptions
    ) -> None:
        """Read prompts, and what answers have so far: keys and values are those of the weights of now."""
        lengths = [len(s.prompt) + len(s.tokens) for s in new]
        slots_T = torch.repeat_interleave(
            torch.arange(first_slot, first_slot + len(new)), torch.tensor(lengths)
        )
        positions_T = torch.cat([torch.arange(n) for n in lengths])
        ids_T = torch.tensor([t for s in new for t in (*s.prompt, *s.tokens)])
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
            kv_cache=cache,
        )
        request = HeadRequest(logits_at=logits_at.to(device))
        ids = ids_T.to(device)[None]
        models = self.engine.models
        output = None
        for model in models:
            if not model.pre_process:
                model.set_input_tensor(self._receive(len(ids_T), output if self.layout.pp == 1 else None))
            output = model(ids, context, request)
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
