"""Answers of the Messages API, extended by `metrics`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.measures import RunMetrics

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
UNSIGNED = "unsigned"


class TextContent(BaseModel):
    """A text of the answer."""

    type: Literal["text"] = "text"
    text: str


class ThinkingContent(BaseModel):
    """What the model thought first, for chat templates that have it."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = Field(description="`unsigned`, since clients send no reasoning back that has no signature.")


class ToolUseContent(BaseModel):
    """A call of a tool, which the client runs."""

    type: Literal["tool_use"] = "tool_use"
    id: str = Field(description="What the tool's result names.")
    name: str
    input: dict[str, Any] = Field(description="The arguments; empty if the answer was cut in them.")


Content = TextContent | ThinkingContent | ToolUseContent


class MessagesUsage(BaseModel):
    """Tokens of a request: the prompt's are `input_tokens` and `cache_read_input_tokens` together."""

    input_tokens: int = Field(description="Tokens of the prompt that were computed; all of them, in message_start.")
    cache_creation_input_tokens: int = Field(description="0: caching is not counted.")
    cache_read_input_tokens: int = Field(description="Tokens of the prompt found in the cache.")
    output_tokens: int


class AnthropicMessage(BaseModel):
    """Answer of POST /v1/messages."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str = Field(description="The variant that answers, as NAME:VARIANT.")
    content: list[Content]
    stop_reason: StopReason | None = Field(description="Null in message_start alone.")
    stop_sequence: str | None = Field(description="The one that ended the answer, if one did.")
    usage: MessagesUsage
    metrics: RunMetrics | None = Field(None, description="This answer's times, once it has ended.")


class TokenCount(BaseModel):
    """Answer of POST /v1/messages/count_tokens."""

    input_tokens: int = Field(description="Tokens of the prompt.")


class MessageStart(BaseModel):
    """The first event of a stream: the answer without content."""

    type: Literal["message_start"] = "message_start"
    message: AnthropicMessage


class BlockStart(BaseModel):
    """A block of the answer begins, without text."""

    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: Content


class TextGrowth(BaseModel):
    """What is added to a text."""

    type: Literal["text_delta"] = "text_delta"
    text: str


class ThinkingGrowth(BaseModel):
    """What is added to the reasoning."""

    type: Literal["thinking_delta"] = "thinking_delta"
    thinking: str


class SignatureGrowth(BaseModel):
    """The signature of the reasoning, before its block ends."""

    type: Literal["signature_delta"] = "signature_delta"
    signature: str


class InputGrowth(BaseModel):
    """What is added to the JSON of a call's arguments."""

    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str


class BlockDelta(BaseModel):
    """What one or more steps added to a block."""

    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: TextGrowth | ThinkingGrowth | SignatureGrowth | InputGrowth


class BlockStop(BaseModel):
    """A block is complete."""

    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class StopDelta(BaseModel):
    """Why the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(BaseModel):
    """The end of the answer."""

    type: Literal["message_delta"] = "message_delta"
    delta: StopDelta
    usage: MessagesUsage
    metrics: RunMetrics


class MessageStop(BaseModel):
    """The last event of a stream."""

    type: Literal["message_stop"] = "message_stop"


class Ping(BaseModel):
    """Shows that the connection stands."""

    type: Literal["ping"] = "ping"


EVENTS = (MessageStart, Ping, BlockStart, BlockDelta, BlockStop, MessageDelta, MessageStop)
