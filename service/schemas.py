"""Request and response bodies. An unknown field is an error: nothing is accepted that is not honoured."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from service.bodies import Body, Sampling, Text
from service.engine.api import FinishReason

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


class Spread(BaseModel):
    """Mean and percentiles (linear between ranks)."""

    mean: float
    p50: float
    p99: float


class RunMetrics(BaseModel):
    """Times of one run on a monotonic clock; null where there is nothing to measure."""

    queue_ms: float | None = Field(description="From the request's arrival to its first step.")
    prefill_ms: float | None = Field(description="From its first step to its first token.")
    ttft_ms: float | None = Field(description="First token sent minus request received.")
    itl_ms: Spread | None = Field(description="Between successive tokens sent.")
    tpot_ms: float | None = Field(description="(e2e - ttft) / (generated - 1).")
    e2e_ms: float | None = Field(description="Last token sent minus request received.")
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = Field(description="Prompt tokens found in the cache.")
    tokens_per_s: float | None = Field(description="generated / e2e.")
    batch_size_mean: float = Field(description="Mean number of requests in the steps of this one.")


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


class Speedup(BaseModel):
    """How many times better this variant did than the baseline; above 1 is better in every field."""

    ttft: float | None
    tpot: float | None
    e2e: float | None
    tokens_per_s: float | None


class Agreement(BaseModel):
    """How alike the two answers are."""

    common_prefix_tokens: int = Field(description="Tokens before the first difference.")
    match_ratio: float = Field(description="Places with the same token / tokens of the longer answer.")
    logprob_delta_mean: float | None = Field(
        description="Mean over the common prefix of |log-probability here - on the baseline|; null without a prefix."
    )


class GenerateResponse(Answer):
    """Answer of POST /generate, and the last event of its stream. The last four fields come with `compare`."""

    baseline: Answer | None = Field(None, description="The same request on the baseline, run afterwards.")
    speedup: Speedup | None = None
    agreement: Agreement | None = None
    contended: bool | None = Field(None, description="Other requests ran meanwhile: the times are not clean.")


class RecentRequest(BaseModel):
    """One of the last runs that finished; what it said is not kept."""

    id: str
    variant: str
    route: str
    finish_reason: FinishReason
    ttft_ms: float | None = Field(description="First token sent minus request received.")
    tpot_ms: float | None = Field(description="(e2e - ttft) / (generated - 1).")
    e2e_ms: float | None = Field(description="Last token sent minus request received.")
    prompt_tokens: int
    generated_tokens: int
    age_s: float = Field(description="Seconds since it finished.")


class RecentResponse(BaseModel):
    """Answer of GET /requests/recent."""

    requests: list[RecentRequest] = Field(description="At most a hundred, oldest first.")


class ComparisonSummary(BaseModel):
    """The latest comparisons of one origin with the baseline, a thousand at most."""

    count: int = Field(description="Comparisons since the start.")
    contended: int = Field(description="Of these, how many had company: their times are left out of the speed-up.")
    speedup_median: Speedup = Field(description="Of the clean ones; above 1 is better; null where there is none.")
    agreement_mean: float | None = Field(description="Mean share of places with the baseline's token; null: none yet.")
    identical_ratio: float | None = Field(description="Share of answers that equal the baseline's token by token.")


class ShadowState(BaseModel):
    """How far shadow mode has come."""

    rate: float = Field(description="Share of live requests that is drawn.")
    waiting: int = Field(description="Requests that wait for an idle moment, the one that is replayed included.")


class CompareResponse(BaseModel):
    """Answer of GET /compare."""

    compare: ComparisonSummary = Field(description="Requests sent with `compare`.")
    shadow: ComparisonSummary = Field(description="Live requests replayed in shadow mode.")
    shadow_state: ShadowState


class Delta(BaseModel):
    """One event of a stream: what a step added, or several whose tokens go out together."""

    id: str
    variant: str
    text: str = Field(description="May be empty: a character or a possible stop string is not yet complete.")
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []


class Health(BaseModel):
    """Answer of GET /health."""

    status: Literal["ok", "failed"]
    variants: dict[str, str] = Field({}, description="Those whose engine has stopped, and why.")


class Readiness(BaseModel):
    """Answer of GET /ready."""

    ready: bool
    variants: dict[str, str] = Field(description="`ready` for each, or while one is not, why for each that is not.")


class ErrorDetail(BaseModel):
    """What went wrong, and how to mend it."""

    message: str
    type: str = Field(description="invalid_request_error, overloaded_error or server_error.")
    param: str | None = Field(description="The field at fault.")
    code: str


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail
