"""Request and response bodies of POST /generate. Unknown fields are errors, so that nothing is silently ignored."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from service.engine.api import FinishReason
from service.measures import Agreement, RunMetrics, Speedup
from service.web.schemas.bodies import Body, Sampling, Text, empty, require_content
from service.web.schemas.tools import PastCall, ToolCall, ToolCallDelta, ToolFields

PROMPT_FIELDS = ("prompt", "messages", "prompt_ids")


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"] = Field(description="Role of the author.")
    content: Text | None = Field(None, description="The text; only the assistant's may be null.")
    name: Text | None = Field(None, description="The author's name, for chat templates that show it.")
    tool_calls: list[PastCall] = empty(list, description="The assistant's calls of tools.")
    tool_call_id: Text | None = Field(None, description="The call that a message of the role tool answers.")

    _require_content = model_validator(mode="after")(require_content)

    @property
    def thoughts(self) -> str | None:
        """None: reasoning is part of the text on this route."""
        return None


def _exactly_one_prompt(schema: dict[str, Any]) -> None:
    """State in the JSON schema that exactly one of the prompt's fields is present and not null."""
    schema["oneOf"] = [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in PROMPT_FIELDS]


class GenerateRequest(Sampling, ToolFields):
    """Body of POST /generate: exactly one of `prompt`, `messages` and `prompt_ids`, and sampling fields."""

    model_config = ConfigDict(json_schema_extra=_exactly_one_prompt)

    prompt: Text | None = Field(None, description="Text to continue; empty: only what the tokenizer begins with.")
    messages: list[Message] | None = Field(
        None,
        fail_fast=True,
        description="Conversation to answer, in the model's chat template.",
        json_schema_extra={"minItems": 1},
    )
    prompt_ids: list[int] | None = Field(
        None,
        fail_fast=True,
        description="Token ids to continue.",
        json_schema_extra={"minItems": 1, "items": {"minimum": 0}},
    )
    max_tokens: int = Field(
        128, ge=1, description="Most tokens to generate. If left out, 128 or as many as fit in the context."
    )
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Return log-probabilities of each token and this many likeliest ones."
    )
    variant: str | None = Field(None, description="`w8a8` or `fp16`; none: the server's default.")
    compare: bool = Field(False, description="Run the same request on the fp16 baseline afterwards, and compare.")

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [name for name in PROMPT_FIELDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "prompt_source",
                "exactly one of prompt, messages and prompt_ids is needed, not {given}",
                {"given": " and ".join(given) or "none"},
            )
        if self.tools and self.messages is None:
            raise PydanticCustomError("tools_alone", "send `messages`, or leave `tools` out")
        return self

    @property
    def opens_a_turn(self) -> bool:
        """Whether the answer is a new message, rather than the continuation of a text or of the last message."""
        messages = self.messages or []
        return bool(messages) and (messages[-1].role != "assistant" or bool(messages[-1].tool_calls))

    @property
    def prompt_field(self) -> str:
        """The name of the field that contains the prompt."""
        return next(name for name in PROMPT_FIELDS if getattr(self, name) is not None)


class TopLogprob(BaseModel):
    """A likely token at one position."""

    id: int = Field(description="Token id.")
    logprob: float | None = Field(description="Natural log of its probability; null if that is 0.")


class TokenLogprob(TopLogprob):
    """The token generated at one position, and the likeliest tokens there."""

    top: list[TopLogprob] = Field(description="The likeliest tokens, best first.")


class Usage(BaseModel):
    """Tokens of one run."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


End = FinishReason | Literal["tool_calls"]
"""Why an answer ended; tool_calls: it is complete, and calls tools."""


class Answer(BaseModel):
    """The answer of one variant."""

    id: str
    variant: str
    text: str = Field(description="Without calls of tools.")
    token_ids: list[int] = Field(description="All tokens, including stop strings and the end token.")
    finish_reason: End = Field(description="stop: end token or stop string; length: max_tokens; tool_calls; abort.")
    tool_calls: list[ToolCall] = Field([], description="Only if the answer calls tools.")
    usage: Usage
    logprobs: list[TokenLogprob] = Field(default=[], description="One entry per token; only if requested.")
    metrics: RunMetrics


class GenerateResponse(Answer):
    """Answer of POST /generate, and the last event of its stream. The last four fields are set with `compare`."""

    baseline: Answer | None = Field(None, description="The same request on the baseline, run afterwards.")
    speedup: Speedup | None = None
    agreement: Agreement | None = None
    contended: bool | None = Field(None, description="Other requests ran meanwhile, so the times are not comparable.")


class Delta(BaseModel):
    """One event of a stream: what one or more steps added."""

    id: str
    variant: str
    text: str = Field(description="May be empty: a character or a possible stop string is not yet complete.")
    token_ids: list[int]
    tool_calls: list[ToolCallDelta] = Field([], description="Only if the event adds to calls of tools.")
    logprobs: list[TokenLogprob] = []
