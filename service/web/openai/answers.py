"""Answers in OpenAI's shapes. What OpenAI does not have is `metrics`, `variant` and `max_model_len`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from service.engine.api import FinishReason
from service.measures import RunMetrics
from service.web.schemas.generate import Usage

UNLIKELY = -9999.0
"""OpenAI's log-probability of a token whose probability is 0 in float32; JSON has no infinity."""


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, how many needed no computing."""

    cached_tokens: int = Field(description="Prompt tokens found in the cache.")


class OpenAIUsage(Usage):
    """Tokens of a request: each prompt once, and every answer."""

    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """One entry per token: with `echo` the prompt's first, and those of a stop string and the end token included."""

    tokens: list[str] = Field(description="Its text, or `bytes:` and hexadecimal where it is part of a character.")
    token_logprobs: list[float | None] = Field(description="Null for the first token of the prompt.")
    top_logprobs: list[dict[str, float] | None] = Field(description="The likeliest tokens, and the token itself.")
    text_offset: list[int] = Field(description="Where its text begins in the answer's, in characters.")


class CompletionChoice(BaseModel):
    """One answer, or in a stream what a step or a few added to it."""

    index: int = Field(description="Number of the prompt times `n`, plus number of the answer.")
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = Field(
        default=None, description="In a stream null in all but an answer's last event."
    )
    metrics: RunMetrics | None = Field(
        default=None, description="This answer's times; in a stream with its last event."
    )


class OpenAIAnswer(BaseModel):
    """What all answers carry."""

    id: str
    created: int = Field(description="When the request came in, in Unix seconds.")
    model: str = Field(description="The variant that answered, as NAME:VARIANT.")
    system_fingerprint: str = Field(description="Of checkpoint, scheme and versions: same seed, same answer.")


class Completion(OpenAIAnswer):
    """Answer of POST /v1/completions, and each event of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: OpenAIUsage | None = Field(default=None, description="In a stream only where asked for, in its last event.")


class ChatTopLogprob(BaseModel):
    """A token and its probability."""

    token: str = Field(description="Its text, or `bytes:` and hexadecimal where it is part of a character.")
    logprob: float
    bytes: list[int] = Field(description="Its UTF-8.")


class ChatLogprob(ChatTopLogprob):
    """The token at one place, and the likeliest there."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """One entry per token, those of a stop string and the end token included."""

    content: list[ChatLogprob]


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    metrics: RunMetrics


class ChatCompletion(OpenAIAnswer):
    """Answer of POST /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: OpenAIUsage


class ChatDelta(BaseModel):
    """What a step or a few added to a message."""

    role: Literal["assistant"] | None = Field(default=None, description="With the first step of each answer.")
    content: str


class ChatChunkChoice(BaseModel):
    """One answer's part of an event."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    metrics: RunMetrics | None = Field(default=None, description="This answer's times, with its last event.")


class ChatCompletionChunk(OpenAIAnswer):
    """One event of a chat's stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: OpenAIUsage | None = Field(default=None, description="Only where asked for, in the last event.")


class ServedModel(BaseModel):
    """A name that `model` may be."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server started, in Unix seconds.")
    owned_by: Literal["ottava"] = "ottava"
    variant: str = Field(description="The variant that answers to this name.")
    max_model_len: int = Field(description="Tokens of prompt and answer together.")


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ServedModel] = Field(description="NAME, which is the first variant, then NAME:VARIANT for each.")
