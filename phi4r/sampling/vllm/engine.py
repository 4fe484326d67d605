"""The vLLM rollout engine: what the GRPO loop talks to, with the same verbs as the embedded one.

All ranks hand their parts of new weights to rank 0, which writes WEIGHTS/v_000012 and has every server load
it, or broadcasts them (`transfer`); it compares digests, and then has each server sample a few probe answers
whose log-probs must be the trainer's own. `generate` therefore always samples from weights that were proved,
and every answer's tokens carry their version. Only rank 0 speaks HTTP, in a thread; meanwhile all ranks stay
in touch, so that a long rollout is not taken for a hang. Prompt batches are sampled in that thread from one
sync to the next, which interrupts them once the new weights are ready (`persistent`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from phi4r.configs.sections import SamplingConfig, VLLMConfig
from phi4r.convert.live import export_form, export_live, hand_over, served_model, whole_weights
from phi4r.core.console import say
from phi4r.core.errors import UserError
from phi4r.core.seeds import Stream
from phi4r.data.packing import Document, pack, unpack
from phi4r.models.huggingface import HFWeights
from phi4r.parallel.heartbeat import beat
from phi4r.parallel.layout import broadcast_object
from phi4r.sampling.types import Completion, PromptBatch, SampleRequest, SamplingOptions, Span
from phi4r.sampling.vllm.fleet import VLLM_DTYPES, Fleet, Member, Weights, new_members, weights_folder
from phi4r.sampling.vllm.persistent import PersistentBatches
from phi4r.sampling.vllm.registry import Order, Registry
from phi4r.sampling.vllm.transfer import Snapshot, send
from phi4r.sampling.vllm.weights import Comparison, compare
from phi4r.train.engine import Engine

Result = TypeVar("Result")

TOUCH_S = 10.0
"""Seconds between signs of life while rank 0 waits for servers."""
CANCEL_S = 10.0
KEPT_VERSIONS = 2
PROBE_TOKENS = 8


class VLLMEngine:
    """Samples on vLLM servers with the weights of `engine`, as of the last `sync`.

    stop_ids: token ids that end a sequence; probe_prompts: prompts whose answers prove each sync;
    max_model_len: longest prompt and response; run_dir: takes weights (unless configured) and logs.
    """

    is_concurrent = True

    def __init__(
        self,
        engine: Engine,
        stop_ids: Sequence[int],
        config: VLLMConfig,
        sampling: SamplingConfig,
        run_dir: Path,
        *,
        max_model_len: int,
        probe_prompts: Sequence[tuple[int, ...]],
    ) -> None:
        self.engine, self.layout, self.config = engine, engine.layout, config
        self.stop_ids = sorted(stop_ids)
        self.probe_prompts, self.temperature = list(probe_prompts), sampling.temperature
        self.max_model_len = max_model_len
        self.model = served_model(engine.model_config)
        if config.transfer == "nccl" and self._on_cpu:
            raise UserError('vllm.transfer "nccl" is for a trainer on GPUs: use "gloo" or "files"')
        self.root = (Path(config.weights_dir) if config.weights_dir else run_dir / "weights").resolve()
        # Servers on other nodes announce themselves in a folder, after the first weights are there.
        self.registry = Registry(Path(config.registry)) if config.registry and self.layout.is_main else None
        if self.registry is not None:
            self.session, key = self.registry.begin()
        else:
            self.session, key = "", os.environ.get("VLLM_API_KEY", "")
        self.fleet = Fleet(config, sampling, self._members(run_dir, key), self.stop_ids, key=key)
        self.version: int | None = None
        self.comparison = Comparison(0, 0, [])
        self.batches = PersistentBatches()
        self._num_open = 0
        self._is_serving = False
        self._serving: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, "phi4r-vllm")
        self._future: Future[Any] | None = None
        self._cancel: Callable[[], object] = lambda: None

    def _members(self, run_dir: Path, key: str) -> list[Member]:
        if not self.layout.is_main or self.registry is not None:
            return []
        return new_members(
            self.config,
            VLLM_DTYPES[self.model.dtype],
            self.max_model_len,
            self._on_cpu,
            run_dir / "logs",
            key,
        )

    @property
    def _on_cpu(self) -> bool:
        return self.layout.device.type == "cpu"

    def close(self) -> None:
        """Give up what is being sampled and end the servers that were started. Safe to call again."""
        if self._future is not None and not self._future.done():
            self._cancel()
            wait([self._future], timeout=CANCEL_S)
        self._pool.shutdown(wait=False)
        self.fleet.close()

    # --- weights

    def sync(self, version: int) -> dict[str, float]:
        """Have the servers hold the trainer's weights, those after `version` optimizer steps, and prove it.
        Collective. Returns metrics; raises RuntimeError where a server's log-probs are not the trainer's."""
        held = self._wait(self._write(version) if self.config.transfer == "files" else self._send(version))
        self.version = version
        metrics = self._probe(held, version)
        if self._num_open:
            self._serve()
        if self.layout.is_main:
            self._forget_old()
            events = self.fleet.take_events()
            metrics |= {
                "policy_version": version,
                "weights_equal": self.comparison.num_equal,
                "weights_unreadable": self.comparison.num_unreadable,
                "rollout_servers": len(held or ()),
                "rollout_requeued": events.requeued,
                "rollout_interrupted": events.interrupted,
                "rollout_failures": events.failures,
                "rollout_restarts": events.restarts,
            }
        return metrics

    def _write(self, version: int) -> Future[list[Member]] | None:
        """Write the weights to a folder, then have the servers load it."""
        folder = weights_folder(self.root, version)
        if self.layout.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
        model = self.engine.model_config
        export_live(self.engine.chunks, model, self.layout, folder, tuple(self.stop_ids), None)
        self._interrupt()
        weights = Weights(version, folder, lambda found: self._verify(HFWeights(folder).get_tensor, found))
        return self._begin(lambda: self._load(weights))

    def _send(self, version: int) -> Future[list[Member]] | None:
        """Have the servers take the weights from rank 0's memory, as they come in there."""
        self._interrupt()
        model, folder = self.engine.model_config, self.root / "form"
        whole = whole_weights(self.engine.chunks, model, self.layout)
        if not self.layout.is_main:
            hand_over(whole)
            return None
        if self.version is None:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
            export_form(model, folder, tuple(self.stop_ids), None)
        snapshot, backend, device = Snapshot(model), self.config.transfer, self.layout.device
        weights = Weights(
            version,
            folder,
            lambda found: self._verify(snapshot.get_tensor, found),
            lambda client: send(snapshot, client, backend, device),
        )
        loaded = self._begin(lambda: self._load(weights))
        snapshot.fill(whole)
        return loaded

    async def _load(self, weights: Weights) -> list[Member]:
        """Rank 0: have the servers load `weights`; those of a registry are waited for the first time."""
        if self.registry is not None:
            dtype = VLLM_DTYPES[self.model.dtype]
            self.registry.publish(
                Order(
                    self.session, str(weights.folder), dtype, self.max_model_len, self._on_cpu,
                    self.config.transfer,
                )
            )  # fmt: skip
            if not self.fleet.members:
                count, seconds = self.config.num_servers, self.config.start_timeout_s
                say(f"rl: waiting for {count} vLLM servers to announce themselves in {self.registry.folder}")
                found = await self.registry.wait_for_servers(self.session, count, seconds)
                say(f"rl: vLLM servers: {', '.join(f'{one.url} ({one.node})' for one in found)}")
                self.fleet.members = [Member(url=one.url) for one in found]
        return await self.fleet.load(weights)

    def _verify(self, get_tensor: Callable[[str], Tensor], found: dict[str, str]) -> Comparison:
        self.comparison = compare(get_tensor, self.model, found)
        return self.comparison

    def _probe(self, held: list[Member] | None, version: int) -> dict[str, float]:
        """Let each server sample answers to the probe prompts, and compare its log-probs with the
        trainer's."""
        options = SamplingOptions(PROBE_TOKENS, self.temperature)
        requests = [
            SampleRequest(prompt, (0, Stream.PROBE, version, number))
            for number, prompt in enumerate(self.probe_prompts)
        ]

        async def ask() -> list[tuple[str, list[Completion]]]:
            return [
                (member.name, await self.fleet.generate(requests, options, only=member))
                for member in held or []
            ]

        asked = broadcast_object(self._wait(self._begin(ask)))
        gaps = {name: self._gaps(requests, completions) for name, completions in asked}
        tolerance = self.config.probe_tolerance or (0.05 if self.model.dtype == "bf16" else 1e-3)
        for name, gap in gaps.items():
            if not gap.mean() <= tolerance:
                raise RuntimeError(
                    f"{name} does not hold the weights of step {version}: its log-probs differ from the"
                    f" trainer's by {gap.mean():.4g} nats on average over {len(gap)} tokens"
                    f" (vllm.probe_tolerance {tolerance:g})"
                )
        return {
            "probe_gap": float(np.mean([gap.mean() for gap in gaps.values()])),
            "max_probe_gap": float(np.max([gap.max() for gap in gaps.values()])),
        }

    def _gaps(self, requests: Sequence[SampleRequest], completions: Sequence[Completion]) -> np.ndarray:
        """|server's log-prob - trainer's| of every sampled token."""
        documents = []
        for request, completion in zip(requests, completions, strict=True):
            tokens = np.array([*request.prompt_tokens, *completion.tokens], dtype=np.int32)
            documents.append(Document(tokens, np.arange(len(tokens)) >= len(request.prompt_tokens), {}))
        longest = max(len(document.tokens) for document in documents)
        rows = pack(documents, self._fit(longest))
        ours = unpack(rows, list(self.engine.forward(rows, temperature=self.temperature)[0]), documents)
        return np.concatenate(
            [
                np.abs(own[len(request.prompt_tokens) :] - np.array(completion.logprobs))
                for own, request, completion in zip(ours, requests, completions, strict=True)
            ]
        )

    def _fit(self, length: int) -> int:
        layout = self.layout
        multiple = (2 * layout.cp if layout.cp > 1 else 1) * (layout.tp if layout.sp else 1)
        return -(-length // multiple) * multiple

    def _forget_old(self) -> None:
        """Delete all versions but the newest, and those that a server is starting with."""
        used = {m.process.weights for m in self.fleet.members if m.process is not None and m.version is None}
        for folder in sorted(self.root.glob("v_*"))[:-KEPT_VERSIONS]:
            if folder not in used:
                shutil.rmtree(folder, ignore_errors=True)

    # --- requests

    def generate(self, requests: Sequence[SampleRequest], options: SamplingOptions) -> list[Completion]:
        """Completions of `requests`, in order, on every rank; batches in flight wait meanwhile."""
        self._require_usable(options)
        self._interrupt()
        found = broadcast_object(self._wait(self._begin(lambda: self.fleet.generate(requests, options))))
        if self._num_open:
            self._serve()
        return found

    def _require_usable(self, options: SamplingOptions) -> None:
        """Raises UserError for a filter: a server's log-probs are then those of the filtered distribution,
        which is not the policy."""
        assert self.version is not None, "sync comes before the first rollout"
        if options.top_p != 1.0 or options.top_k != 0:
            raise UserError(
                "sampling.top_p and sampling.top_k must be off: log-probs would be the filter's, not the"
                f" policy's (got top_p {options.top_p:g}, top_k {options.top_k})"
            )

    # --- prompt batches

    def open(
        self,
        number: int,
        requests: Sequence[SampleRequest],
        options: SamplingOptions,
        begun: Sequence[Completion],
    ) -> None:
        """See `RolloutEngine`; the servers sample while the trainer does other things."""
        self._require_usable(options)
        if self.layout.is_main:
            self.batches.open(number, PromptBatch(requests, options, [*begun]))
        self._num_open += 1
        if not self._is_serving:
            self._serve()

    def finish(self, number: int) -> list[Completion]:
        """See `RolloutEngine`."""
        future = self.batches.complete[number] if self.layout.is_main else None
        answers: list[Completion] = broadcast_object(self._wait(future))
        if self.layout.is_main:
            self.batches.close(number)
        self._num_open -= 1
        return answers

    def unfinished(self) -> dict[int, list[Completion]]:
        """See `RolloutEngine`."""
        return self.batches.known()

    def take_busy(self) -> list[Span]:
        """See `RolloutEngine`."""
        return self.batches.busy.take()

    def _serve(self) -> None:
        """Have the servers sample the open batches until the next `_interrupt`."""
        self._is_serving = True
        self._serving = self.batches.serve(self.fleet, self._begin) if self.layout.is_main else None

    def _interrupt(self) -> None:
        """End what the servers are sampling; partial rollouts are kept."""
        if self._is_serving:
            if self.layout.is_main:
                self.batches.stop()
            self._wait(self._serving)
            self._is_serving = False

    # --- rank 0 and the others

    def _begin(self, make: Callable[[], Coroutine[Any, Any, Result]]) -> Future[Result] | None:
        """Run `make()` in rank 0's thread; one after another. None on the other ranks."""
        if not self.layout.is_main:
            return None

        async def cancellable() -> Result:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            return await make()

        future = self._pool.submit(lambda: asyncio.run(cancellable()))
        self._future = future
        return future

    def _wait(self, future: Future[Result] | None) -> Result | None:
        """The result on rank 0, None on the others, which wait in touch."""
        if future is None:
            while not broadcast_object(None):
                beat()
            return None
        while not wait([future], timeout=TOUCH_S).done:
            beat()
            broadcast_object(False)
        result = future.result()
        broadcast_object(True)
        return result
