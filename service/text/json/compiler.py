"""Answers held to JSON: schemas compiled for a vocabulary, and how far each answer has come in its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from xgrammar import CompiledGrammar, GrammarCompiler, GrammarMatcher, TokenizerInfo, VocabType

from service.errors import InvalidRequest, QueueFull
from service.text.json.keywords import PARAM
from service.text.json.schema import json_grammar

MAX_COMPILING = 4
"""Schemas that may be compiled or wait for it at once: fewer than the threads that other requests need as well."""

CACHE_BYTES = 256 << 20
"""Of compiled schemas; the least recently used go."""


class JsonMatcher:
    """How far one answer has come in its grammar; see `service.engine.grammar.Matcher`."""

    def __init__(self, grammar: CompiledGrammar, num_tokens: int) -> None:
        self._matcher = GrammarMatcher(grammar)
        self._words = np.zeros((1, -(-num_tokens // 32)), dtype=np.int32)

    def allowed(self) -> bytes:
        """A bit for each token; after the end none."""
        self._words.fill(0)
        if not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(self._words)
        return self._words.astype("<i4", copy=False).tobytes()

    def accept(self, token_id: int) -> None:
        """Move on by a token.

        Raises:
            ValueError: the token may not come here.
        """
        if not self._matcher.accept_token(token_id):
            raise ValueError(f"token {token_id} may not come here")


class JsonGrammar:
    """A compiled schema; see `service.engine.grammar.Grammar`."""

    def __init__(self, grammar: CompiledGrammar, num_tokens: int) -> None:
        self._grammar = grammar
        self._num_tokens = num_tokens

    def matcher(self) -> JsonMatcher:
        """A matcher at the start of an answer."""
        return JsonMatcher(self._grammar, self._num_tokens)


class JsonCompiler:
    """Compiles schemas for one vocabulary, one at a time, and keeps what it made.

    Args:
        tokens: the bytes that each token adds to a text, empty for those that add none.
        eos_ids: tokens that end an answer; allowed where the JSON is complete and nowhere else.
    """

    def __init__(self, tokens: Sequence[bytes], eos_ids: frozenset[int]) -> None:
        info = TokenizerInfo(list(tokens), VocabType.RAW, stop_token_ids=sorted(eos_ids))
        self._compiler = GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)
        self._num_tokens = len(tokens)
        self._turn = threading.Lock()
        self._room = threading.BoundedSemaphore(MAX_COMPILING)

    def compile(self, schema: dict[str, Any] | None) -> JsonGrammar:
        """What an answer must match; None: any JSON object. Takes up to seconds: not for the event loop.

        Raises:
            InvalidRequest: the schema is not served; see `json_grammar`.
            QueueFull: MAX_COMPILING schemas are being compiled.
        """
        rules = json_grammar(schema)
        if not self._room.acquire(blocking=False):
            raise QueueFull(f"{MAX_COMPILING} JSON schemas are being compiled, which is the limit; try again later")
        try:
            with self._turn:
                return JsonGrammar(self._compiler.compile_grammar(rules), self._num_tokens)
        except RuntimeError as error:
            raise InvalidRequest(f"the JSON schema cannot be compiled: {error}; simplify it", PARAM) from error
        finally:
            self._room.release()
