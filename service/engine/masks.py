"""Finds the tokens that grammars allow beside the steps, so that a dear grammar keeps nobody else waiting."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from service.engine.grammar import GivenUp, Grammar, Matcher
from service.errors import EngineFailed, InvalidRequest, OttavaError
from service.process import start_thread

logger = logging.getLogger(__name__)

QUICK_S = 1e-3
"""Steps wait for masks that are expected within this time; an answer whose last one took longer misses a step."""


class Constraint:
    """The position of one answer in its grammar; implements `Matcher`. Its masks are made by `Masks`.

    owner: the API key of its request. handle: the request's.
    """

    def __init__(self, masks: Masks, owner: str, handle: int) -> None:
        self.owner = owner
        self.handle = handle
        self.expected_s = 0.0
        self._masks = masks
        self._matcher: Matcher | None = None
        self._token_id: int | None = None
        self._bits: bytes | None = None

    @property
    def is_ready(self) -> bool:
        """Whether `allowed` is known."""
        return self._bits is not None

    def begin(self, grammar: Grammar) -> None:
        """Have the first mask of an answer made."""
        self._matcher, self.expected_s = grammar.matcher(), grammar.mask_s
        self._masks.put(self)

    def allowed(self) -> bytes:
        """See `Matcher.allowed`. Only while `is_ready`."""
        assert self._bits is not None, "its mask is still being made"
        return self._bits

    def accept(self, token_id: int) -> None:
        """Have the mask made that follows a token."""
        self._token_id, self._bits = token_id, None
        self._masks.put(self)

    def make(self, most_s: float) -> None:
        """Make the next mask. Called on a thread of `Masks`.

        Raises:
            InvalidRequest: it took more than most_s of processor time, or allows no token before the grammar's end.
            ValueError: the token before it was not allowed.
        """
        assert self._matcher is not None, "it has not begun"
        begin_s = time.thread_time()
        if self._token_id is not None:
            self._matcher.accept(self._token_id)
        bits = self._matcher.allowed()
        took_s = self.expected_s = time.thread_time() - begin_s
        if took_s > most_s:
            raise InvalidRequest(
                f"finding the tokens that the grammar allows next took {1e3 * took_s:.0f} ms; this server's limit is "
                f"{1e3 * most_s:g} ms (max_mask_ms); simplify it: let fewer alternatives begin alike, and repeat no "
                "repetitions"
            )
        if bits.count(0) == len(bits):
            raise InvalidRequest("the grammar allows no token here, but is not at its end; mend it")
        self._bits = bits


@dataclass(slots=True)
class Lane:
    """Constraints whose masks one thread makes, an owner's in order, the owners in turns."""

    queues: dict[str, deque[weakref.ref[Constraint]]]
    num_left: int = 0

    def put(self, constraint: Constraint) -> None:
        self.queues.setdefault(constraint.owner, deque()).append(weakref.ref(constraint))
        self.num_left += 1

    def take(self) -> Constraint | None:
        """The next one; None if its request has ended meanwhile."""
        owner, queue = next(iter(self.queues.items()))
        constraint = queue.popleft()()
        # To the end of the owners.
        del self.queues[owner]
        if queue:
            self.queues[owner] = queue
        return constraint


class Masks:
    """Makes the masks of one engine on two threads: one for those that steps wait for, one for dear ones.

    A mask that is dearer than the limit, or allows nothing, ends its request: see `take_faults`. A grammar that is no
    longer in the cache of compiled ones is compiled again beside the steps too.

    Args:
        mask_s: most processor seconds of a mask.
    """

    def __init__(self, mask_s: float) -> None:
        self._mask_s = mask_s
        self._changed = threading.Condition()
        self._quick, self._dear = Lane({}), Lane({})
        self._num_compiling = 0
        self._faults: list[tuple[int, OttavaError]] = []
        self._is_running = self._is_closed = False

    def start(self, grammar: Grammar, owner: str, handle: int) -> Constraint:
        """A constraint at the start of an answer, whose first mask is being made."""
        constraint = Constraint(self, owner, handle)
        constraint.begin(grammar)
        return constraint

    def compile(self, compiling: Callable[[GivenUp], Grammar], owner: str, handle: int) -> Constraint:
        """As `start`, of a grammar that is first compiled on a thread of its own, which may take seconds.

        It is given up when its request has ended. If it fails, so does the request: see `take_faults`.
        """
        constraint, given_up = Constraint(self, owner, handle), GivenUp()
        weakref.finalize(constraint, given_up.set_result, None).atexit = False
        with self._changed:
            self._num_compiling += 1
        start_thread("grammar", self._compile, weakref.ref(constraint), handle, partial(compiling, given_up))
        return constraint

    def _compile(self, waiting: weakref.ref[Constraint], handle: int, compiling: Callable[[], Grammar]) -> None:
        fault: OttavaError | None = None
        try:
            grammar = compiling()
            if (constraint := waiting()) is not None:
                constraint.begin(grammar)
            del constraint
        except OttavaError as error:
            fault = error
        except Exception:
            logger.exception("a grammar could not be compiled")
            fault = EngineFailed("the grammar could not be compiled: this request is lost; send it again")
        with self._changed:
            self._num_compiling -= 1
            if fault is not None:
                self._faults.append((handle, fault))
            self._changed.notify_all()

    def put(self, constraint: Constraint) -> None:
        """Have a constraint's next mask made."""
        lane = self._quick if constraint.expected_s <= QUICK_S else self._dear
        with self._changed:
            if not self._is_running:
                self._is_running = True
                for each in (self._quick, self._dear):
                    start_thread("masks", self._run, each)
            lane.put(constraint)
            self._changed.notify_all()

    def settle(self, most_s: float) -> None:
        """Wait until the quick ones are made, at most so long."""
        if self._quick.num_left:
            with self._changed:
                self._changed.wait_for(lambda: not self._quick.num_left, most_s)

    def wait(self, most_s: float) -> None:
        """Wait until another mask is made or grammar compiled, at most so long; not at all if none is being made."""
        with self._changed:
            num_left = self._num_left
            self._changed.wait_for(lambda: self._num_left < num_left or not num_left, most_s)

    def take_faults(self) -> list[tuple[int, OttavaError]]:
        """The requests that must end, by handle, and why."""
        if not self._faults:
            return []
        with self._changed:
            faults, self._faults = self._faults, []
            return faults

    def close(self) -> None:
        """End the threads. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    @property
    def _num_left(self) -> int:
        return self._quick.num_left + self._dear.num_left + self._num_compiling

    def _run(self, lane: Lane) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: lane.queues or self._is_closed)
                if self._is_closed:
                    return
                constraint = lane.take()
            fault: OttavaError | None = None
            try:
                if constraint is not None:
                    constraint.make(self._mask_s)
            except InvalidRequest as error:
                fault = error
            except Exception:
                logger.exception("a mask could not be made")
                fault = EngineFailed("the grammar could not be followed: this request is lost; send it again")
            with self._changed:
                lane.num_left -= 1
                if fault is not None and constraint is not None:
                    self._faults.append((constraint.handle, fault))
                self._changed.notify_all()
            # Or it would be kept until the next mask.
            del constraint
