"""The base of all request bodies: strict validation, text that can be encoded, and the sampling fields."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, LiteralString, Protocol, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MIN_TEMPERATURE = 0.001
MAX_NAME_CHARS = 80
MAX_DEPTH = 2
"""How deep numbers are nested in lists: `prompt` may be a list of lists."""


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _usable_temperature(value: float) -> float:
    """0 for temperatures below MIN_TEMPERATURE: logits divided by them would not fit in float32."""
    return 0.0 if 0.0 < value < MIN_TEMPERATURE else value


def _whole(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Convert whole floats to integers, also in lists; return everything else unchanged."""
    if type(value) is float and value.is_integer():
        return int(value)
    if depth and isinstance(value, list) and not {float, list}.isdisjoint(map(type, value)):
        return [_whole(item, depth - 1) for item in value]
    return value


def whole_unicode(value: str) -> str:
    """The text, unchanged. Raises the pydantic error `string_unicode` if it cannot be encoded as UTF-8."""
    # JSON can contain half a surrogate pair, which no tokenizer can encode.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("string_unicode", "half a surrogate pair") from error
    return value


def empty(kind: type[list[Any]] | type[dict[str, Any]], **about: Any) -> Any:
    """A field that is empty if it is left out. about: as of `Field`.

    `Field([])` would be copied deeply for each body, which takes 8 us.
    """
    return Field(default_factory=kind, json_schema_extra={"default": kind()}, **about)


Text = Annotated[str, AfterValidator(whole_unicode)]
Temperature = Annotated[float, AfterValidator(_usable_temperature)]
TEMPERATURE = "0, or below 0.001: always the likeliest token; above: logits are divided by it."
MAX_BIAS = 100
MAX_BIASES = 1024
MAX_STOP_TOKENS = 128
MAX_PENALTY = 2
ShortText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS), AfterValidator(whole_unicode)]
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
    """A request body, validated strictly: no unknown field, no conversion between types, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    unknown: ClassVar[LiteralString] = "unknown_field"
    """The pydantic error for an unknown field; it determines the status of the answer."""
    names: ClassVar[frozenset[str]] = frozenset()
    """The names of its fields in JSON."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.names = frozenset(field.alias or name for name, field in cls.model_fields.items())

    @model_validator(mode="before")
    @classmethod
    def _read_whole_numbers(cls, values: Any) -> Any:
        """Convert whole floats to integers: JSON has only one type of number. Float fields accept integers too."""
        return {name: _whole(value) for name, value in values.items()} if isinstance(values, dict) else values

    @model_validator(mode="before")
    @classmethod
    def _refuse_first_unknown(cls, values: Any) -> Any:
        """Report only the first unknown field: pydantic's own check makes an error for each, at 8 us apiece."""
        for name in values if isinstance(values, dict) else ():
            if name not in cls.names:
                shown = name[:MAX_NAME_CHARS].encode(errors="backslashreplace").decode()
                nearest = get_close_matches(shown, sorted(cls.names), n=1)
                raise PydanticCustomError(cls.unknown, "{name}", {"name": shown, "nearest": nearest})
        return values


def _nullable(schema: dict[str, Any]) -> None:
    """Allow null in the JSON schema for every optional field."""
    for name, field in schema["properties"].items():
        is_optional = name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ())
        if is_optional and field.get("type") != "null":
            outer = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **outer}


class Said(Protocol):
    """A message of a conversation."""

    role: Any
    content: Any


M = TypeVar("M", bound=Said)


def require_content(message: M) -> M:
    """A validator: only the assistant's message may be without text."""
    if message.content is None and message.role != "assistant":
        raise PydanticCustomError("no_content", "send a text")
    return message


class NullIsAbsent(Body):
    """A body in which null means that the field is absent, as OpenAI's clients send it."""

    model_config = ConfigDict(json_schema_extra=_nullable)
    unknown = "unknown_parameter"

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or not cls._is_optional(name)}

    @classmethod
    def _is_optional(cls, name: str) -> bool:
        field = cls.model_fields.get(name) or next((f for f in cls.model_fields.values() if f.alias == name), None)
        return field is not None and not field.is_required()


BIAS_KEYS = "^[0-9]{1,9}$"
TokenKey = Annotated[str, Field(pattern=BIAS_KEYS)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
_BIAS_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": BIAS_KEYS},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    "maxProperties": MAX_BIASES,
}


class Sampling(Body):
    """How the next token is chosen, where the answer ends, and whether it is streamed."""

    temperature: Temperature = Field(0.0, ge=0, le=2, description=TEMPERATURE)
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the fewest tokens of at least this probability.")
    top_k: int = Field(0, ge=0, description="Sample from the k likeliest tokens; 0: from all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens less likely than this share of the likeliest.")
    repetition_penalty: float = Field(
        1.0, ge=0.1, le=10, description="Above 1 makes tokens of prompt and answer less likely; 1: off."
    )
    presence_penalty: float = Field(
        0.0,
        ge=-MAX_PENALTY,
        le=MAX_PENALTY,
        description="Subtracted from logits of tokens in the answer; 0: off.",
    )
    frequency_penalty: float = Field(
        0.0, ge=-MAX_PENALTY, le=MAX_PENALTY, description="Subtracted for each time that it has them; 0: off."
    )
    logit_bias: Annotated[dict[TokenKey, Bias], WithJsonSchema(_BIAS_SCHEMA)] = empty(
        dict, max_length=MAX_BIASES, description="Token id -> value to add to its logit, -100 to 100."
    )
    stop: Annotated[list[ShortText], BeforeValidator(_stop_list), WithJsonSchema(_STOP_SCHEMA)] = empty(
        list,
        max_length=MAX_STOPS,
        description="A string or a list of strings that end the answer and are cut off it; also special tokens' names.",
    )
    stop_token_ids: list[int] = empty(
        list, max_length=MAX_STOP_TOKENS, fail_fast=True, description="Tokens that end the answer, with ignore_eos too."
    )
    include_stop_str_in_output: bool = Field(
        False, description="Keep the stop string or token that ended the answer in its text."
    )
    min_tokens: int = Field(0, ge=0, description="No end token, and no stop, before the answer has so many tokens.")
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text; false: show names.")
    seed: int | None = Field(
        None, ge=0, lt=1 << 63, description="The same request with the same seed gets the same answer; none: a new one."
    )
    priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="Of an API key's requests, those of a lower number start first, and give way last when memory is "
        "short.",
    )
    ignore_eos: bool = Field(False, description="Ignore end tokens and generate max_tokens.")
    stream: bool = Field(False, description="Answer as server-sent events, one per step.")
    timeout_s: float | None = Field(
        None, gt=0, description="Seconds until the answer must be complete, else 504; none: the server's limit."
    )
