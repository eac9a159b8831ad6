"""A cluster of engines as a discrete-event simulation, by SimPy: what it takes is measured elsewhere, see `capacity`.

An engine turns steps as `service.engine.scheduler` plans them: decodes first, then chunks of prompts up to the token
budget, blocks of a KV cache, preemption of the newest. A step takes what a table of measured steps says. Clients, the
gateway and the web process of a replica are threads: each takes its work in order, so much per request and per token.
The choice of a replica is the gateway's own function.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import simpy

from service.cluster.prefixes import KnownPrefixes, ranked
from service.measures import percentile

Process = Generator[simpy.Event, Any, None]
Points = tuple[tuple[float, float], ...]

TICK_S = 1e-5
"""Gaps between tokens are counted in these."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step, between measured points linearly, and beyond the last two along their line.

    decode: by rows, of steps that decode only.
    prompt: by prompt tokens, of steps that only read prompts.
    launch_s: of the host, at least, for a step with prompt tokens; the device may work meanwhile.
    """

    decode: Points
    prompt: Points
    launch_s: float = 0.0

    def device_s(self, rows: int, prompt_tokens: int) -> float:
        """Of a step that decodes `rows` tokens and reads `prompt_tokens`.

        In a step with both the rows add what they add to one row, since the weights are read once.
        """
        if not prompt_tokens:
            return _between(self.decode, rows)
        added_s = _between(self.decode, rows) - _between(self.decode, 1) if rows else 0.0
        return _between(self.prompt, prompt_tokens) + added_s


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings of an engine.

    plans_ahead: a step is planned and launched before the one before it is read, as on a GPU.
    cached_prefixes: prefixes that stay in the KV cache, the last used ones. The engine has no such cache yet.
    """

    max_num_requests: int = 64
    max_batched_tokens: int = 2048
    num_blocks: int = 1 << 30
    block_size: int = 64
    plans_ahead: bool = True
    cached_prefixes: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of a thread."""

    per_request_s: float = 0.0
    per_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plant:
    """What there is.

    cores: that all of it shares; None: everything has a core or a device of its own.
    lease: of Ray, by which the gateway reserves a place at a replica.
    affinity_bound: see `service.cluster.prefixes.ranked`.
    """

    replicas: int
    times: StepTimes
    limits: Limits = field(default_factory=Limits)
    clients: Work = field(default_factory=Work)
    gateway: Work = field(default_factory=Work)
    web: Work = field(default_factory=Work)
    gateways: int = 1
    cores: int | None = None
    lease: Work = field(default_factory=Work)
    affinity_bound: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked.

    rate: requests/s that arrive at random; 0 for a closed loop of `clients`, or for `burst` requests at once.
    prefixes, prefix_tokens: each prompt begins with one of so many prefixes of this length, all equally likely.
    warm_s: requests that are sent before are not counted; at seconds the load ends.
    """

    prompt_tokens: int
    output_tokens: int
    seconds: float
    rate: float = 0.0
    clients: int = 0
    burst: int = 0
    warm_s: float = 0.0
    prefixes: int = 0
    prefix_tokens: int = 0
    seed: int = 0


@dataclass(eq=False, slots=True)
class Request:
    """One generation.

    num_cached: tokens whose keys and values the engine has. num_planned, num_sampled, num_received: of its answer, by
    the engine's plan, by its device, and by the client.
    """

    prompt_tokens: int
    output_tokens: int
    sent_s: float
    done: simpy.Event
    prefix: int = -1
    prefix_tokens: int = 0
    gateway: int = 0
    replica: int = -1
    is_counted: bool = False
    is_running: bool = False
    is_reading: bool = False
    num_cached: int = 0
    num_blocks: int = 0
    num_planned: int = 0
    num_sampled: int = 0
    num_received: int = 0
    first_s: float = 0.0
    last_s: float = 0.0

    @property
    def num_left(self) -> int:
        """Tokens to compute until the next one of the answer is sampled: 1 if it decodes."""
        return self.prompt_tokens + self.num_planned - self.num_cached


@dataclass(slots=True)
class Result:
    """What clients saw, of requests sent after the warm-up and before the end; times in seconds.

    in_flight: mean requests in the system while these were sent.
    tokens_per_s: tokens received in that time.
    """

    sent: int = 0
    answered: int = 0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    gaps: Counter[int] = field(default_factory=Counter)
    in_flight: float = 0.0
    tokens_per_s: float = 0.0
    end_s: float = 0.0
    num_requests: int = 0
    preemptions: int = 0
    prefix_hits: int = 0
    busy: dict[str, float] = field(default_factory=dict)

    def first_s(self, percent: float) -> float:
        return percentile(self.first, percent)

    def whole_s(self, percent: float) -> float:
        return percentile(self.whole, percent)

    def per_token_s(self, percent: float) -> float:
        """From an answer's first token to its last, by the tokens between."""
        return percentile(self.per_token, percent)

    def gap_s(self, percent: float) -> float:
        """Of all gaps between two tokens of one answer."""
        left = percent / 100 * sum(self.gaps.values())
        for ticks, count in sorted(self.gaps.items()):
            left -= count
            if left <= 0:
                return ticks * TICK_S
        return 0.0


class Cores:
    """Cores that jobs share evenly: with k jobs on n cores each proceeds at min(1, n / k) of its speed."""

    def __init__(self, env: simpy.Environment, count: int) -> None:
        self._env = env
        self._count = count
        self._jobs: list[tuple[float, int, simpy.Event]] = []
        self._progress_s = 0.0
        self._since_s = 0.0
        self._turn = 0
        self._number = 0

    def run(self, work_s: float) -> simpy.Event:
        self._advance()
        self._number += 1
        event = self._env.event()
        heapq.heappush(self._jobs, (self._progress_s + work_s, self._number, event))
        self._wake()
        return event

    def _advance(self) -> None:
        if self._jobs:
            self._progress_s += (self._env.now - self._since_s) * self._speed()
        self._since_s = self._env.now

    def _speed(self) -> float:
        return min(1.0, self._count / len(self._jobs))

    def _wake(self) -> None:
        self._turn += 1
        if self._jobs:
            left_s = max(0.0, self._jobs[0][0] - self._progress_s) / self._speed()
            _after(self._env, left_s, partial(self._finish, self._turn))

    def _finish(self, turn: int) -> None:
        if turn != self._turn:
            return
        self._advance()
        _, _, event = heapq.heappop(self._jobs)
        event.succeed()
        self._wake()


class Thread:
    """Takes its jobs one after the other, each on a core of its own or on shared ones."""

    def __init__(self, env: simpy.Environment, cores: Cores | None) -> None:
        self._env = env
        self._cores = cores
        self._jobs: deque[tuple[float, Callable[[], None]]] = deque()
        self._free_s = 0.0
        self.busy_s = 0.0

    def run(self, work_s: float, then: Callable[[], None]) -> None:
        """Do `work_s` of work once the jobs before it are done, and call `then`."""
        self.busy_s += work_s
        if self._cores is None:
            self._free_s = max(self._free_s, self._env.now) + work_s
            if self._free_s == self._env.now:
                then()
            else:
                _after(self._env, self._free_s - self._env.now, then)
            return
        self._jobs.append((work_s, then))
        if len(self._jobs) == 1:
            self._begin(self._cores)

    def _begin(self, cores: Cores) -> None:
        event = cores.run(self._jobs[0][0])
        assert event.callbacks is not None
        event.callbacks.append(lambda _: self._end(cores))

    def _end(self, cores: Cores) -> None:
        _, then = self._jobs.popleft()
        if self._jobs:
            self._begin(cores)
        then()


@dataclass(slots=True)
class Step:
    """samples: requests that get a token. num_rows: how many of them decode. reads: requests that read their prompt."""

    samples: list[Request] = field(default_factory=list)
    reads: list[Request] = field(default_factory=list)
    num_rows: int = 0
    prompt_tokens: int = 0
    ready_s: float = 0.0


class Engine:
    """One engine, as a loop of steps. `then` gets the requests of every step that got a token."""

    def __init__(
        self, env: simpy.Environment, plant: Plant, cores: Cores | None, then: Callable[[list[Request]], None]
    ) -> None:
        self._env = env
        self._times = plant.times
        self._limits = plant.limits
        self._cores = cores
        self._then = then
        self._waiting: deque[Request] = deque()
        self._decoding: list[Request] = []
        self._reading: list[Request] = []
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_free = plant.limits.num_blocks
        self._arrival = env.event()
        self._device_free_s = 0.0
        self.busy_s = 0.0
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_prefix_hits = 0
        env.process(self._loop())

    def add(self, request: Request) -> None:
        self._waiting.append(request)
        if not self._arrival.triggered:
            self._arrival.succeed()

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._decoding or self._reading)

    @property
    def num_free_blocks(self) -> int:
        return self._num_free

    def _loop(self) -> Process:
        in_flight: Step | None = None
        while True:
            planned = self._plan()
            if planned is None and in_flight is None:
                self._arrival = self._env.event()
                yield self._arrival
                continue
            if planned is not None:
                yield from self._launch(planned)
            ready = in_flight if self._limits.plans_ahead else planned
            in_flight = planned
            if ready is not None:
                if ready.ready_s > self._env.now:
                    yield self._env.timeout(ready.ready_s - self._env.now)
                self._commit(ready)

    def _launch(self, step: Step) -> Process:
        device_s = self._times.device_s(step.num_rows, step.prompt_tokens)
        self.num_steps += 1
        self.busy_s += device_s
        if self._cores is not None:
            yield self._cores.run(device_s)
            return
        start_s = max(self._device_free_s, self._env.now)
        if step.prompt_tokens and self._times.launch_s:
            yield self._env.timeout(self._times.launch_s)
        step.ready_s = self._device_free_s = max(start_s + device_s, self._env.now)

    def _plan(self) -> Step | None:
        """The next step, with the lengths of its requests moved as if it had run."""
        budget = self._limits.max_batched_tokens
        step = Step()
        num_preemptions, is_starved = self.num_preemptions, False
        block_size = self._limits.block_size
        for request in [*self._decoding, *self._reading]:
            if not request.is_running or request.num_planned >= request.output_tokens:
                continue  # preempted by this very plan, or its last token is in flight
            if not request.is_reading and budget and request.num_cached < request.num_blocks * block_size:
                # What nearly every turn of this loop is for, without calls.
                request.num_cached += 1
                request.num_planned += 1
                step.num_rows += 1
                step.samples.append(request)
                budget -= 1
                continue
            length = min(request.num_left, budget)
            if not length:
                break
            if not self._grow(request, length, step):
                is_starved = True
                continue
            self._advance(request, length, step)
            budget -= length
        while budget and not is_starved and num_preemptions == self.num_preemptions and self._can_admit():
            request = self._admit()
            length = min(request.num_left, budget)
            self._grow(request, length, step)
            self._advance(request, length, step)
            budget -= length
        return step if step.samples or step.prompt_tokens else None

    def _advance(self, request: Request, length: int, step: Step) -> None:
        request.num_cached += length
        if request.is_reading:
            step.reads.append(request)
            step.prompt_tokens += length
        else:
            step.num_rows += 1
        if request.num_left == 0:
            self._finish_reading(request)
            request.num_planned += 1
            step.samples.append(request)

    def _finish_reading(self, request: Request) -> None:
        if not request.is_reading:
            return
        request.is_reading = False
        self._reading.remove(request)
        self._decoding.append(request)
        if self._limits.cached_prefixes and request.prefix >= 0:
            self._cached[request.prefix] = None
            self._cached.move_to_end(request.prefix)
            if len(self._cached) > self._limits.cached_prefixes:
                self._cached.popitem(last=False)

    def _commit(self, step: Step) -> None:
        for request in step.samples:
            request.num_sampled += 1
            if request.num_sampled == request.output_tokens:
                (self._list(request) if request.is_running else self._waiting).remove(request)
                self._release(request)
        if step.samples:
            self._then(step.samples)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size)

    def _can_admit(self) -> bool:
        num_running = len(self._decoding) + len(self._reading)
        if not self._waiting or num_running >= self._limits.max_num_requests:
            return False
        request = self._waiting[0]
        fits = self._blocks(request.num_left + 1) <= self._num_free or not num_running
        return fits and request.num_planned == request.num_sampled

    def _admit(self) -> Request:
        request = self._waiting.popleft()
        request.is_reading = request.is_running = True
        self._reading.append(request)
        if request.prefix in self._cached:
            self._cached.move_to_end(request.prefix)
            request.num_cached = min(request.prefix_tokens, request.num_left - 1)
            self.num_prefix_hits += 1
        return request

    def _grow(self, request: Request, length: int, step: Step) -> bool:
        """Take the blocks for so many more tokens, from the newest requests if need be. False if there are too few."""
        missing = self._blocks(request.num_cached + length) - request.num_blocks
        if missing > self._num_free:
            kept = {request, *step.samples, *step.reads}
            victims = [each for each in (*self._decoding, *self._reading) if each not in kept]
            while missing > self._num_free:
                if not victims:
                    return False
                self._preempt(victims.pop())
        self._num_free -= max(0, missing)
        request.num_blocks += max(0, missing)
        return True

    def _preempt(self, request: Request) -> None:
        self._list(request).remove(request)
        self._release(request)
        self.num_preemptions += 1
        self._waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self._num_free += request.num_blocks
        request.num_blocks = request.num_cached = 0
        request.is_running = request.is_reading = False

    def _list(self, request: Request) -> list[Request]:
        return self._reading if request.is_reading else self._decoding


class Cluster:
    """Clients, a gateway and replicas, until the load has ended and every request is answered."""

    def __init__(self, plant: Plant, load: Load) -> None:
        self._plant = plant
        self._load = load
        self._env = simpy.Environment()
        self._random = random.Random(load.seed)
        cores = None if plant.cores is None else Cores(self._env, plant.cores)
        self._clients = Thread(self._env, cores)
        self._lease = Thread(self._env, cores)
        self._gateways = [Thread(self._env, cores) for _ in range(plant.gateways)]
        self._webs = [Thread(self._env, cores) for _ in range(plant.replicas)]
        self.engines = [Engine(self._env, plant, cores, self._telling(n)) for n in range(plant.replicas)]
        self._loads = [0] * plant.replicas
        self._known = [KnownPrefixes() for _ in range(plant.gateways)]
        self._num_sent = 0
        self._num_inside = 0
        self._since_s = 0.0
        self._inside_s = 0.0
        self._num_tokens = 0
        self._result = Result()

    def run(self) -> Result:
        load = self._load
        if load.rate:
            self._env.process(self._arrivals())
        for _ in range(load.burst):
            self._send()
        for _ in range(load.clients):
            self._env.process(self._client())
        self._env.run()
        result = self._result
        window_s = load.seconds - load.warm_s
        result.in_flight = self._inside_s / window_s
        result.tokens_per_s = self._num_tokens / window_s
        result.end_s = self._env.now
        result.num_requests = self._num_sent
        result.preemptions = sum(engine.num_preemptions for engine in self.engines)
        result.prefix_hits = sum(engine.num_prefix_hits for engine in self.engines)
        result.busy = {
            "engines": sum(engine.busy_s for engine in self.engines) / len(self.engines) / self._env.now,
            "webs": sum(web.busy_s for web in self._webs) / len(self._webs) / self._env.now,
            "gateways": sum(each.busy_s for each in self._gateways) / len(self._gateways) / self._env.now,
        }
        return result

    def _arrivals(self) -> Process:
        while True:
            yield self._env.timeout(self._random.expovariate(self._load.rate))
            if self._env.now >= self._load.seconds:
                return
            self._send()

    def _client(self) -> Process:
        while self._env.now < self._load.seconds:
            yield self._send()

    def _send(self) -> simpy.Event:
        """Send a request. Returns the event of its last token."""
        load = self._load
        request = Request(load.prompt_tokens, load.output_tokens, self._env.now, self._env.event())
        if load.prefixes:
            request.prefix, request.prefix_tokens = self._random.randrange(load.prefixes), load.prefix_tokens
        self._enter(1)
        request.is_counted = load.warm_s <= request.sent_s < load.seconds
        self._result.sent += request.is_counted
        number = self._num_sent % len(self._gateways)
        self._num_sent += 1
        request.gateway = number
        self._clients.run(self._plant.clients.per_request_s, lambda: self._pass_on(request))
        return request.done

    def _pass_on(self, request: Request) -> None:
        gateway = self._gateways[request.gateway]
        gateway.run(self._plant.gateway.per_request_s, lambda: self._route(request))

    def _route(self, request: Request) -> None:
        # Equal ones are to get equal shares, as in `service.cluster.router`.
        names = self._random.sample(range(len(self._loads)), len(self._loads))
        known = self._known[request.gateway]
        keys = [str(request.prefix).encode()] if request.prefix >= 0 else []
        lengths = {int(name): length for name, length in known.lengths(keys, map(str, names)).items()}
        loads = {name: self._loads[name] for name in names}
        request.replica = ranked(loads, lengths, self._plant.affinity_bound)[0]
        known.add(keys, str(request.replica))
        self._loads[request.replica] += 1
        web, engine = self._webs[request.replica], self.engines[request.replica]
        work_s = self._plant.web.per_request_s
        self._lease.run(self._plant.lease.per_request_s, lambda: web.run(work_s, lambda: engine.add(request)))

    def _telling(self, number: int) -> Callable[[list[Request]], None]:
        """What engine `number` does with the requests of a step that got a token."""

        def to_web(samples: list[Request]) -> None:
            work_s = len(samples) * self._plant.web.per_token_s
            self._webs[number].run(work_s, lambda: self._to_gateways(samples))

        return to_web

    def _to_gateways(self, samples: list[Request]) -> None:
        shares: dict[int, list[Request]] = {}
        for request in samples:
            shares.setdefault(request.gateway, []).append(request)
        for number, share in shares.items():
            work_s = len(share) * self._plant.gateway.per_token_s
            self._gateways[number].run(work_s, partial(self._to_clients, share))

    def _to_clients(self, samples: list[Request]) -> None:
        work_s = len(samples) * self._plant.clients.per_token_s
        self._clients.run(work_s, lambda: self._receive(samples))

    def _receive(self, samples: list[Request]) -> None:
        now_s, result, load = self._env.now, self._result, self._load
        if load.warm_s <= now_s < load.seconds:
            self._num_tokens += len(samples)
        for request in samples:
            request.num_received += 1
            is_counted = request.is_counted
            if request.num_received == 1:
                request.first_s = now_s
                if is_counted:
                    result.first.append(now_s - request.sent_s)
            elif is_counted:
                result.gaps[round((now_s - request.last_s) / TICK_S)] += 1
            request.last_s = now_s
            if request.num_received == request.output_tokens:
                if is_counted:
                    result.answered += 1
                    result.whole.append(now_s - request.sent_s)
                    if request.output_tokens > 1:
                        result.per_token.append((now_s - request.first_s) / (request.output_tokens - 1))
                self._loads[request.replica] -= 1
                self._enter(-1)
                request.done.succeed()

    def _enter(self, change: int) -> None:
        """Keep the integral of the requests inside over the time that counts."""
        start_s, end_s = max(self._since_s, self._load.warm_s), min(self._env.now, self._load.seconds)
        self._inside_s += self._num_inside * max(0.0, end_s - start_s)
        self._since_s = self._env.now
        self._num_inside += change


def simulate(plant: Plant, load: Load) -> Result:
    return Cluster(plant, load).run()


def _after(env: simpy.Environment, delay_s: float, then: Callable[[], None]) -> None:
    event = env.timeout(delay_s)
    assert event.callbacks is not None
    event.callbacks.append(lambda _: then())


def _between(points: Points, x: float) -> float:
    """The value at x on the line through its two neighbours among the points, or through the last two beyond them."""
    if len(points) == 1:
        return points[0][1]
    place = bisect_left(points, (x, 0.0), lo=1, hi=len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
