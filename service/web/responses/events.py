"""The events of a stream of the Responses API, and the whole answer that they add up to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from pydantic import BaseModel

from service.engine.api import FinishReason
from service.errors import OttavaError
from service.web.generation.blocks import Block, Blocks, Change, Kind, Move
from service.web.generation.run import Run
from service.web.generation.sse import MARK, Form, event
from service.web.responses.answers import (
    ArgumentsDelta,
    ArgumentsDone,
    Incomplete,
    InputDetails,
    ItemEvent,
    ItemStatus,
    ModelResponse,
    OutputCall,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    PartEvent,
    ReasoningOutput,
    ReasoningText,
    ResponseFault,
    ResponseUsage,
    StateEvent,
    Status,
    TextDelta,
    TextDone,
)
from service.web.schemas.failure import ErrorResponse

NUMBER = -1
"""A placeholder for the number of an event; see `Form`."""
PREFIXES = {Kind.REASONING: "rs", Kind.TEXT: "msg", Kind.CALL: "fc"}


class ResponseReply:
    """Formats one run as events or as a whole answer.

    Args:
        run: of the request.
        blocks: of its answer.
        head: the fields of the answer that do not change.
        spaces: name that the model knows -> namespace and name, of the functions in namespaces.
    """

    def __init__(self, run: Run, blocks: Blocks, *, head: dict[str, Any], spaces: dict[str, tuple[str, str]]) -> None:
        self._run = run
        self._blocks = blocks
        self._head = head
        self._spaces = spaces
        self._ids: list[str] = []
        self._number = 0
        self._num_reasoning_tokens = 0
        self._form: Form | None = None

    async def events(self) -> AsyncGenerator[BaseModel | bytes, None]:
        """Yield the events of what each step added, encoded."""
        yield self._state("response.created", "in_progress") + self._state("response.in_progress", "in_progress")
        async with aclosing(self._changes()) as pieces:
            async for changes in pieces:
                data = b"".join(part for change in changes for part in self._told(change))
                if data:
                    yield data
        status = self._status()
        yield self._state(f"response.{status}", status)

    async def answer(self) -> ModelResponse:
        """The whole answer."""
        async with aclosing(self._changes()) as pieces:
            async for _ in pieces:
                pass
        return self._response(self._status())

    def failed(self, body: ErrorResponse) -> bytes:
        """The event that ends a stream in which something has failed."""
        # The clients know this code; ottava's own would be taken for a fault of the request.
        code = "server_error" if body.error.type == OttavaError.type else body.error.code
        return self._state("response.failed", "failed", ResponseFault(code=code, message=body.error.message))

    async def _changes(self) -> AsyncGenerator[list[Change], None]:
        """The changes that each piece of the run makes."""
        async with aclosing(self._blocks.of(self._run)) as pieces:
            async for piece, changes in pieces:
                if any(change.block.kind is Kind.REASONING and change.text for change in changes):
                    self._num_reasoning_tokens += len(piece.token_ids)
                for change in changes:
                    if change.move is Move.OPENED:
                        self._ids.append(f"{PREFIXES[change.block.kind]}_{uuid4().hex}")
                yield changes

    def _told(self, change: Change) -> Iterator[bytes]:
        """The events of a change."""
        block = change.block
        match change.move:
            case Move.OPENED:
                self._form = None
                yield self._item("response.output_item.added", block, "in_progress")
                if block.kind is not Kind.CALL:
                    yield self._part("response.content_part.added", block, "")
            case Move.GROWN:
                yield self._delta(block, change.text)
            case Move.CLOSED:
                yield self._text_done(block)
                if block.kind is not Kind.CALL:
                    yield self._part("response.content_part.done", block, block.text)
                yield self._item("response.output_item.done", block, self._item_status(block))

    def _delta(self, block: Block, text: str) -> bytes:
        """The event of new text of a block; its form is encoded once."""
        place = {"item_id": self._ids[block.index], "output_index": block.index}
        if self._form is None:
            body: TextDelta | ArgumentsDelta
            if block.kind is Kind.CALL:
                kind = "response.function_call_arguments.delta"
                body = ArgumentsDelta(type=kind, sequence_number=NUMBER, delta=MARK, **place)
            else:
                kind = f"response.{_text_kind(block)}.delta"
                body = TextDelta(
                    type=kind, sequence_number=NUMBER, content_index=0, delta=MARK, **place, **_no_logprobs(block)
                )
            self._form = Form(body, NUMBER, MARK, name=kind)
        return self._form.event(self._next(), text)

    def _text_done(self, block: Block) -> bytes:
        place = {"sequence_number": self._next(), "item_id": self._ids[block.index], "output_index": block.index}
        if block.kind is Kind.CALL:
            kind = "response.function_call_arguments.done"
            return event(ArgumentsDone(type=kind, name=self._name_of(block)[1], arguments=block.text, **place), kind)
        kind = f"response.{_text_kind(block)}.done"
        return event(TextDone(type=kind, content_index=0, text=block.text, **place, **_no_logprobs(block)), kind)

    def _part(self, kind: str, block: Block, text: str) -> bytes:
        return event(
            PartEvent(
                type=kind,
                sequence_number=self._next(),
                item_id=self._ids[block.index],
                output_index=block.index,
                content_index=0,
                part=_part_of(block, text),
            ),
            kind,
        )

    def _item(self, kind: str, block: Block, status: ItemStatus) -> bytes:
        item = self._item_of(block, status)
        return event(ItemEvent(type=kind, sequence_number=self._next(), output_index=block.index, item=item), kind)

    def _state(self, kind: str, status: Status, error: ResponseFault | None = None) -> bytes:
        response = self._response(status, error)
        return event(StateEvent(type=kind, sequence_number=self._next(), response=response), kind)

    def _next(self) -> int:
        """The number of the next event."""
        self._number += 1
        return self._number - 1

    def _status(self) -> ItemStatus:
        """How the answer has ended."""
        return "completed" if self._run.finish_reason is FinishReason.STOP else "incomplete"

    def _item_status(self, block: Block) -> ItemStatus:
        """The status of a block that is closed: an answer that is cut is cut in its last one."""
        return self._status() if block is self._blocks.all[-1] else "completed"

    def _response(self, status: Status, error: ResponseFault | None = None) -> ModelResponse:
        has_ended = status in ("completed", "incomplete")
        is_cut = self._run.finish_reason is FinishReason.LENGTH
        times = {"metrics": self._run.times()} if has_ended else {}
        return ModelResponse(
            **self._head,
            status=status,
            output=[self._item_of(block, self._item_status(block)) for block in self._blocks.all],
            error=error,
            incomplete_details=Incomplete(reason="max_output_tokens") if is_cut else None,
            usage=self._usage() if has_ended else None,
            **times,
        )

    def _usage(self) -> ResponseUsage:
        num_prompt, num_generated = len(self._run.plan.prompt_ids), len(self._run.tokens)
        return ResponseUsage(
            input_tokens=num_prompt,
            input_tokens_details=InputDetails(cached_tokens=self._run.progress.num_cached, cache_write_tokens=0),
            output_tokens=num_generated,
            output_tokens_details=OutputDetails(reasoning_tokens=self._num_reasoning_tokens),
            total_tokens=num_prompt + num_generated,
        )

    def _item_of(self, block: Block, status: ItemStatus) -> OutputItem:
        """A block as an item: without content while it is in progress."""
        id_, has_content = self._ids[block.index], status != "in_progress"
        match block.kind:
            case Kind.CALL:
                namespace, name = self._name_of(block)
                return OutputCall(
                    id=id_,
                    type="function_call",
                    status=status,
                    call_id=block.call_id,
                    name=name,
                    arguments=block.text if has_content else "",
                    **({} if namespace is None else {"namespace": namespace}),
                )
            case Kind.REASONING:
                return ReasoningOutput(
                    id=id_,
                    type="reasoning",
                    status=status,
                    summary=[],
                    content=[ReasoningText(type="reasoning_text", text=block.text)] if has_content else [],
                    encrypted_content=None,
                )
            case Kind.TEXT:
                content = [_output_text(block.text)] if has_content else []
                return OutputMessage(id=id_, type="message", role="assistant", status=status, content=content)

    def _name_of(self, block: Block) -> tuple[str | None, str]:
        """Namespace and name of what a block calls."""
        return self._spaces.get(block.name, (None, block.name))


def _text_kind(block: Block) -> str:
    return "reasoning_text" if block.kind is Kind.REASONING else "output_text"


def _no_logprobs(block: Block) -> dict[str, Any]:
    return {} if block.kind is Kind.REASONING else {"logprobs": []}


def _part_of(block: Block, text: str) -> OutputText | ReasoningText:
    return ReasoningText(type="reasoning_text", text=text) if block.kind is Kind.REASONING else _output_text(text)


def _output_text(text: str) -> OutputText:
    return OutputText(type="output_text", text=text, annotations=[], logprobs=[])
