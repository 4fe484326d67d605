"""A GRPO loop with rollout servers, event by event: how long a step takes, and who waits for whom.

Between two events (an answer ends, one begins, keys and values are full, the weights change) the sequences on
a server stay the same, so the clock jumps from event to event and no token is stepped through:

    step of b sequences with c tokens of context  =  max(fixed, compute x b) + sequence x b + context x c
    n steps                                       =  n x step + context x b x n (n - 1) / 2
    prefill                                       =  request + prefill x tokens; decoding waits meanwhile

Requests wait in one queue, oldest batch first, and go to the server with the fewest; a server works on
`slots` of them at once, as far as their keys and values fit (the newest is put back and prefilled again where
they no longer do, as vLLM does). Three ways to run the loop, those of `rl.queue`:

    synchronous     weights to the servers -> sample batch k -> train on it
    one step off    batch k+1 is sampled with the weights that batch k is trained with, while that goes on
    over-sampled    up to K batches beyond the needed one are open; new weights interrupt unfinished answers,
                    which are resumed after a prefill of prompt and answer so far. Batches are trained on
                    complete and in order, so that short answers have no advantage

Lengths come from counters: the same arguments give the same answer to the digit.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

EPSILON = 1e-6
"""Of a token: what rounding may leave of an answer."""


@dataclass(frozen=True)
class Lengths:
    """Response lengths: log-normal with mean `mean` after the cut at `cap`; sigma is of the logarithm."""

    mean: float
    sigma: float
    cap: int

    @property
    def location(self) -> float:
        """mu of the uncut distribution, so that E[min(X, cap)] = mean."""
        low, high = math.log(self.mean) - self.sigma**2 / 2, math.log(self.cap) + 10 * self.sigma + 10
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean_at(middle) < self.mean else (low, middle)
        return (low + high) / 2

    def _mean_at(self, mu: float) -> float:
        if not self.sigma:
            return min(math.exp(mu), self.cap)
        z = (math.log(self.cap) - mu) / self.sigma
        below = 0.5 * math.erfc(-(z - self.sigma) / math.sqrt(2))
        return math.exp(mu + self.sigma**2 / 2) * below + self.cap * 0.5 * math.erfc(z / math.sqrt(2))

    def draw(self, count: int, *key: int) -> list[int]:
        """`count` lengths of the stream named by the counters `key`."""
        stream, mu = random.Random("/".join(map(str, key))), self.location
        return [max(1, min(self.cap, round(stream.lognormvariate(mu, self.sigma)))) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class ServerCost:
    """Seconds on one server: see the formulas above."""

    fixed_s: float
    compute_s: float = 0.0
    sequence_s: float = 0.0
    context_s: float = 0.0
    prefill_s: float = 0.0
    request_s: float = 0.0

    def step_s(self, sequences: int) -> float:
        """A decoding step, but for what its context costs."""
        return max(self.fixed_s, self.compute_s * sequences) + self.sequence_s * sequences


@dataclass(frozen=True, kw_only=True)
class Servers:
    """`count` equal servers. slots: requests that one works on at once; kv_tokens: context that fits into it;
    costs: with 1, 2, ... of them busy, the last entry for all larger numbers (servers with hardware of their
    own have one)."""

    count: int
    costs: tuple[ServerCost, ...]
    slots: int
    kv_tokens: float = math.inf


@dataclass
class Request:
    """prompt: tokens; length: tokens of the answer; done: of those, sampled by the last event that touched
    it. versions: (weights, tokens sampled by them); is_sent: a server has it, waiting or not."""

    batch: int
    prompt: int
    length: int
    done: float = 0.0
    versions: list[tuple[int, float]] = field(default_factory=list)
    is_sent: bool = False

    def add(self, done: float, version: int) -> None:
        """It has come to `done` tokens, the new ones by the weights `version`."""
        if done > self.done:
            self.versions.append((version, done - self.done))
            self.done = done


class _Server:
    """One server's sequences. `steps` counts decoding steps since the beginning, parts included: a sequence
    ends when it reaches the number that was known when it began."""

    def __init__(self, spec: Servers) -> None:
        self.spec, self.cost = spec, spec.costs[0]
        self.clock = self.steps = self.context = self.stall_s = 0.0
        self.busy_s = self.sequence_s = 0.0
        self.running: dict[int, tuple[float, Request]] = {}
        """Number of the sequence, in the order of admission -> (steps at its end, request)."""
        self.ends: list[tuple[float, int]] = []
        """Heap of (steps at its end, number), of those that were put back too."""
        self.waiting: deque[Request] = deque()
        self.order = itertools.count()

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting)

    def first_end(self) -> float:
        """Steps at which the next sequence ends."""
        while self.ends[0][1] not in self.running:
            heapq.heappop(self.ends)
        return self.ends[0][0]

    def admit(self) -> None:
        """Prefill what waits as far as it fits; that samples one token of each."""
        while self.waiting:
            request = self.waiting[0]
            tokens = request.prompt + request.done + 1
            if self.running and self.context + tokens > self.spec.kv_tokens:
                return
            self.waiting.popleft()
            self.context += tokens
            self.stall_s += self.cost.request_s * (not request.is_sent)
            request.is_sent = True
            self.stall_s += self.cost.prefill_s * (tokens - 1)
            end, number = self.steps + request.length - request.done - 1, next(self.order)
            self.running[number] = end, request
            heapq.heappush(self.ends, (end, number))

    def next_event(self) -> float:
        """When an answer ends or keys and values are full, if nothing else happens before."""
        if not self.running:
            return math.inf
        number = len(self.running)
        count = self.first_end() - self.steps
        if number > 1:
            count = min(count, (self.spec.kv_tokens - self.context) / number)
        count = max(count, 0.0)
        growth = self.cost.context_s * number
        step = self.cost.step_s(number) + self.cost.context_s * self.context
        return self.clock + self.stall_s + count * step + growth * count * (count - 1) / 2

    def advance(self, now: float) -> None:
        """Go on until `now`, no further than the next event."""
        seconds, self.clock = now - self.clock, now
        number = len(self.running)
        if not number:
            return
        self.busy_s += seconds
        self.sequence_s += seconds * number
        stalled = min(self.stall_s, seconds)
        self.stall_s -= stalled
        seconds -= stalled
        if seconds > 0:
            half = self.cost.context_s * number / 2
            step = self.cost.step_s(number) + self.cost.context_s * self.context - half
            count = 2 * seconds / (step + math.sqrt(step * step + 4 * half * seconds))
            self.steps += count
            self.context += count * number

    def take_ended(self, version: int) -> list[Request]:
        """The answers that are whole; puts back the newest sequence where the rest no longer fits."""
        ended = []
        while self.running and self.first_end() <= self.steps + EPSILON:
            request = self.running.pop(heapq.heappop(self.ends)[1])[1]
            request.add(request.length, version)
            self.context -= request.prompt + request.length
            ended.append(request)
        if not ended and len(self.running) > 1 and self.context >= self.spec.kv_tokens - EPSILON:
            self._put_back(version)
        return ended

    def _put_back(self, version: int) -> None:
        """The newest sequence waits again, before all others. What a prefill had begun is lost: the token
        that it samples is not there before it ends."""
        end, request = self.running.popitem()[1]
        done = request.length - (end - self.steps)
        self.context -= request.prompt + done
        request.add(max(request.done, done - (self.stall_s > 0)), version)
        self.waiting.appendleft(request)

    def interrupt(self, version: int) -> None:
        """Every sequence waits again, those that began first before the others, and is sent anew."""
        while self.running:
            self._put_back(version)
        for request in self.waiting:
            request.is_sent = False
        self.ends, self.stall_s, self.context = [], 0.0, 0.0


class Fleet:
    """The servers and the queue before them. Time only goes forward; `version` is that of the weights."""

    def __init__(self, spec: Servers, record: bool = False) -> None:
        self.spec, self.servers = spec, [_Server(spec) for _ in range(spec.count)]
        self.queue: deque[Request] = deque()
        self.left: dict[int, int] = {}
        self.now, self.version = 0.0, 0
        self.next = [math.inf] * spec.count
        self.occupancy: list[tuple[float, int]] | None = [] if record else None
        """(time, sequences being sampled from then on), where asked for."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Put requests at the end of the queue."""
        for request in requests:
            self.left[request.batch] = self.left.get(request.batch, 0) + 1
        self.queue.extend(requests)
        self._hand_out(self.servers)

    def _hand_out(self, servers: Iterable[_Server]) -> None:
        """Requests from the queue to the least loaded of these, and new times for them."""
        touched = list(servers)
        loads = [(server.load, index) for index, server in enumerate(touched)]
        heapq.heapify(loads)
        while self.queue and loads[0][0] < self.spec.slots:
            load, index = loads[0]
            touched[index].waiting.append(self.queue.popleft())
            heapq.heapreplace(loads, (load + 1, index))
        for server in touched:
            server.admit()
        if len(self.spec.costs) > 1:
            self._share()
        elif len(touched) == self.spec.count:
            self.next = [server.next_event() for server in self.servers]
        if self.occupancy is not None:
            self.occupancy.append((self.now, sum(len(server.running) for server in self.servers)))

    def _share(self) -> None:
        """Servers on the same hardware: what each costs depends on how many are busy."""
        busy = sum(bool(server.running) for server in self.servers)
        cost = self.spec.costs[min(max(busy, 1), len(self.spec.costs)) - 1]
        for server in self.servers:
            server.advance(self.now)
            server.cost = cost
        self.next = [server.next_event() for server in self.servers]

    def _event(self) -> None:
        """The next event of any server."""
        self.now = min(self.next)
        index = self.next.index(self.now)
        server = self.servers[index]
        server.advance(self.now)
        for request in server.take_ended(self.version):
            self.left[request.batch] -= 1
        if self.queue or self.occupancy is not None or len(self.spec.costs) > 1:
            self._hand_out([server])
        elif server.waiting:
            server.admit()
        self.next[index] = server.next_event()

    def finish(self, batch: int) -> float:
        """Run until every answer of `batch` is whole; returns when."""
        while self.left[batch]:
            assert min(self.next) < math.inf, (
                f"{self.left[batch]} answers of batch {batch} are with no server"
            )
            self._event()
        return self.now

    def run_to(self, time: float) -> None:
        """Run until `time`."""
        while min(self.next) <= time:
            self._event()
        self.now = max(self.now, time)
        for server in self.servers:
            server.advance(self.now)

    def update(self, seconds: float) -> None:
        """New weights, which take `seconds`: what is being sampled is interrupted and goes on after that."""
        for server in self.servers:
            server.interrupt(self.version)
        if self.occupancy is not None:
            self.occupancy.append((self.now, 0))
        self.version += 1
        self.now += seconds
        for server in self.servers:
            server.advance(self.now)
        self._hand_out(self.servers)

    def work(self) -> tuple[float, float]:
        """Seconds until now, summed over servers, in which they were busy, and seconds of their sequences."""
        return sum(s.busy_s for s in self.servers), sum(s.sequence_s for s in self.servers)


@dataclass(frozen=True)
class Mode:
    """How the loop is run. staleness: steps by which a batch may be sampled ahead; continuous: over-sampled,
    else the servers get new weights only when they have nothing to do."""

    name: str
    staleness: int = 0
    continuous: bool = False


SYNCHRONOUS = Mode("synchronous")
ONE_STEP_OFF = Mode("one step off", 1)


def over_sampled(staleness: int) -> Mode:
    """Up to `staleness` batches beyond the needed one."""
    return Mode(f"over-sampled, {staleness} ahead", staleness, continuous=True)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One run of the loop. lengths(batch): tokens of its answers; train_s(tokens): seconds of training on a
    step's answers, in tokens with their prompts; sync_s: weights to the servers; between_s: all else that the
    trainer does in a step. warmup: steps at the beginning that are not counted."""

    mode: Mode
    servers: Servers
    lengths: Callable[[int], Sequence[int]]
    prompt_tokens: int
    train_s: Callable[[float], float]
    sync_s: float
    between_s: float = 0.0
    num_steps: int = 8
    warmup: int = 2


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What came out. spans: (what, start, end) of the trainer ("sync", "wait", "train"); shares are of the
    counted steps' time; occupancy: mean sequences on a server; samples: (time, sequences on all servers from
    then on), if recorded; begins: of the counted steps, and the end of the last; ages: steps between the
    weights that sampled a token and those that it is trained with, mean and largest."""

    step_s: list[float]
    trainer_busy: float
    rollouts_busy: float
    occupancy: float
    tokens_per_s: float
    mean_age: float
    max_age: int
    spans: list[tuple[str, float, float]]
    samples: list[tuple[float, int]]
    begins: list[float]

    @property
    def mean_step_s(self) -> float:
        """Mean seconds of a counted step."""
        return sum(self.step_s) / len(self.step_s)

    @property
    def p95_step_s(self) -> float:
        """The step that 95 in 100 do not exceed."""
        return sorted(self.step_s)[math.ceil(0.95 * len(self.step_s)) - 1]


def simulate(loop: Loop, record: bool = False) -> Simulated:
    """Run `loop`. record: keep the occupancy over time."""
    mode, fleet = loop.mode, Fleet(loop.servers, record)
    batches: list[list[Request]] = []
    begins, works, spans = list[float](), list[tuple[float, float]](), list[tuple[str, float, float]]()
    ages, tokens = list[tuple[float, int]](), 0.0

    def submit_up_to(last: int) -> None:
        while len(batches) <= last:
            number = len(batches)
            batches.append([Request(number, loop.prompt_tokens, n) for n in loop.lengths(number)])
            fleet.submit(batches[number])

    def span(what: str, start: float) -> float:
        if fleet.now > start:
            spans.append((what, start, fleet.now))
        return fleet.now

    for step in range(loop.num_steps):
        begins.append(fleet.now)
        works.append(fleet.work())
        if not mode.continuous and step < len(batches):
            fleet.finish(step)
        at = span("wait", begins[-1])
        fleet.update(loop.sync_s)
        at = span("sync", at)
        submit_up_to(step + mode.staleness if mode.continuous else step)
        fleet.finish(step)
        fleet.run_to(fleet.now + loop.between_s)
        at = span("wait", at)
        if mode.staleness and not mode.continuous:
            submit_up_to(step + 1)
        answers = batches[step]
        count = sum(request.length for request in answers)
        if step >= loop.warmup:
            tokens += count
            ages += [(n, fleet.version - version) for r in answers for version, n in r.versions]
        fleet.run_to(fleet.now + loop.train_s(count + loop.prompt_tokens * len(answers)))
        span("train", at)
    counted = [*begins[loop.warmup :], fleet.now]
    first, window = counted[0], counted[-1] - counted[0]
    busy, sequences = (now - then for now, then in zip(fleet.work(), works[loop.warmup], strict=True))
    trained = sum(end - start for what, start, end in spans if what == "train" and start >= first)
    return Simulated(
        step_s=[end - begin for begin, end in itertools.pairwise(counted)],
        trainer_busy=trained / window,
        rollouts_busy=busy / window / loop.servers.count,
        occupancy=sequences / window / loop.servers.count,
        tokens_per_s=tokens / window,
        mean_age=sum(n * age for n, age in ages) / max(sum(n for n, _ in ages), 1.0),
        max_age=max((age for _, age in ages), default=0),
        spans=spans,
        samples=fleet.occupancy or [],
        begins=counted,
    )
