"""The events of a stream of the Messages API, and the whole answer that they add up to."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from pydantic import BaseModel

from service.engine.api import FinishReason
from service.web.failures import messages_error
from service.web.generation.blocks import Block, Blocks, Change, Kind, Move
from service.web.generation.run import Run
from service.web.generation.sse import MARK, Form, event
from service.web.messages.answers import (
    UNSIGNED,
    AnthropicMessage,
    BlockDelta,
    BlockStart,
    BlockStop,
    Content,
    InputGrowth,
    MessageDelta,
    MessageStart,
    MessageStop,
    MessagesUsage,
    Ping,
    SignatureGrowth,
    StopDelta,
    StopReason,
    TextContent,
    TextGrowth,
    ThinkingContent,
    ThinkingGrowth,
    ToolUseContent,
)
from service.web.schemas.failure import ErrorResponse

DELTA = "content_block_delta"


class MessageReply:
    """Formats one run as events or as a whole answer.

    Args:
        run: of the request.
        blocks: of its answer.
        model: the name of what answers.
        max_tokens: as the client asked; fewer are generated where the context leaves less.
    """

    def __init__(self, run: Run, blocks: Blocks, *, model: str, max_tokens: int, max_model_len: int) -> None:
        self._run = run
        self._blocks = blocks
        self._model = model
        self._max_tokens = max_tokens
        self._max_model_len = max_model_len
        self._form: Form | None = None

    async def events(self) -> AsyncGenerator[BaseModel | bytes, None]:
        """Yield the events of what each step added, encoded."""
        start = self._message(None, self._usage(num_cached=0, num_generated=0))
        yield _named(MessageStart(type="message_start", message=start)) + _named(Ping(type="ping"))
        async with aclosing(self._blocks.of(self._run)) as pieces:
            async for _, changes in pieces:
                data = b"".join(part for change in changes for part in self._told(change))
                if data:
                    yield data
        yield _named(
            MessageDelta(type="message_delta", delta=self._ended(), usage=self._usage(), metrics=self._run.times())
        ) + _named(MessageStop(type="message_stop"))

    async def answer(self) -> AnthropicMessage:
        """The whole answer."""
        async with aclosing(self._blocks.of(self._run)) as pieces:
            async for _ in pieces:
                pass
        return self._message(self._ended(), self._usage())

    def _told(self, change: Change) -> Iterator[bytes]:
        """The events of a change."""
        block = change.block
        match change.move:
            case Move.OPENED:
                self._form = None
                content = _content(block, is_whole=False)
                yield _named(BlockStart(type="content_block_start", index=block.index, content_block=content))
            case Move.GROWN:
                if self._form is None:
                    self._form = Form(_delta(block, MARK), MARK, name=DELTA)
                yield self._form.event(change.text)
            case Move.CLOSED:
                if block.kind is Kind.REASONING:
                    signed = SignatureGrowth(type="signature_delta", signature=UNSIGNED)
                    yield _named(BlockDelta(type=DELTA, index=block.index, delta=signed))
                yield _named(BlockStop(type="content_block_stop", index=block.index))

    def _message(self, ended: StopDelta | None, usage: MessagesUsage) -> AnthropicMessage:
        times = {} if ended is None else {"metrics": self._run.times()}
        return AnthropicMessage(
            id=self._run.plan.id,
            type="message",
            role="assistant",
            model=self._model,
            content=[_content(block, is_whole=True) for block in self._blocks.all],
            stop_reason=None if ended is None else ended.stop_reason,
            stop_sequence=None if ended is None else ended.stop_sequence,
            usage=usage,
            **times,
        )

    def _ended(self) -> StopDelta:
        return StopDelta(stop_reason=self._stop_reason(), stop_sequence=self._run.stop_string)

    def _stop_reason(self) -> StopReason:
        if self._run.finish_reason is FinishReason.LENGTH:
            num_tokens = len(self._run.plan.prompt_ids) + len(self._run.tokens)
            is_full = num_tokens >= self._max_model_len and len(self._run.tokens) < self._max_tokens
            return "model_context_window_exceeded" if is_full else "max_tokens"
        if self._blocks.num_calls:
            return "tool_use"
        return "end_turn" if self._run.stop_string is None else "stop_sequence"

    def _usage(self, num_cached: int | None = None, num_generated: int | None = None) -> MessagesUsage:
        """The tokens: those that the run has, unless given."""
        cached = self._run.progress.num_cached if num_cached is None else num_cached
        return MessagesUsage(
            input_tokens=len(self._run.plan.prompt_ids) - cached,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=cached,
            output_tokens=len(self._run.tokens) if num_generated is None else num_generated,
        )


def failed(body: ErrorResponse) -> bytes:
    """The event that ends a stream in which something has failed."""
    return event(messages_error(body), "error")


def _named(body: MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop) -> bytes:
    """An event with its type as its name."""
    return event(body, body.type)


def _delta(block: Block, text: str) -> BlockDelta:
    growth: TextGrowth | ThinkingGrowth | InputGrowth
    match block.kind:
        case Kind.TEXT:
            growth = TextGrowth(type="text_delta", text=text)
        case Kind.REASONING:
            growth = ThinkingGrowth(type="thinking_delta", thinking=text)
        case Kind.CALL:
            growth = InputGrowth(type="input_json_delta", partial_json=text)
    return BlockDelta(type=DELTA, index=block.index, delta=growth)


def _content(block: Block, *, is_whole: bool) -> Content:
    """A block of the answer: as it begins, or as far as it has come."""
    text = block.text if is_whole else ""
    match block.kind:
        case Kind.TEXT:
            return TextContent(type="text", text=text)
        case Kind.REASONING:
            return ThinkingContent(type="thinking", thinking=text, signature=UNSIGNED if is_whole else "")
        case Kind.CALL:
            return ToolUseContent(type="tool_use", id=block.call_id, name=block.name, input=_arguments(text))


def _arguments(text: str) -> dict[str, object]:
    """The arguments of a call; empty if they are not complete."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
