"""Request and response bodies. An unknown field is an error: nothing is accepted that is not honoured."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.engine.request import FinishReason

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MIN_TEMPERATURE = 0.001
MAX_NAME_CHARS = 80
PROMPT_FIELDS = ("prompt", "messages", "prompt_ids")


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _usable_temperature(value: float) -> float:
    if 0.0 < value < MIN_TEMPERATURE:
        raise PydanticCustomError(
            "temperature_too_small",
            "the smallest temperature above 0 is {limit}, where logits still fit in float32; send 0 for greedy",
            {"limit": MIN_TEMPERATURE},
        )
    return value


def _whole_unicode(value: str) -> str:
    # JSON can spell half a surrogate pair, which no tokenizer can encode.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("string_unicode", "half a surrogate pair") from error
    return value


Text = Annotated[str, AfterValidator(_whole_unicode)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS), AfterValidator(_whole_unicode)]
_STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
        {
            "type": "array",
            "maxItems": MAX_STOPS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
        },
    ]
}


class Body(BaseModel):
    """What a client sends: no unknown field, no conversion between types, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_first_unknown(cls, values: Any) -> Any:
        """One error for the first unknown field: pydantic's own check makes one for each, 8 us apiece."""
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                shown = name[:MAX_NAME_CHARS].encode(errors="backslashreplace").decode()
                nearest = get_close_matches(shown, cls.model_fields, n=1)
                raise PydanticCustomError("unknown_field", "{name}", {"name": shown, "nearest": nearest})
        return values


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="Who speaks.")
    content: Text = Field(description="What is said.")


class GenerateRequest(Body):
    """Body of POST /generate: exactly one of `prompt`, `messages` and `prompt_ids`, and how to go on from it."""

    prompt: Text | None = Field(None, description="Text to continue.")
    messages: list[Message] | None = Field(
        None, fail_fast=True, description="Conversation to answer, by the model's chat template."
    )
    prompt_ids: list[int] | None = Field(None, fail_fast=True, description="Token ids to continue.")
    max_tokens: int = Field(
        128, ge=1, description="Most tokens to generate. If left out, 128 or as many as the context leaves."
    )
    temperature: Annotated[float, AfterValidator(_usable_temperature)] = Field(
        0.0, ge=0, le=2, description="0: always the likeliest token; above: logits are divided by it."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the fewest tokens of at least this probability.")
    top_k: int = Field(0, ge=0, description="Sample from the k likeliest tokens; 0: from all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens less likely than this share of the likeliest.")
    repetition_penalty: float = Field(
        1.0, ge=0.1, le=10, description="Above 1 makes tokens of prompt and answer less likely; 1: off."
    )
    stop: Annotated[list[StopString], BeforeValidator(_stop_list), WithJsonSchema(_STOP_SCHEMA)] = Field(
        [], max_length=MAX_STOPS, description="A string or a list of strings that end the answer; left out of it."
    )
    seed: int | None = Field(
        None, ge=0, lt=1 << 63, description="Same seed, same request, same answer; none: a fresh one."
    )
    ignore_eos: bool = Field(False, description="Go on to max_tokens whatever the model says.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Return log-probabilities of each token and of this many likeliest."
    )
    stream: bool = Field(False, description="Answer as server-sent events, one per step.")
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


class Delta(BaseModel):
    """One event of a stream: what one step added."""

    id: str
    variant: str
    text: str = Field(description="May be empty: a character or a possible stop string is not yet complete.")
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []


class ErrorDetail(BaseModel):
    """What went wrong, and how to mend it."""

    message: str
    type: str = Field(description="invalid_request_error, overloaded_error or server_error.")
    param: str | None = Field(description="The field at fault.")
    code: str


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail
