"""Has the engines compile grammars, one of each API key at a time."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from hashlib import sha256

from starlette.types import Receive

from service.engine.api import Engine
from service.web.generation.sse import unless_disconnected

MAX_KNOWN = 1024
"""Compiled grammars that are remembered, so that asking for one again waits for nobody."""


class Compiling:
    """One new grammar of an API key is compiled at a time, so that the others' turn comes."""

    def __init__(self) -> None:
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._known: OrderedDict[bytes, None] = OrderedDict()

    async def compile(
        self,
        rules: str,
        engines: Sequence[Engine],
        owner: str,
        num_answers: int = 1,
        receive: Receive | None = None,
    ) -> None:
        """Have rules compiled by every engine for so many answers of one request. Cancelling ends it.

        Args:
            receive: tells when the client leaves, which ends it too; None if that does not matter.

        Raises ClientGone if the client has left, else as `Engine.compile`.
        """
        work = self._compile(rules, engines, owner, num_answers)
        await (work if receive is None else unless_disconnected(receive, work))

    async def _compile(self, rules: str, engines: Sequence[Engine], owner: str, num_answers: int) -> None:
        digest = sha256(rules.encode()).digest()
        if digest in self._known:
            self._known.move_to_end(digest)
            await _compile(rules, engines, num_answers)
            return
        async with self._turns[owner]:
            await _compile(rules, engines, num_answers)
        self._known[digest] = None
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)


async def _compile(rules: str, engines: Sequence[Engine], num_answers: int) -> None:
    for engine in engines:
        await engine.compile(rules, num_answers)
