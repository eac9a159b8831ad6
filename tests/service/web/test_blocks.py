"""An answer as blocks, where the routes' own tests do not reach; and the names in errors of what was translated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest

from service.engine.api import FinishReason
from service.errors import InvalidRequest
from service.web.generation.blocks import Blocks, Change, Move
from service.web.generation.renaming import named_as_sent
from service.web.generation.run import Piece, Run
from service.web.generation.tool_use import Answering


class AbortedRun:
    """Ends without a last piece, as a run does that the engine aborts."""

    finish_reason: FinishReason | None = None

    async def pieces(self) -> AsyncIterator[Piece]:
        yield Piece("hel", [1, 2, 3])
        self.finish_reason = FinishReason.ABORT


def test_a_run_that_is_aborted_closes_its_block() -> None:
    async def go() -> list[Change]:
        blocks = Blocks(Answering(None))
        return [change async for _, changes in blocks.of(cast(Run, AbortedRun())) for change in changes]

    changes = asyncio.run(go())
    assert [change.move for change in changes] == [Move.OPENED, Move.GROWN, Move.CLOSED]
    assert changes[-1].block.text == "hel"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("`messages` is empty", "`input` is empty"),
        ("`messages.3` is part of a call", "`input` is part of a call"),
        ("`messages.3.content` and `stop`, not messages", "`input` and `stop`, not messages"),
        ("`messages_x` and `other`", "`messages_x` and `other`"),
    ],
)
def test_fields_have_the_names_that_were_sent(message: str, told: str) -> None:
    with pytest.raises(InvalidRequest) as caught, named_as_sent({"messages": "input"}):
        raise InvalidRequest(message, "messages")
    assert (caught.value.message, str(caught.value), caught.value.param) == (told, told, "input")
