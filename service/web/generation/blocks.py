"""An answer as blocks, one after the other: reasoning, text, calls of tools."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from service.text.tools.calls import Arguments, Called, Said
from service.web.generation.run import Piece, Run
from service.web.generation.tool_use import Answering


class Kind(Enum):
    """What a block holds."""

    REASONING = auto()
    TEXT = auto()
    CALL = auto()


@dataclass(slots=True)
class Block:
    """A part of an answer.

    index: its place in the answer, from 0.
    text: so far; of a call, its arguments.
    name, call_id: of a call.
    """

    kind: Kind
    index: int
    text: str = ""
    name: str = ""
    call_id: str = ""


class Move(Enum):
    """What happens to a block."""

    OPENED = auto()
    GROWN = auto()
    CLOSED = auto()


class Change(NamedTuple):
    """A step in the growth of a block. text: what it grew by."""

    move: Move
    block: Block
    text: str = ""


class Blocks:
    """Divides one answer, as it grows, into blocks. At most one is open: the last.

    How the answer is split into pieces changes nothing but the sizes of the changes.
    """

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._open: Block | None = None
        self._is_over = False
        self.all: list[Block] = []
        self.num_calls = 0

    def grown(self, text: str, *, is_last: bool) -> list[Change]:
        """What the next text of the answer changes. An answer that is empty in the end is a block of empty text."""
        return list(self._changes(text, is_last=is_last))

    async def of(self, run: Run) -> AsyncGenerator[tuple[Piece, list[Change]], None]:
        """Yield each piece of a run and what it changes. Raises as `Run.pieces`."""
        async for piece in run.pieces():
            yield piece, self.grown(piece.text, is_last=run.finish_reason is not None)
        if not self._is_over:
            # The engine has aborted the run, without a last piece.
            yield Piece("", []), self.grown("", is_last=True)

    def _changes(self, text: str, *, is_last: bool) -> Iterator[Change]:
        thought, events = self._answering.divided(text, is_last=is_last)
        if thought:
            yield from self._add(Kind.REASONING, thought)
        for event in events:
            match event:
                case Said(said):
                    yield from self._add(Kind.TEXT, said)
                case Called(_, name):
                    self.num_calls += 1
                    yield from self._begin(Kind.CALL, name, self._answering.make_id())
                case Arguments(_, arguments):
                    yield from self._add(Kind.CALL, arguments)
        if is_last:
            self._is_over = True
            if not self.all:
                yield from self._begin(Kind.TEXT)
            yield from self._end()

    def _add(self, kind: Kind, text: str) -> Iterator[Change]:
        if not text:
            return
        if self._open is None or self._open.kind is not kind:
            yield from self._begin(kind)
        block = self._open
        assert block is not None
        block.text += text
        yield Change(Move.GROWN, block, text)

    def _begin(self, kind: Kind, name: str = "", call_id: str = "") -> Iterator[Change]:
        yield from self._end()
        self._open = Block(kind, len(self.all), name=name, call_id=call_id)
        self.all.append(self._open)
        yield Change(Move.OPENED, self._open)

    def _end(self) -> Iterator[Change]:
        if self._open is not None:
            yield Change(Move.CLOSED, self._open)
            self._open = None
