"""Request and response bodies. An unknown field is an error: nothing is accepted that is not honoured."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from service.engine.api import FinishReason
from service.measures import Agreement, RunMetrics, Speedup
from service.web.schemas.bodies import Body, Sampling, Text

PROMPT_FIELDS = ("prompt", "messages", "prompt_ids")


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="Who speaks.")
    content: Text = Field(description="What is said.")


def _exactly_one_prompt(schema: dict[str, Any]) -> None:
    """Say in the JSON schema that one of the prompt's fields is there and not null."""
    schema["oneOf"] = [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in PROMPT_FIELDS]


class GenerateRequest(Sampling):
    """Body of POST /generate: exactly one of `prompt`, `messages` and `prompt_ids`, and how to go on from it."""

    model_config = ConfigDict(json_schema_extra=_exactly_one_prompt)

    prompt: Text | None = Field(None, description="Text to continue.", json_schema_extra={"minLength": 1})
    messages: list[Message] | None = Field(
        None,
        fail_fast=True,
        description="Conversation to answer, by the model's chat template.",
        json_schema_extra={"minItems": 1},
    )
    prompt_ids: list[int] | None = Field(
        None,
        fail_fast=True,
        description="Token ids to continue.",
        json_schema_extra={"minItems": 1, "items": {"minimum": 0}},
    )
    max_tokens: int = Field(
        128, ge=1, description="Most tokens to generate. If left out, 128 or as many as the context leaves."
    )
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Return log-probabilities of each token and of this many likeliest."
    )
    variant: str | None = Field(None, description="`w8a8` or `fp16`; none: the first that this server serves.")
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
        return self

    @property
    def opens_a_turn(self) -> bool:
        """The answer is a message of its own, not the rest of a text or of the assistant's last message."""
        messages = self.messages or []
        return bool(messages) and messages[-1].role != "assistant"

    @property
    def prompt_field(self) -> str:
        """The field that the prompt came in."""
        return next(name for name in PROMPT_FIELDS if getattr(self, name) is not None)


class TopLogprob(BaseModel):
    """A likely token at one place."""

    id: int = Field(description="Token id.")
    logprob: float | None = Field(description="Natural log of its probability; null where that is 0.")


class TokenLogprob(TopLogprob):
    """The token generated at one place, and the likeliest there."""

    top: list[TopLogprob] = Field(description="The likeliest tokens, best first.")


class Usage(BaseModel):
    """Tokens of one run."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """What one variant answered."""

    id: str
    variant: str
    text: str
    token_ids: list[int] = Field(description="All tokens, those of a stop string and the end token included.")
    finish_reason: FinishReason = Field(description="stop: end token or stop string; length: max_tokens; abort.")
    usage: Usage
    logprobs: list[TokenLogprob] = Field(default=[], description="One entry per token; only where asked for.")
    metrics: RunMetrics


class GenerateResponse(Answer):
    """Answer of POST /generate, and the last event of its stream. The last four fields come with `compare`."""

    baseline: Answer | None = Field(None, description="The same request on the baseline, run afterwards.")
    speedup: Speedup | None = None
    agreement: Agreement | None = None
    contended: bool | None = Field(None, description="Other requests ran meanwhile: the times are not clean.")


class Delta(BaseModel):
    """One event of a stream: what a step added, or several whose tokens go out together."""

    id: str
    variant: str
    text: str = Field(description="May be empty: a character or a possible stop string is not yet complete.")
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
