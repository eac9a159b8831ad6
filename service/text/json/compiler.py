"""Compiles JSON schemas for a vocabulary, and matches answers against them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from xgrammar import CompiledGrammar, GrammarCompiler, GrammarMatcher, TokenizerInfo, VocabType

from service.errors import InvalidRequest, QueueFull
from service.text.json.keywords import PARAM

MAX_COMPILING = 4
"""Most schemas being compiled or waiting for it, fewer than there are threads, since other requests need some too."""

CACHE_BYTES = 256 << 20
"""Most bytes of compiled schemas; beyond that the least recently used are dropped."""


class JsonMatcher:
    """Implements `service.engine.grammar.Matcher`."""

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


class JsonGrammar:
    """A compiled schema; implements `service.engine.grammar.Grammar`."""

    def __init__(self, grammar: CompiledGrammar, num_tokens: int) -> None:
        self._grammar = grammar
        self._num_tokens = num_tokens
        self.num_bytes = grammar.memory_size_bytes

    def matcher(self) -> JsonMatcher:
        """A matcher at the start of an answer."""
        return JsonMatcher(self._grammar, self._num_tokens)


class JsonCompiler:
    """Compiles rules for one vocabulary, one at a time, and caches them. Implements `service.engine.grammar.Grammars`.

    Args:
        vocabulary: returns the bytes that each token adds to a text; called on first use. A token without any is never
            allowed; one of bytes that are no UTF-8 only where the rules say `Token(id)`.
        eos_ids: tokens that end an answer; allowed only once the JSON is complete.
    """

    def __init__(self, vocabulary: Callable[[], Sequence[bytes]], eos_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._compiler: GrammarCompiler | None = None
        self._num_tokens = 0
        self._turn = threading.Lock()
        self._room = threading.BoundedSemaphore(MAX_COMPILING)
        self._made: OrderedDict[str, JsonGrammar] = OrderedDict()
        self._made_lock = threading.Lock()

    def compile(self, rules: str) -> JsonGrammar:
        """The grammar of rules from `json_grammar`. May take seconds for new rules.

        Raises:
            InvalidRequest: the rules cannot be compiled, or the model has no end token.
            QueueFull: MAX_COMPILING schemas are being compiled.
        """
        known = self._known(rules)
        if known is not None:
            return known
        if not self._eos_ids:
            raise InvalidRequest(
                "this model names no end token, so an answer that is held to a grammar could not end: leave "
                "`response_format`, or the forced `tool_choice`, out, or put eos_token_id into the model's "
                "generation_config.json",
                PARAM,
            )
        if not self._room.acquire(blocking=False):
            raise QueueFull(f"{MAX_COMPILING} JSON schemas are being compiled, which is the limit; try again later")
        try:
            with self._turn:
                return self._known(rules) or self._make(rules)
        except RuntimeError as error:
            raise InvalidRequest(f"the JSON schema cannot be compiled: {error}; simplify it", PARAM) from error
        finally:
            self._room.release()

    def _known(self, rules: str) -> JsonGrammar | None:
        with self._made_lock:
            found = self._made.get(rules)
            if found is not None:
                self._made.move_to_end(rules)
            return found

    def _make(self, rules: str) -> JsonGrammar:
        if self._compiler is None:
            tokens = list(self._vocabulary())
            info = TokenizerInfo(tokens, VocabType.RAW, stop_token_ids=sorted(self._eos_ids))
            self._compiler, self._num_tokens = GrammarCompiler(info, max_threads=1, cache_enabled=False), len(tokens)
        made = JsonGrammar(self._compiler.compile_grammar(rules), self._num_tokens)
        with self._made_lock:
            self._made[rules] = made
            while len(self._made) > 1 and sum(grammar.num_bytes for grammar in self._made.values()) > CACHE_BYTES:
                self._made.popitem(last=False)
        return made
