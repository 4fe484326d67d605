"""Requests shared out over several servers, on rank 0: none is lost when one dies, and none comes twice.

Every server has `max_in_flight` lanes; a lane takes a request from the board, waits for its answer and puts
that on the board. Where a server fails, all its lanes end and what they held goes back to the board, for the
lanes of the others; a server that phi4r started is started again with the newest weights, one given by
address is waited for. Which server answers does not matter: a request's own counters seed its sampling.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tenacity

from phi4r.configs.sections import SamplingConfig, VLLMConfig
from phi4r.core.console import say
from phi4r.sampling.types import Completion, OnAnswer, SampleRequest, SamplingOptions
from phi4r.sampling.vllm.client import Client, ServerError
from phi4r.sampling.vllm.server import HEALTH_EVERY_S, UNHEALTHY_CHECKS, ServerProcess
from phi4r.sampling.vllm.weights import Comparison

KEEP_ALIVE_S = 2.0
"""Idle connections are dropped before the server does so (after 5 s)."""
INTERRUPT_S = 60.0
"""Seconds in which servers are to end what they sample before an update."""
ABORT_EVERY_S = 0.5
END = -1
"""On a board: nothing is left to do. It comes before every request."""
SPREAD_S = 0.1
"""A server's lanes begin one after another within this time: the server that is ready first would take all of
a few requests, and the others none."""
MAX_ATTEMPTS = 5
"""Servers that may fail over one request before the request itself is blamed."""

VLLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""vLLM's names of compute types."""

Verify = Callable[[dict[str, str]], Comparison]
"""A server's digests -> how they compare with those of the weights that it was given."""

Send = Callable[[Client], Awaitable[None]]
"""Has a server load the weights."""


@dataclass(frozen=True)
class Weights:
    """What servers should hold: the weights after `version` optimizer steps. folder: what a server is started
    with: these weights, or where they are sent (`send`) only the form of the model."""

    version: int
    folder: Path
    verify: Verify
    send: Send | None = None


@dataclass
class Member:
    """A server of the fleet. process: None where it was given by address."""

    url: str = ""
    process: ServerProcess | None = None
    num_failures: int = 0
    is_lost: bool = False
    """It failed too often and is not used again in this run."""
    version: int | None = None
    """The weights it is known to hold."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.url if self.process is None else f"vLLM server {self.process.number}"


@dataclass
class Events:
    """What happened since it was last asked for: answers that were asked for again, that went on elsewhere or
    after an update, servers that failed."""

    requeued: int = 0
    interrupted: int = 0
    failures: int = 0
    restarts: int = 0


class Board:
    """Requests that wait, and answers. A request is waiting, with one lane, or answered; never two of these.
    Those of lower numbers are taken first.

    A persistent board accepts requests until stopped. begun: the partial rollout of each request;
    tell(number, completion, server) hears of every change of it.
    """

    def __init__(
        self,
        requests: Sequence[SampleRequest],
        *,
        persists: bool = False,
        tell: OnAnswer = lambda number, completion, server: None,
    ) -> None:
        self.requests: list[SampleRequest] = []
        self.begun: list[Completion] = []
        self.answers: list[Completion | None] = []
        self.attempts: list[int] = []
        self.finished = asyncio.Event()
        self.num_held = 0
        """Requests that are with a lane."""
        self.persists, self._tell, self._left = persists, tell, 0
        self._waiting: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()
        self.add(requests, [Completion()] * len(requests))
        if not requests and not persists:
            self.stop()

    def add(self, requests: Sequence[SampleRequest], begun: Sequence[Completion]) -> None:
        """More requests, and what there already is of their answers."""
        for request, beginning in zip(requests, begun, strict=True):
            self._waiting.put_nowait(len(self.requests))
            self.requests.append(request)
            self.begun.append(beginning)
            self.answers.append(None)
            self.attempts.append(0)
        self._left += len(requests)

    def stop(self) -> None:
        """Nothing is to be taken any more."""
        self.finished.set()
        self._waiting.put_nowait(END)

    async def take(self) -> int | None:
        """The next request that waits, or None when nothing is left to do."""
        index = await self._waiting.get()
        if index == END:
            self._waiting.put_nowait(END)  # for the next lane
            return None
        self.num_held += 1
        return index

    def give_back(self, index: int, begun: Completion | None = None, server: str = "") -> None:
        """A lane could not get an answer, or only its beginning."""
        self.num_held -= 1
        if begun is not None:
            self.begun[index] = begun
            self._tell(index, begun, server)
        self._waiting.put_nowait(index)

    def answer(self, index: int, completion: Completion, server: str = "") -> None:
        """A lane got the answer."""
        assert self.answers[index] is None, f"request {index} was answered twice"
        self.num_held -= 1
        self.answers[index] = completion
        self._tell(index, completion, server)
        self._left -= 1
        if not self._left and not self.persists:
            self.stop()


@dataclass
class Fleet:
    """The servers of a run, and what they should hold (`weights`, set before the first request). key: what
    requests to them carry ("": nothing)."""

    config: VLLMConfig
    sampling: SamplingConfig
    members: list[Member]
    stop_ids: list[int]
    key: str = field(default="", repr=False)
    weights: Weights | None = None
    events: Events = field(default_factory=Events)

    def take_events(self) -> Events:
        """What happened since the last call."""
        taken, self.events = self.events, Events()
        return taken

    def close(self) -> None:
        """End the servers that were started."""
        for member in self.members:
            if member.process is not None:
                member.process.stop()

    # --- weights

    async def load(self, weights: Weights) -> list[Member]:
        """Give `weights` to every server that is up (all of them the first time); returns those that hold
        them. Others get them when they come back. No request may be running."""
        first = self.weights is None
        self.weights = weights
        async with self._http() as http:
            here = [m for m in self.members if not m.is_lost and (first or await self._is_up(m, http))]
            if not here:  # all failed at once: wait for whoever comes back
                here = [m for m in self.members if not m.is_lost]
            await asyncio.gather(*(self._ready(member, http) for member in here))
        held = [member for member in here if member.version == weights.version]
        self._require_some(held)
        return held

    async def _is_up(self, member: Member, http: httpx.AsyncClient) -> bool:
        if member.process is not None and not member.process.is_alive:
            return False
        return await self._client(http, member).is_healthy()

    async def _ready(self, member: Member, http: httpx.AsyncClient) -> None:
        """Start the server if need be, wait for it, give it the newest weights and have them proved. A server
        that cannot be had is marked as lost."""
        assert self.weights is not None
        while not member.is_lost:
            try:
                await self._up(member, http)
                await self._give(member, self._client(http, member), self.weights)
                return
            except ServerError as error:
                self._failed(member, error)

    async def _up(self, member: Member, http: httpx.AsyncClient) -> None:
        """Start the server where it is not, and wait until it is healthy, with a deadline."""
        assert self.weights is not None
        process, began = member.process, time.monotonic()
        if process is not None:
            if not process.is_alive:
                self.events.restarts += process.num_starts > 0
                process.start(self.weights.folder)
                say(f"vllm: starting {member.name}, log in {process.log}")
                member.url, member.version = process.url, None
            began = process.began
        client = self._client(http, member)
        limit_s = self.config.start_timeout_s
        polling = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_result(lambda up: not up),
            wait=tenacity.wait_fixed(0.5),
            stop=lambda state: time.monotonic() - began > limit_s,
            retry_error_callback=lambda state: False,
        )

        async def up_or_dead() -> bool:
            if process is not None and not process.is_alive:
                raise ServerError(f"ended while it started: {process.last_words()} (log: {process.log})")
            return await client.is_healthy()

        if not await polling(up_or_dead):
            raise ServerError(f"was not healthy within {limit_s:g} s (vllm.start_timeout_s)")

    async def _give(self, member: Member, client: Client, weights: Weights) -> None:
        if member.version == weights.version:
            return
        # A label alone proves nothing: a server given by address may have it from another run.
        process = member.process
        if weights.send is not None:
            await weights.send(client)
            await client.settle(weights.version)
        elif process is not None and member.version is None and process.weights == weights.folder:
            await client.label(weights.version)  # it has just started with them
        else:
            await client.load(weights.folder, weights.version)
        found = await asyncio.to_thread(weights.verify, await client.digests())
        if found.differing:
            raise ServerError(
                f"{len(found.differing)} parameters are not those of step {weights.version}, such as"
                f" {found.differing[0]}"
            )
        member.version = weights.version

    def _failed(self, member: Member, error: Exception) -> None:
        """Note the failure; what was started is ended, and started again by the next `_up`."""
        member.version = None
        member.num_failures += 1
        member.is_lost = member.num_failures > self.config.max_restarts
        self.events.failures += 1
        say(f"vllm: warning: {member.name}: {error}" + ("; given up" if member.is_lost else ""))
        if member.process is not None:
            member.process.stop()

    def _require_some(self, members: Sequence[Member]) -> None:
        if not members:
            names = ", ".join(member.name for member in self.members)
            raise RuntimeError(f"no rollout server is left ({names}); see RUN/logs/vllm_*.log")

    # --- requests

    async def generate(
        self,
        requests: Sequence[SampleRequest],
        options: SamplingOptions,
        only: Member | None = None,
        tell: OnAnswer = lambda number, completion, server: None,
    ) -> list[Completion]:
        """The answers to all requests, in order; from the server `only` alone where one is given. tell: hears
        of each answer as it arrives."""
        board = Board(requests, tell=tell)
        await self.work(board, options, only)
        answers = [answer for answer in board.answers if answer is not None]
        assert len(answers) == len(requests), f"{len(requests) - len(answers)} requests have no answer"
        return answers

    async def work(self, board: Board, options: SamplingOptions, only: Member | None = None) -> None:
        """Answer what is on the board until it is finished. What is being sampled then, on a board that was
        stopped, ends with what there is of it."""
        members = [only] if only else [m for m in self.members if not m.is_lost]
        async with self._http() as http:
            serving: list[asyncio.Task[Any]] = [
                asyncio.create_task(self._serve(member, board, options, http)) for member in members
            ]
            finished: asyncio.Task[Any] = asyncio.create_task(board.finished.wait())
            try:
                while not board.finished.is_set():
                    await asyncio.wait({finished, *serving}, return_when=asyncio.FIRST_COMPLETED)
                    for task in [task for task in serving if task.done()]:
                        serving.remove(task)
                        task.result()  # its error, if it has one, ends the run
                    if not serving and not board.finished.is_set():
                        self._require_some([])
                await self._interrupt(board, members, http)
            finally:
                # Lanes end by themselves; a server that is still starting goes on without us.
                for task in [*serving, finished]:
                    task.cancel()
                await asyncio.gather(*serving, finished, return_exceptions=True)

    async def _interrupt(self, board: Board, members: Sequence[Member], http: httpx.AsyncClient) -> None:
        """Have the servers end what the lanes wait for. Asked again and again: a request may have been on its
        way. What a server does not end in time is given up, and begins anew from what is known of it."""
        began, asked = time.monotonic(), float("-inf")
        while board.num_held and time.monotonic() - began < INTERRUPT_S:
            if time.monotonic() - asked >= ABORT_EVERY_S:
                asked = time.monotonic()
                for member in members:
                    if self.weights is not None and member.version == self.weights.version:
                        with contextlib.suppress(ServerError):  # its lanes find out as well
                            await self._client(http, member).abort()
            await asyncio.sleep(0.01)

    async def _serve(
        self, member: Member, board: Board, options: SamplingOptions, http: httpx.AsyncClient
    ) -> None:
        """One server's part, until the board is finished or the server is lost."""
        while not board.finished.is_set():
            await self._ready(member, http)
            if member.is_lost:
                return
            client = self._client(http, member)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._watch(member, client, board))
                    lanes = self.sampling.max_in_flight
                    for number in range(lanes):
                        begin_s = number / lanes * SPREAD_S
                        tasks.create_task(self._lane(member, client, board, options, begin_s))
            except BaseExceptionGroup as group:
                failures, others = group.split(ServerError)
                if others is not None:
                    raise others.exceptions[0] from None
                assert failures is not None
                self._failed(member, failures.exceptions[0])  # type: ignore[arg-type]

    async def _lane(
        self, member: Member, client: Client, board: Board, options: SamplingOptions, begin_s: float
    ) -> None:
        assert self.weights is not None
        await asyncio.sleep(begin_s)
        while (index := await board.take()) is not None:
            try:
                completion = await client.generate(
                    board.requests[index], options, self.stop_ids, self.weights.version, board.begun[index]
                )
            except ServerError as error:
                board.attempts[index] += 1
                if board.attempts[index] >= MAX_ATTEMPTS:
                    raise RuntimeError(
                        f"{board.attempts[index]} servers failed over request {index} (key"
                        f" {board.requests[index].key}): {error}"
                    ) from error
                self._requeue(board, index)
                raise
            except asyncio.CancelledError:  # another lane found out that the server failed
                self._requeue(board, index)
                raise
            if completion.is_complete(options):
                board.answer(index, completion, member.name)
            else:
                self.events.interrupted += 1
                board.give_back(index, completion, member.name)

    def _requeue(self, board: Board, index: int) -> None:
        self.events.requeued += 1
        board.give_back(index)

    async def _watch(self, member: Member, client: Client, board: Board) -> None:
        """Look after the server while its lanes wait for answers."""
        failed = 0
        while not board.finished.is_set():
            try:
                await asyncio.wait_for(board.finished.wait(), HEALTH_EVERY_S)
                return
            except TimeoutError:
                pass
            if member.process is not None and not member.process.is_alive:
                raise ServerError("its process has ended")
            failed = 0 if await client.is_healthy() else failed + 1
            if failed >= UNHEALTHY_CHECKS:
                raise ServerError(f"is not healthy ({failed} checks in a row)")

    def _client(self, http: httpx.AsyncClient, member: Member) -> Client:
        return Client(http, member.url, self.config, self.sampling.request_timeout_s)

    def _http(self) -> httpx.AsyncClient:
        lanes = len(self.members) * (self.sampling.max_in_flight + 2)
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            limits=httpx.Limits(
                max_connections=lanes, max_keepalive_connections=lanes, keepalive_expiry=KEEP_ALIVE_S
            ),
            trust_env=False,
        )


def weights_folder(root: Path, version: int) -> Path:
    """Where the weights after `version` optimizer steps lie."""
    return root / f"v_{version:06d}"


def new_members(
    config: VLLMConfig, dtype: str, max_model_len: int, on_cpu: bool, logs: Path, key: str
) -> list[Member]:
    """The servers that the section vllm gives by address, or that are to be started. dtype: vLLM's name of
    the compute type; max_model_len: longest prompt and response in tokens; logs: folder of their logs."""
    if config.address_list:
        return [Member(url=address) for address in config.address_list]
    return [
        Member(
            process=ServerProcess(
                number, config, dtype, max_model_len, on_cpu, logs / f"vllm_{number}.log", key=key
            )
        )
        for number in range(config.num_servers)
    ]
