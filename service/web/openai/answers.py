"""Answers in OpenAI's format, extended by `metrics`, `variant` and `max_model_len`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from service.engine.api import FinishReason
from service.measures import RunMetrics
from service.web.schemas.generate import End, Usage
from service.web.schemas.tools import ToolCall, ToolCallDelta

UNLIKELY = -9999.0
"""OpenAI's log-probability of a token whose probability is 0 in float32; JSON has no infinity."""


class PromptTokensDetails(BaseModel):
    """How many of the prompt's tokens were cached."""

    cached_tokens: int = Field(description="Prompt tokens found in the cache.")


class OpenAIUsage(Usage):
    """Tokens of a request: each prompt counted once, and every answer."""

    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """One entry per token, including stop strings and the end token; with `echo`, the prompt's tokens come first."""

    tokens: list[str] = Field(description="Its text, or `bytes:` and hexadecimal if it is part of a character.")
    token_logprobs: list[float | None] = Field(description="Null for the first token of the prompt.")
    top_logprobs: list[dict[str, float] | None] = Field(description="The likeliest tokens, and the token itself.")
    text_offset: list[int] = Field(description="Start of its text in the answer's text, in characters.")


class CompletionChoice(BaseModel):
    """One answer, or in a stream, what one or more steps added to it."""

    index: int = Field(description="Number of the prompt times `n`, plus number of the answer.")
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = Field(
        default=None, description="In a stream, null except in an answer's last event."
    )
    metrics: RunMetrics | None = Field(default=None, description="This answer's times; in a stream, in its last event.")


class OpenAIAnswer(BaseModel):
    """The fields of every answer."""

    id: str
    created: int = Field(description="When the request arrived, in Unix seconds.")
    model: str = Field(description="The variant that answered, as NAME:VARIANT.")
    system_fingerprint: str = Field(
        description="Hash of checkpoint, scheme and versions; while it is equal, the same seed gives the same answer."
    )


class Completion(OpenAIAnswer):
    """Answer of POST /v1/completions, and each event of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: OpenAIUsage | None = Field(default=None, description="In a stream, only if requested, in its last event.")


class ChatTopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str = Field(description="Its text, or `bytes:` and hexadecimal if it is part of a character.")
    logprob: float
    bytes: list[int] = Field(description="Its text in UTF-8.")


class ChatLogprob(ChatTopLogprob):
    """The token at one position, and the likeliest tokens there."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """One entry per token, including stop strings and the end token."""

    content: list[ChatLogprob]


class AssistantMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="Null if there is nothing but calls of tools.")
    refusal: None = None
    reasoning_content: str = Field("", description="What the model thought first, without its tags; only if it did.")
    reasoning: str = Field("", description="The same, by another name.")
    tool_calls: list[ToolCall] = Field([], description="Only if there are any.")


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: End
    metrics: RunMetrics


class ChatCompletion(OpenAIAnswer):
    """Answer of POST /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: OpenAIUsage


class ChatDelta(BaseModel):
    """What one or more steps added to a message."""

    role: Literal["assistant"] | None = Field(default=None, description="Only in the first event of each answer.")
    content: str | None = Field(default=None, description="Left out if there is nothing but calls of tools.")
    reasoning_content: str = Field("", description="What the event adds to it; only if it does.")
    reasoning: str = Field("", description="The same, by another name.")
    tool_calls: list[ToolCallDelta] = Field([], description="Only if there are any.")


class ChatChunkChoice(BaseModel):
    """One answer's part of an event."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: End | None = None
    metrics: RunMetrics | None = Field(default=None, description="This answer's times, in its last event.")


class ChatCompletionChunk(OpenAIAnswer):
    """One event of a chat's stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: OpenAIUsage | None = Field(default=None, description="Only if requested, in the last event.")


class ServedModel(BaseModel):
    """A valid value of `model`."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server started, in Unix seconds.")
    owned_by: Literal["ottava"] = "ottava"
    variant: str = Field(description="The variant that answers to this name.")
    max_model_len: int = Field(description="Tokens of prompt and answer together.")
    context_length: int = Field(description="The same, by the name that some clients read.")


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ServedModel] = Field(description="NAME, which is the first variant, then NAME:VARIANT for each.")
