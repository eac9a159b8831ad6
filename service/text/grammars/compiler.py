"""Compiles grammars for a vocabulary, and matches answers against them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import NoReturn

import numpy as np
from xgrammar import CompiledGrammar, GrammarCompiler, GrammarMatcher

from service.engine.grammar import GivenUp, GrammarLimits
from service.errors import DeadlineExceeded, InvalidRequest
from service.process import start_thread
from service.text.grammars.trial_process import NICENESS, Vocabulary, compile_rules, compiler_of
from service.text.grammars.trials import TrialParent, Trials

PARAM = "response_format"

MAX_COMPILING = 2
"""Grammars that are compiled at a time; others wait in the order in which they came."""

CACHE_BYTES = 256 << 20
"""Most bytes of compiled grammars; beyond that the least recently used are dropped."""

MAX_REFUSED = 256
"""Refused grammars that are remembered, so that asking again costs nothing."""


class RulesMatcher:
    """Implements `service.engine.grammar.Matcher`."""

    is_ready = True

    def __init__(self, grammar: CompiledGrammar, num_tokens: int) -> None:
        self._matcher = GrammarMatcher(grammar)
        self._words = np.zeros((1, -(-num_tokens // 32)), dtype=np.int32)

    def allowed(self) -> bytes:
        """One bit per token; none is set after the end."""
        self._words.fill(0)
        if not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(self._words)
        return self._words.astype("<i4", copy=False).tobytes()

    def accept(self, token_id: int) -> None:
        """Advance by a token.

        Raises:
            ValueError: the token is not allowed here.
        """
        if not self._matcher.accept_token(token_id):
            raise ValueError(f"token {token_id} may not come here")


@dataclass(frozen=True, slots=True)
class RulesGrammar:
    """A compiled grammar; implements `service.engine.grammar.Grammar`.

    mask_s: seconds of the dearest mask that its trial found; 0 without a trial.
    """

    compiled: CompiledGrammar
    num_tokens: int
    mask_s: float = 0.0

    @property
    def num_bytes(self) -> int:
        return int(self.compiled.memory_size_bytes)

    def matcher(self) -> RulesMatcher:
        """A matcher at the start of an answer."""
        return RulesMatcher(self.compiled, self.num_tokens)


class RulesCompiler:
    """Compiles rules for one vocabulary, and caches them. Implements `service.engine.grammar.Grammars`.

    New rules are compiled twice: on trial in a process that can be ended, then here, since by then they are known
    to be cheap. Passing the result on takes longer: 9 MB and 0.6 s for a schema that compiles in 0.03 s.

    Args:
        vocabulary: returns the bytes that each token adds to a text; called on first use. A token without any is never
            allowed; one of bytes that are no UTF-8 only where the rules say `Token(id)`.
        eos_ids: tokens that end an answer; allowed only once it is complete.
        limits: what a grammar may cost; None: there are no trials and no limits.
        parent: see `Trials`.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Sequence[bytes]],
        eos_ids: frozenset[int],
        limits: GrammarLimits | None = None,
        parent: TrialParent | None = None,
    ) -> None:
        self._read_tokens = vocabulary
        self._eos_ids = eos_ids
        self._limits = limits
        self._trials = None if limits is None else Trials(self._vocabulary, limits, parent)
        self._compiler: GrammarCompiler | None = None
        self._compiler_lock = threading.Lock()
        self._turns = Turns(MAX_COMPILING)
        self._made: OrderedDict[str, RulesGrammar] = OrderedDict()
        self._refused: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, rules: str, num_answers: int = 1, given_up: GivenUp | None = None) -> RulesGrammar:
        """See `Grammars.compile`.

        Raises:
            InvalidRequest: the rules cannot be compiled or are too dear, or the model has no end token.
            DeadlineExceeded: it was given up.
        """
        made = self._found(rules) or self._new(rules, Future() if given_up is None else given_up)
        self._refuse_dear(made, num_answers)
        return made

    def known(self, rules: str) -> RulesGrammar | None:
        """See `Grammars.known`.

        Raises:
            InvalidRequest: the rules have been refused, or are too dear.
        """
        found = self._found(rules)
        if found is not None:
            self._refuse_dear(found, 1)
        return found

    def _refuse_dear(self, made: RulesGrammar, num_answers: int) -> None:
        """Raise InvalidRequest if the masks of so many answers take longer than the limit."""
        if self._limits is not None and num_answers * made.mask_s > self._limits.masks_s:
            raise InvalidRequest(
                f"finding the tokens that the grammar allows next takes up to {1e3 * made.mask_s:.3g} ms, for "
                f"{num_answers} answers {1e3 * num_answers * made.mask_s:.3g}; this server's limit is "
                f"{1e3 * self._limits.masks_s:g} ms a request (max_request_mask_ms); ask for fewer answers, or let "
                "fewer alternatives begin alike",
                PARAM,
            )

    def close(self) -> None:
        """End the processes of trials."""
        if self._trials is not None:
            self._trials.close()

    @property
    def trials_pid(self) -> int | None:
        """The process that trials are forked from, once it has been started."""
        return None if self._trials is None else self._trials.pid

    def _found(self, rules: str) -> RulesGrammar | None:
        """The grammar of rules that have been compiled. Raises InvalidRequest if they have been refused."""
        with self._lock:
            found = self._made.get(rules)
            if found is not None:
                self._made.move_to_end(rules)
            elif self._refused and (refused := self._refused.get(_digest(rules))) is not None:
                raise InvalidRequest(refused, PARAM)
            return found

    def _new(self, rules: str, given_up: GivenUp) -> RulesGrammar:
        if not self._eos_ids:
            raise InvalidRequest(
                "this model names no end token, so an answer that is held to a grammar could not end: leave "
                "`response_format`, or the forced `tool_choice`, out, or put eos_token_id into the model's "
                "generation_config.json",
                PARAM,
            )
        with self._turns.turn(given_up):
            return self._found(rules) or self._make(rules, self._tried(rules, given_up))

    def _tried(self, rules: str, given_up: GivenUp) -> float:
        """Seconds of the dearest mask that a trial found. Raises InvalidRequest if it failed."""
        if self._trials is None or self._limits is None:
            return 0.0
        verdict, limits = self._trials.run(rules, given_up), self._limits
        if verdict is None:
            if given_up.done():
                raise DeadlineExceeded("nobody waits for this grammar any more")
            self._refuse(
                rules,
                f"the grammar was not compiled within {limits.compile_s:g} s of processor time "
                f"(max_grammar_compile_s) and {limits.compile_bytes >> 20} MiB of memory (max_grammar_compile_bytes), "
                "which are this server's limits; simplify it: fewer and shorter repetitions, lengths and alternatives",
            )
        if verdict.complaint is not None:
            self._refuse(rules, f"the grammar cannot be compiled: {verdict.complaint}; mend it")
        if verdict.mask_s > limits.mask_s:
            self._refuse(
                rules,
                f"finding the tokens that the grammar allows next takes {1e3 * verdict.mask_s:.0f} ms; this server's "
                f"limit is {1e3 * limits.mask_s:g} ms (max_mask_ms); simplify it: let fewer alternatives begin alike, "
                "and repeat no repetitions",
            )
        return verdict.mask_s

    def _refuse(self, rules: str, why: str) -> NoReturn:
        with self._lock:
            self._refused[_digest(rules)] = why
            while len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)
        raise InvalidRequest(why, PARAM)

    def _make(self, rules: str, mask_s: float) -> RulesGrammar:
        with self._compiler_lock:
            if self._compiler is None:
                self._compiler = compiler_of(self._vocabulary())
        try:
            # On a thread of its own, which gives way to those that launch steps.
            compiled = start_thread("grammar", _compile_aside, self._compiler, rules).result()
        except ValueError as error:
            raise InvalidRequest(f"the grammar cannot be compiled: {error}; mend it", PARAM) from error
        made = RulesGrammar(compiled, compiled.tokenizer_info.vocab_size, mask_s)
        with self._lock:
            self._made[rules] = made
            while len(self._made) > 1 and sum(grammar.num_bytes for grammar in self._made.values()) > CACHE_BYTES:
                self._made.popitem(last=False)
        return made

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(list(self._read_tokens()), sorted(self._eos_ids))


class Turns:
    """Lets so many callers at a time go on, in the order in which they came."""

    def __init__(self, num_turns: int) -> None:
        self._num_free = num_turns
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, given_up: GivenUp) -> Iterator[None]:
        """Wait for a turn, and keep it inside. Raises DeadlineExceeded if it was given up before."""
        ticket = object()
        given_up.add_done_callback(self._wake)
        with self._changed:
            self._queue.append(ticket)
            self._changed.wait_for(lambda: given_up.done() or (self._num_free and self._queue[0] is ticket))
            self._queue.remove(ticket)
            self._changed.notify_all()
            if given_up.done():
                raise DeadlineExceeded("nobody waits for this grammar any more")
            self._num_free -= 1
        try:
            yield
        finally:
            with self._changed:
                self._num_free += 1
                self._changed.notify_all()

    def _wake(self, _: GivenUp) -> None:
        with self._changed:
            self._changed.notify_all()


def _compile_aside(compiler: GrammarCompiler, rules: str) -> CompiledGrammar:
    # Linux has a niceness for each thread; elsewhere the whole process would get it.
    if hasattr(os, "sched_getaffinity"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    return compile_rules(compiler, rules)


def _digest(rules: str) -> bytes:
    return sha256(rules.encode()).digest()
