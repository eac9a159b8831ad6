"""Answers of the Responses API, extended by `metrics` and `system_fingerprint`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.measures import RunMetrics

Status = Literal["in_progress", "completed", "incomplete", "failed"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    """A part of the model's message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field([], description="Empty: nothing is cited.")
    logprobs: list[Any] = Field([], description="Empty.")


class OutputMessage(BaseModel):
    """The model's message."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class ReasoningText(BaseModel):
    """What the model thought."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class ReasoningOutput(BaseModel):
    """What the model thought first, for chat templates that have it."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: ItemStatus
    summary: list[Any] = Field([], description="Empty: `content` has the reasoning itself.")
    content: list[ReasoningText]
    encrypted_content: None = None


class OutputCall(BaseModel):
    """A call of a function, which the client runs."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
    call_id: str = Field(description="What the function's answer names.")
    name: str
    namespace: str | None = Field(None, description="Only if the function is in one.")
    arguments: str = Field(description="The JSON of an object, unless the answer was cut by its length.")


OutputItem = OutputMessage | ReasoningOutput | OutputCall


class InputDetails(BaseModel):
    """How many of the prompt's tokens were cached."""

    cached_tokens: int = Field(description="Prompt tokens found in the cache.")
    cache_write_tokens: int = Field(description="0: caching is not counted.")


class OutputDetails(BaseModel):
    """What the answer's tokens are."""

    reasoning_tokens: int = Field(description="Tokens of the steps that brought reasoning.")


class ResponseUsage(BaseModel):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseFault(BaseModel):
    """Why an answer failed after its stream had begun."""

    code: str
    message: str


class Incomplete(BaseModel):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"]


class ModelResponse(BaseModel):
    """Answer of POST /v1/responses. What the request says stands in it again."""

    id: str
    object: Literal["response"] = "response"
    created_at: int = Field(description="When the request arrived, in Unix seconds.")
    status: Status
    model: str = Field(description="The variant that answers, as NAME:VARIANT.")
    system_fingerprint: str = Field(
        description="Hash of checkpoint, scheme and versions; while it is equal, the same seed gives the same answer."
    )
    output: list[OutputItem]
    error: ResponseFault | None
    incomplete_details: Incomplete | None
    usage: ResponseUsage | None = Field(description="Null while the answer is in progress.")
    metrics: RunMetrics | None = Field(None, description="This answer's times, once it has ended.")
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    tool_choice: Any
    tools: list[Any]
    text: Any
    reasoning: Any
    store: Literal[False] = Field(False, description="False: answers are not stored.")
    background: Literal[False] = False
    previous_response_id: None = None
    truncation: Literal["disabled"] = "disabled"


class Numbered(BaseModel):
    """An event of a stream. Its name, in the line `event:`, is its type."""

    sequence_number: int = Field(description="Its place in the stream, from 0.")


class StateEvent(Numbered):
    """The whole answer so far: at the start, and as the last event."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ModelResponse


class ItemEvent(Numbered):
    """An item begins, without content, or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class ItemPlace(Numbered):
    """An event of an item. output_index: the item's place in the answer."""

    item_id: str
    output_index: int


class PartEvent(ItemPlace):
    """A part of a message or of reasoning begins, without text, or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: OutputText | ReasoningText


class TextDelta(ItemPlace):
    """What one or more steps added to a text."""

    type: Literal["response.output_text.delta", "response.reasoning_text.delta"]
    content_index: int
    delta: str
    logprobs: list[Any] = Field([], description="Empty; only for `response.output_text.delta`.")


class TextDone(ItemPlace):
    """A complete text."""

    type: Literal["response.output_text.done", "response.reasoning_text.done"]
    content_index: int
    text: str
    logprobs: list[Any] = Field([], description="Empty; only for `response.output_text.done`.")


class ArgumentsDelta(ItemPlace):
    """What one or more steps added to the arguments of a call."""

    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    delta: str


class ArgumentsDone(ItemPlace):
    """The complete arguments of a call."""

    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    name: str
    arguments: str


EVENTS = (StateEvent, ItemEvent, PartEvent, TextDelta, TextDone, ArgumentsDelta, ArgumentsDone)
