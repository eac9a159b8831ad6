"""Which tokens of which requests run in the next step.

A step is a list of chunks: a decode is a chunk of one token, a prefill a chunk of as many as the token budget leaves.
Decodes come first, so that a long prompt never stalls requests that are already generating. The scheduler uses lengths
only, never values of new tokens, so it can plan the next step before the tokens of the one in flight have reached the
host.

A prompt that begins like one computed before shares its blocks (`BlockPool`). At least its last two tokens are computed
again: the last must be, and a single row would take another kernel than a prompt's rows do, which rounds differently.
For the same reason no piece of a prompt has one row, nor is a single row left: a prompt that others of its step leave
room for fewer than three waits for the next step. Only decodes may leave less to the first of them.

A preempted request computes its answer again as it did the first time: every token of it in a chunk of its own. For the
model these are requests of one row, so preemption changes no bit. A step has at most as many chunks as there are rows.

Requests of several API keys share rows and blocks as `fairness` says. A key that waits below its share gets what a key
above its own has: the newest request of that is put back and computed again. Each key keeps its first one, so that all
get on.

With speculation a decode may bring draft tokens, each in a chunk of its own behind it, computed as decodes are for the
same reason. Every one samples: as long as what was sampled is the next draft, that draft's own sample counts too. Since
a sample depends only on the tokens before it and on the request's seed, an answer has the tokens that it would have
without drafts. The keys of wrong drafts are overwritten by the positions' next tokens before anything reads them.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from service.engine.api import FinishReason
from service.engine.blocks import BlockPool
from service.engine.drafts.speculation import Speculation
from service.engine.fairness import Shares, Waiting, turn
from service.engine.messages import Logprob
from service.engine.pacing import Pacing
from service.engine.request import Request
from service.engine.shapes import Shape

MIN_PIECE = 2
"""Fewest rows of a piece of a prompt."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions start .. start + length - 1 of a request, computed in one step.

    samples: the chunk reaches the request's last token, so its last row yields the next one.
    index: which generated token that is, counted from 0.
    scored: its positions whose next token is a prompt token that gets its log-probability; empty unless requested.
    draft: the token that its one position is assumed to hold; None where the tokens are known or on their way.
    """

    request: Request
    start: int
    length: int
    samples: bool
    index: int
    scored: range = range(0)
    draft: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The work of one forward pass. num_drafts: how many of the chunks check a draft token."""

    chunks: list[Chunk]
    num_drafts: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def num_requests(self) -> int:
        return len({chunk.request for chunk in self.chunks})

    @property
    def is_decode(self) -> bool:
        """Whether every chunk computes one token and samples one."""
        return all(chunk.length == 1 and chunk.samples for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepResults:
    """The results of a step. A place is an index into the chunks that sample, in order.

    time_s: when the results were read, from `time.perf_counter`.
    token_ids: one per place.
    faults: place -> the error that ends its request, whose token id is then meaningless.
    logprobs: place -> the log-probability of its token, if requested.
    scored: requests with the log-probabilities of the prompt tokens that this step scored.
    shape: the shape that the step was padded to and replayed in; None if its kernels were launched one by one.
    device_s: seconds that the device took; None where it is not measured.
    others_late: another rank launched the step when the one before it had ended.
    """

    time_s: float
    token_ids: Sequence[int]
    faults: Mapping[int, Exception] = field(default_factory=dict)
    logprobs: Mapping[int, Logprob] = field(default_factory=dict)
    scored: Sequence[tuple[Request, Sequence[Logprob]]] = ()
    shape: Shape | None = None
    device_s: float | None = None
    others_late: bool = False


class Scheduler:
    """Continuous batching over a paged KV cache: chunked prefill, preemption by recomputation."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_requests: int,
        max_batched_tokens: int,
        eos_ids: frozenset[int] = frozenset(),
        target_itl_s: float | None = None,
        step_times_s: Mapping[Shape, float] | None = None,
        has_prefix_cache: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self._has_prefix_cache = has_prefix_cache
        self._speculation = speculation
        self.block_size = block_size
        self.max_num_requests = max_num_requests
        self.pacing = Pacing(max_batched_tokens, target_itl_s, step_times_s)
        self.eos_ids = eos_ids
        self.waiting = Waiting()
        self.running: list[Request] = []
        """In the order in which they keep their blocks: for the sake of the first the last ones are preempted."""
        self._shares = Shares(max_num_requests)
        self._is_ranked = True
        self._was_shared = False
        self.num_preemptions = 0
        self.num_graph_steps = 0
        self.num_plain_steps = 0
        self.num_padding_tokens = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.admits_new = True
        """False holds back requests that have not started yet; see `is_drained`."""
        self.admitted: list[Request] = []
        """The requests that the last `schedule` started for the first time."""
        self._num_arrived = 0
        self._last_time_s = 0.0
        self._blocked: tuple[int, int] | None = None
        self._free_rows = list(range(max_num_requests - 1, -1, -1))

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def is_drained(self) -> bool:
        """Whether no request is running or preempted."""
        return not self.running and all(request.first_scheduled_s is None for request in self.waiting)

    def replace_pool(self, num_blocks: int) -> None:
        """Replace the pool by one of num_blocks free blocks. No request may be running."""
        assert not self.running
        self.pool = BlockPool(num_blocks)

    def add(self, request: Request) -> None:
        self._num_arrived += 1
        request.number = self._num_arrived
        num_owners = self._shares.num_owners
        self._shares.enter(request.params.owner)
        self._is_ranked &= self._shares.num_owners == num_owners
        self.waiting.add(request)

    def schedule(self, now_s: float) -> Step | None:
        """Plan the next step and advance the requests' lengths as if it had run.

        None if no request can run, or if drafts pay and must wait for the results of the step in flight.
        """
        self.admitted = []
        if not self.running:
            self._last_time_s = now_s
        self._rank()
        self._make_room()
        chunks: list[Chunk] = []
        decoding, reading = self._left()
        num_drafts = {} if reading else self._num_drafts([request for request, _ in decoding])
        if num_drafts and any(request.num_pending for request, _ in decoding):
            return None
        budget = self.pacing.budget(len(decoding))
        # How many chunks the step may have beyond one of each running request.
        num_spare = self.max_num_requests - len(self.running)
        is_starved = has_read = False
        num_preemptions = self.num_preemptions
        for request, num_left in decoding + reading:
            if request.row < 0 or request.is_behind or request.num_generated >= request.params.max_tokens:
                continue  # preempted by this very call, or waiting for its last token to be read
            if not budget:
                break
            length = 1
            if num_left > 1:
                if has_read and _is_cut_short(num_left, budget):
                    continue
                has_read = True
                length = _length(request, self._share(request, num_left, budget, reading), num_spare + 1)
            if not self._grow(request, length, chunks):
                is_starved = True
                continue
            budget -= length
            if length == 1:
                chunks.append(self._advance_to(request, request.num_computed + 1))
            else:
                new = self._advance(request, length)
                chunks += new
                num_spare -= len(new) - 1
        if num_drafts and chunks:
            return self._with_drafts(chunks, num_drafts)
        if not is_starved and self.num_preemptions == num_preemptions:
            chunks += self._start(budget, num_spare, now_s, has_read)
        return Step(chunks) if chunks else None

    def _left(self) -> tuple[list[tuple[Request, int]], list[tuple[Request, int]]]:
        """The running requests with the number of their tokens that are not computed: those with one, and with more."""
        decoding: list[tuple[Request, int]] = []
        reading: list[tuple[Request, int]] = []
        for request in self.running:
            num_left = request.num_tokens - request.num_computed
            if num_left == 1:
                decoding.append((request, 1))
            elif num_left:
                reading.append((request, num_left))
        return decoding, reading

    def _start(self, budget: int, num_spare: int, now_s: float, has_read: bool) -> list[Chunk]:
        """Admit requests in turn while they fit, and advance them by up to budget tokens in num_spare chunks."""
        chunks: list[Chunk] = []
        while budget and num_spare and (head := self._next()) is not None and not self._is_blocked(head):
            found = self._found(head)
            if not self._fits(head, found):
                self._blocked = head.serial, self.pool.num_free
                break
            num_left = head.num_tokens - len(found) * self.block_size
            if (has_read or chunks) and _is_cut_short(num_left, budget):
                break
            share = self._share(head, num_left, budget)
            self._admit(head, now_s, found)
            length = _length(head, share, num_spare)
            missing = self._num_blocks(head.num_computed + length) - len(head.blocks)
            head.blocks.extend(self.pool.allocate(missing))
            new = self._advance(head, length)
            chunks += new
            budget -= length
            num_spare -= len(new)
        return chunks

    def num_cached(self, prompt_ids: Sequence[int], salt: str) -> int:
        """How many tokens of a prompt are in the cache."""
        return len(self._cached_blocks(prompt_ids, salt)) * self.block_size

    def commit(self, step: Step, results: StepResults) -> list[tuple[int, Request]]:
        """Apply the results of a finished step. Returns (place, request) for each request that got a token or a fault.

        A fault ends its request only. Results of requests that have ended meanwhile are dropped.
        """
        took: list[tuple[int, Request]] = []
        num_requests, place = step.num_requests, 0
        last: Request | None = None
        self._count(step, results)
        for request, logprobs in results.scored:
            request.prompt_logprobs += logprobs
        for chunk in step.chunks:
            request = chunk.request
            if request is not last:
                request.num_steps += 1
                request.num_batch_rows += num_requests
            last = request
            if not chunk.samples:
                request.is_uncounted = True
                continue
            if not request.is_finished and (chunk.draft is None or self._accepts(chunk)):
                request.num_pending -= chunk.draft is None
                request.has_drafts = False
                took.append((place, request))
                if place in results.faults:
                    self.pool.forget(request.blocks)
                    self.finish(request, FinishReason.ABORT, results.time_s)
                else:
                    # Not before: the keys of a prompt are known to be sound once its last row is finite.
                    if (chunk.start + chunk.length) // self.block_size > len(request.block_keys):
                        self._remember(request, chunk.start + chunk.length)
                    self._append(request, results.token_ids[place], results.time_s)
            place += 1
        assert place == len(results.token_ids), f"{place} requests sampled, {len(results.token_ids)} tokens came"
        return took

    def _accepts(self, chunk: Chunk) -> bool:
        """Whether the draft of a chunk is the token sampled before it. Then its keys count, and so does its sample."""
        request = chunk.request
        if len(request.output_ids) != chunk.index or request.output_ids[-1] != chunk.draft:
            return False
        self.num_accepted_tokens += 1
        # A preempted request starts over.
        if request.row >= 0:
            request.num_computed += 1
        return True

    def _count(self, step: Step, results: StepResults) -> None:
        self.num_draft_tokens += step.num_drafts
        if self._speculation is not None:
            if step.is_decode:
                self._speculation.observe(len(step.chunks), step.num_drafts > 0, results.time_s - self._last_time_s)
            self._last_time_s = results.time_s
        if results.shape is None:
            self.num_plain_steps += 1
            return
        self.num_graph_steps += 1
        self.num_padding_tokens += results.shape.num_tokens - step.num_tokens
        if results.device_s is not None:
            self.pacing.observe(results.shape, results.device_s)

    def finish(self, request: Request, reason: FinishReason, now_s: float) -> None:
        """End a running or queued request and free what it holds. Idempotent."""
        if request.is_finished:
            return
        request.finish_reason, request.finished_s = reason, now_s
        self._shares.leave(request.params.owner)
        if request.row >= 0:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def check_integrity(self) -> None:
        """Assert that every block and row is either free or owned by one running request."""
        self.pool.check_integrity([block for request in self.running for block in request.blocks])
        assert not any(request.blocks or request.row >= 0 for request in self.waiting)
        assert len({request.row for request in self.running} | set(self._free_rows)) == len(self.running) + len(
            self._free_rows
        )

    def _append(self, request: Request, token_id: int, time_s: float) -> None:
        request.output_ids.append(token_id)
        ends = request.matcher is not None or not request.params.ignore_eos
        if (ends and token_id in self.eos_ids) or token_id in request.params.end_ids:
            self.finish(request, FinishReason.STOP, time_s)
        elif len(request.output_ids) >= request.params.max_tokens:
            self.finish(request, FinishReason.LENGTH, time_s)
        elif request.matcher is not None:
            request.matcher.accept(token_id)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _advance(self, request: Request, length: int) -> list[Chunk]:
        """The chunks of a request's next length tokens: one of those of its prompt, one of each that it generated."""
        start, num_prompt = request.num_computed, len(request.prompt_ids)
        stop = start + length
        if stop <= num_prompt:
            return [self._advance_to(request, stop)]
        read = [self._advance_to(request, num_prompt)] if start < num_prompt else []
        return read + [self._advance_to(request, end + 1) for end in range(max(start, num_prompt), stop)]

    def _advance_to(self, request: Request, stop: int) -> Chunk:
        start = request.num_computed
        samples = stop == request.num_tokens
        chunk = Chunk(request, start, stop - start, samples, request.num_generated, _scored(request, stop))
        self._shares.charge(request.params.owner, stop - start)
        request.num_scored += len(chunk.scored)
        request.num_computed = stop
        request.num_pending += samples
        return chunk

    def _num_drafts(self, decoding: Sequence[Request]) -> dict[Request, int]:
        """How many tokens the decoding requests should draft. None does while prompts wait for the rest of a step."""
        if self._speculation is None or self.waiting or not decoding:
            return {}
        return self._speculation.plan([r for r in decoding if r.num_generated < r.params.max_tokens])

    def _with_drafts(self, decodes: Sequence[Chunk], num_drafts: Mapping[Request, int]) -> Step:
        """A step of decodes that all have their blocks, and of the drafts for which blocks are left."""
        chunks: list[Chunk] = []
        for chunk in decodes:
            chunks.append(chunk)
            if chunk.request in num_drafts:
                chunks += self._draft(chunk, num_drafts[chunk.request])
        return Step(chunks, len(chunks) - len(decodes))

    def _draft(self, chunk: Chunk, count: int) -> list[Chunk]:
        """Chunks for up to count draft tokens behind a decode, as far as there are free blocks."""
        request = chunk.request
        assert request.drafter is not None
        num_slots = (len(request.blocks) + self.pool.num_free) * self.block_size
        drafts = request.drafter.propose(min(count, num_slots - request.num_computed))
        missing = self._num_blocks(request.num_computed + len(drafts)) - len(request.blocks)
        request.blocks.extend(self.pool.allocate(max(0, missing)))
        request.has_drafts = bool(drafts)
        # Right or wrong, they were computed: others had to wait for them.
        self._shares.charge(request.params.owner, len(drafts))
        return [
            Chunk(request, chunk.start + number, 1, True, chunk.index + number, draft=token_id)
            for number, token_id in enumerate(drafts, 1)
        ]

    def _share(self, request: Request, num_left: int, budget: int, reading: Sequence[tuple[Request, int]] = ()) -> int:
        """How much of the budget a request with num_left tokens may have.

        All of it, unless that would not do: then it leaves up to half of it to the prompts behind it, of those that are
        being read and those that could start, so that a short prompt does not wait for the end of a long one.
        """
        if num_left <= budget:
            return budget
        behind = [other_left for other, other_left in reading if _place(other) > _place(request)]
        num_free = self.pool.num_free - self._num_blocks(budget)
        others = (other for other in self.waiting if other is not request)
        # One of the free rows will be its own if it has none yet.
        for other, _ in zip(others, self._free_rows[request.row < 0 :], strict=False):
            num_free -= self._num_blocks(other.num_tokens + 1)
            if num_free < 0 or not self._may_start(other):
                break
            behind.append(other.num_tokens)
        return max(budget - min(budget // 2, sum(behind)), min(budget, MIN_PIECE + 1))

    def _grow(self, request: Request, length: int, chunks: Sequence[Chunk]) -> bool:
        """Allocate blocks for length more tokens. False if there are too few.

        Requests behind it that are not in this step are preempted for it, the last first.
        """
        missing = self._num_blocks(request.num_computed + length) - len(request.blocks)
        if not missing:
            return True
        if missing > self.pool.num_free:
            # This set is needed only here, which is rare, so it is built here.
            kept = {request, *(chunk.request for chunk in chunks)}
            victims = [r for r in self.running if _place(r) > _place(request) and r not in kept]
            while missing > self.pool.num_free:
                if not victims:
                    return False
                self._preempt(victims.pop())
        request.blocks.extend(self.pool.allocate(missing))
        return True

    def _preempt(self, request: Request) -> None:
        """Free a request's blocks and queue it before those of its key and priority that have not started.

        What has left the cache by then is computed again.
        """
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(request)

    def _rank(self) -> None:
        """Sort the running requests of several keys: the first of each by arrival, then the second of each, and on."""
        is_shared, was_shared = self._shares.num_owners > 1, self._was_shared
        # One key's requests are in order already, and sorting hundreds of them would take 0.1 ms.
        if self._is_ranked or not (is_shared or was_shared):
            return
        self._is_ranked, self._was_shared = True, is_shared
        self.running.sort(key=turn)
        if is_shared:
            num_before: Counter[str] = Counter()
            places = {}
            for request in self.running:
                places[request] = num_before[request.params.owner], request.number
                num_before[request.params.owner] += 1
            self.running.sort(key=places.__getitem__)
        for rank, request in enumerate(self.running):
            request.rank = rank if is_shared else 0

    def _make_room(self) -> None:
        """Preempt a request of a key above its share if one of a key below its own waits for its row or blocks.

        One in a step, so that no row stays empty for long.
        """
        num_owners = self._shares.num_owners
        if num_owners < 2 or not self.waiting or not self.running:
            return
        head = self._head()
        if head is None or head.num_pending or (self._free_rows and not self._is_blocked(head)):
            return
        num_blocks: Counter[str] = Counter()
        for request in self.running:
            num_blocks[request.params.owner] += len(request.blocks)
        rows, blocks = self._shares.num_rows, self.pool.num_blocks // num_owners
        owner = head.params.owner
        is_below = num_blocks[owner] + self._num_blocks(head.num_tokens + 1) <= blocks
        if self._shares.num_running(owner) and not (self._shares.num_running(owner) < rows and is_below):
            return
        above = {
            other
            for other, count in num_blocks.items()
            if other != owner and (self._shares.num_running(other) > rows or count > blocks)
        }
        firsts = {request.params.owner: request for request in reversed(self.running)}
        victims = (r for r in reversed(self.running) if r.params.owner in above and r is not firsts[r.params.owner])
        victim = next(victims, None)
        if victim is not None:
            self._preempt(victim)

    def _found(self, request: Request) -> list[tuple[int, int]]:
        """(block, key) of the blocks that the request can share; none if all its rows are wanted."""
        if request.params.prompt_logprobs is not None or request.num_pending:
            return []
        params = request.params
        found = self._cached_blocks(request.known_ids(0, request.num_tokens), params.salt, params.max_cached)
        # A last row of the prompt is not computed alone, though more follows it in a preempted request.
        return found[:-1] if len(found) * self.block_size == len(request.prompt_ids) - 1 else found

    def _cached_blocks(
        self, token_ids: Sequence[int], salt: str, max_cached: int | None = None
    ) -> list[tuple[int, int]]:
        if not self._has_prefix_cache:
            return []
        num_tokens = max(0, len(token_ids) - MIN_PIECE)
        num_tokens = num_tokens if max_cached is None else min(num_tokens, max_cached)
        return self.pool.find(salt, token_ids[: num_tokens // self.block_size * self.block_size], self.block_size)

    def _remember(self, request: Request, num_tokens: int) -> None:
        """Tell the pool what the request's full blocks hold, now that num_tokens of it have been computed."""
        if not self._has_prefix_cache or request.row < 0:
            return  # it has ended, or has been preempted meanwhile
        keys = request.block_keys
        for index in range(len(keys), num_tokens // self.block_size):
            start = index * self.block_size
            ids = request.known_ids(start, start + self.block_size)
            keys.append(self.pool.remember(keys[-1] if keys else request.params.salt, ids, request.blocks[index]))

    def _may_start(self, request: Request) -> bool:
        is_ready = request.matcher is None or request.matcher.is_ready
        return is_ready and (self.admits_new or request.first_scheduled_s is not None)

    def _head(self) -> Request | None:
        """The request whose turn it is to start."""
        return min(self.waiting.heads(self._may_start).values(), key=self._shares.order, default=None)

    def _next(self) -> Request | None:
        """The request whose turn it is to start, if a row is free and the host has read all its tokens."""
        if not self._free_rows:
            return None
        request = self._head()
        return request if request is not None and request.num_pending == 0 else None

    def _is_blocked(self, request: Request) -> bool:
        """Whether it was too large for the free blocks, and there are no more now: looking its tokens up takes time."""
        if self._blocked is None or not self.running:
            return False
        blocked, num_free = self._blocked
        return blocked == request.serial and self.pool.num_free <= num_free

    def _fits(self, request: Request, found: Sequence[tuple[int, int]]) -> bool:
        """Whether all tokens of a request fit into the free blocks and the found ones."""
        num_shared = len(found) - self.pool.num_idle([block for block, _ in found])
        return self._num_blocks(request.num_tokens + 1) - num_shared <= self.pool.num_free or not self.running

    def _admit(self, request: Request, now_s: float, found: Sequence[tuple[int, int]]) -> None:
        self.waiting.remove(request)
        request.row = self._free_rows.pop()
        request.blocks += [block for block, _ in found]
        request.block_keys = [key for _, key in found]
        self.pool.share(request.blocks)
        request.num_computed = len(found) * self.block_size
        if request.first_scheduled_s is None:
            request.first_scheduled_s, request.num_cached = now_s, request.num_computed
            self.admitted.append(request)
        owner = request.params.owner
        request.rank = len(self.running) if self._shares.num_owners > 1 else 0
        self._shares.start(owner)
        self._is_ranked = False
        insort(self.running, request, key=_place)

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.block_keys = []
        self._free_rows.append(request.row)
        request.row = -1
        self._shares.stop(request.params.owner)
        self._is_ranked = False


def _place(request: Request) -> tuple[int, int, bool, int]:
    """Sorts running requests by the rank they had at the start of the step; if there is one key alone, by `turn`."""
    return request.rank, *turn(request)


def _length(request: Request, budget: int, max_chunks: int) -> int:
    """How many of a request's tokens the next step computes: a piece of its prompt, or the rest of that, and of what
    it has generated already as many as it may have chunks for."""
    num_prompt = max(0, len(request.prompt_ids) - request.num_computed)
    length = _piece(num_prompt, budget)
    if length < num_prompt:
        return length
    num_again = request.num_tokens - request.num_computed - num_prompt
    return length + min(num_again, budget - length, max_chunks - (num_prompt > 0))


def _is_cut_short(num_left: int, budget: int) -> bool:
    """Whether a piece of a prompt's num_left tokens would be a single row, or leave one."""
    return budget <= MIN_PIECE and num_left > budget


def _piece(num_left: int, budget: int) -> int:
    """How many of a prompt's num_left tokens the next step computes: if possible not 1, nor all but 1."""
    length = min(num_left, budget)
    shorter = length - 1 if num_left - length == 1 else length
    return shorter if shorter >= min(num_left, MIN_PIECE) else length


def _scored(request: Request, stop: int) -> range:
    """Prompt positions below stop not scored yet; after a preemption, those scored before are left out."""
    if request.params.prompt_logprobs is None:
        return range(0)
    return range(request.num_scored, max(request.num_scored, min(stop, len(request.prompt_ids) - 1)))
