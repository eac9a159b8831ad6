"""Request bodies in OpenAI's format. Each OpenAI parameter is supported, or accepted only with values of no effect."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from service.text.grammars.given import grammar_rules, regex_rules
from service.text.json.schema import MAX_ALTERNATIVES, GrammarRules, choice_rules, json_rules
from service.web.openai.inert import EmptyList, InertText, Metadata, Nothing, Only
from service.web.schemas.bodies import (
    TEMPERATURE,
    NullIsAbsent,
    Sampling,
    ShortText,
    Temperature,
    Text,
    empty,
    require_content,
    whole_unicode,
)
from service.web.schemas.tools import PastCall, ToolFields, encodable

MAX_CHOICES = 128
"""Most answers to one request: prompts times `n`."""
MAX_TOP_LOGPROBS = 20

Prompts = list[str] | list[list[int]]


def _prompts(value: Any) -> Prompts:
    """Normalize one or several prompts, as text or token ids, to a list of prompts."""
    items = [value] if isinstance(value, str) else value
    if isinstance(items, list):
        if items and all(isinstance(item, str) for item in items):
            return [whole_unicode(item) for item in items]
        if _are_ids(items):
            return [items]
        if all(isinstance(item, list) and _are_ids(item) for item in items):
            return items
    raise PydanticCustomError("prompt_shape", "send a string, strings, token ids, or lists of token ids")


def _are_ids(items: list[Any]) -> bool:
    return set(map(type, items)) <= {int}


_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_CHOICES},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1, "maxItems": MAX_CHOICES},
    ]
}


def _joined(value: Any) -> Any:
    """Join content that is sent in parts, with a line break in between."""
    return "\n".join(_part_text(part) for part in value) if isinstance(value, list) else value


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        text = part["text"]
        if isinstance(text, str):
            return text
    raise PydanticCustomError("not_text", 'send text alone: a string, or parts {"type": "text", "text": "..."}')


_TEXT_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART_SCHEMA}]}


class StreamOptions(NullIsAbsent):
    """What a stream contains besides the text."""

    include_usage: bool = Field(
        default=False, description="One more event before `[DONE]`, without choices and with the total usage."
    )
    continuous_usage_stats: bool = Field(
        default=False, description="Usage so far in every event; needs `include_usage`."
    )
    include_obfuscation: bool = Field(default=False, description="Accepted: any; events are never padded.")


def _parsed(value: Any) -> Any:
    """A JSON schema that is sent as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise PydanticCustomError("not_schema", "send a JSON schema, as an object or as text") from error


GivenSchema = Annotated[
    dict[str, Any], BeforeValidator(_parsed), WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]})
]
Choices = Annotated[list[ShortText], Field(min_length=1, max_length=MAX_ALTERNATIVES)]


class StructuredOutputs(NullIsAbsent):
    """What vLLM's clients send to hold an answer to something: one of the fields."""

    json_: GivenSchema | None = Field(None, alias="json", description="JSON schema of the answer, also as text.")
    choice: Choices | None = Field(None, description="The texts of which the answer is one.")
    regex: Text | None = Field(None, description="Regular expression that the whole answer matches.")
    grammar: Text | None = Field(None, description="Grammar of the answer, in EBNF with a rule `root`.")
    json_object: bool | None = Field(None, description="True: any JSON object.")
    structural_tag: Nothing = Field(None, description="Accepted: null; send `tools`, or another field.")
    whitespace_pattern: InertText = Field("", description="Accepted; what stands between values is fixed.")
    disable_any_whitespace: Only[Literal[False]] = Field(False, description="Accepted: false.")
    disable_additional_properties: Only[Literal[False]] = Field(
        False, description="Accepted: false; set `additionalProperties` in the schema."
    )
    disable_fallback: bool = Field(False, description="Accepted: any; there is one way to hold answers.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = (self.json_, self.choice, self.regex, self.grammar, self.json_object or None)
        if sum(value is not None for value in given) != 1:
            raise PydanticCustomError("not_one", "send one of `json`, `choice`, `regex`, `grammar` and `json_object`")
        return self

    def rules(self) -> GrammarRules | str:
        """The rules of the answer. Raises InvalidRequest as what makes them."""
        if self.choice is not None:
            return choice_rules(self.choice)
        if self.regex is not None:
            return regex_rules(self.regex)
        if self.grammar is not None:
            return grammar_rules(self.grammar)
        return json_rules(self.json_)


class OpenAIRequest(NullIsAbsent, Sampling):
    """The fields shared by both routes."""

    model: str | None = Field(None, description="NAME, NAME:VARIANT or VARIANT, see /v1/models; none: the first there.")
    temperature: Temperature = Field(1.0, ge=0, le=2, description=TEMPERATURE)
    max_tokens: int | None = None
    max_completion_tokens: int | None = Field(None, description="The newer name of `max_tokens`.")
    n: int = Field(
        1, ge=1, le=MAX_CHOICES, description="Answers per prompt, generated concurrently; the i-th uses `seed` + i."
    )
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Constrains the answer; none: any text.")
    guided_json: GivenSchema | None = Field(None, description="Older name of `structured_outputs.json`.")
    guided_regex: Text | None = Field(None, description="Older name of `structured_outputs.regex`.")
    guided_choice: Choices | None = Field(None, description="Older name of `structured_outputs.choice`.")
    guided_grammar: Text | None = Field(None, description="Older name of `structured_outputs.grammar`.")
    guided_decoding_backend: InertText = Field("", description="Accepted: any; there is one.")
    guided_whitespace_pattern: InertText = Field("", description="Accepted; what stands between values is fixed.")
    user: InertText = Field("", description="Accepted; it has no effect on answers.")
    store: bool = Field(False, description="Accepted: any; answers are not stored.")
    metadata: Metadata = empty(dict, description="Accepted: labels of stored answers; no answers are stored.")
    service_tier: InertText = Field("auto", description="Accepted: any; there is one tier.")
    safety_identifier: InertText = Field("", description="Accepted; it has no effect on answers.")
    prompt_cache_key: InertText = Field("", description="Accepted; prompts are found by their content.")
    prompt_cache_retention: InertText = Field("", description="Accepted; the cache keeps what fits.")
    prompt_cache_options: dict[str, Any] = empty(dict, description="Accepted; prompts are found by their content.")

    def constraints(self) -> list[tuple[str, StructuredOutputs]]:
        """What holds the answer, by the name of the field that says so; the older names too."""
        found = [] if self.structured_outputs is None else [("structured_outputs", self.structured_outputs)]
        for kind in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{kind}")
            if value is not None:
                found.append((f"guided_{kind}", StructuredOutputs.model_validate({kind: value})))
        return found


class CompletionRequest(OpenAIRequest):
    """Body of POST /v1/completions. `max_tokens` 0 generates nothing: with `echo` and `logprobs` it scores a prompt."""

    prompt: Annotated[Prompts, PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)] = Field(
        description="Text to continue, or token ids, or a list of either."
    )
    max_tokens: int = Field(
        16, ge=0, description="Most tokens to generate. If left out, 16 or as many as fit in the context."
    )
    max_completion_tokens: int | None = Field(None, ge=0, description="Another name of `max_tokens`.")
    echo: bool = Field(False, description="Begin the text, and its `logprobs`, with the prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="Log-probabilities of each token and this many likeliest ones."
    )
    best_of: int | None = Field(None, ge=1, description="Accepted: the value of `n`, since every answer is returned.")
    suffix: Only[Literal[""]] = Field("", description='Accepted: "", no text after the answer.')


class ChatMessage(NullIsAbsent):
    """One turn of a conversation. The fields after `content` allow an answer's message to be sent back unchanged."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Role of the author; developer becomes system if the model's chat template has no developer role."
    )
    content: Annotated[Text, BeforeValidator(_joined), WithJsonSchema(_CONTENT_SCHEMA)] | None = Field(
        None,
        description="The text: a string, or text parts, which are joined by line breaks. Only the assistant's may be "
        "null.",
    )
    name: Text | None = Field(None, description="The author's name, for chat templates that show it.")
    tool_calls: list[PastCall] = empty(list, description="The assistant's calls of tools.")
    tool_call_id: Text | None = Field(None, description="The call that a message of the role tool answers.")
    reasoning_content: Text | None = Field(None, description="What the assistant thought, for templates that show it.")
    reasoning: Text | None = Field(None, description="Another name of `reasoning_content`.")
    refusal: Nothing = Field(None, description="Accepted: null.")
    audio: Nothing = Field(None, description="Accepted: null.")
    function_call: Nothing = Field(None, description="Accepted: null.")
    annotations: EmptyList = empty(list, description="Accepted: [].")
    parsed: Any = Field(None, description="Accepted: any; OpenAI's client adds what it read in `content`.")

    _require_content = model_validator(mode="after")(require_content)

    @property
    def thoughts(self) -> str | None:
        """What the assistant thought, by either name."""
        return self.reasoning if self.reasoning_content is None else self.reasoning_content


class JsonSchema(NullIsAbsent):
    """A schema that the answer must follow."""

    name: str = Field(min_length=1, description="For your own use; it has no effect on answers.")
    description: str | None = Field(None, description="For your own use; it has no effect on answers.")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="JSON schema; none: any JSON object.")
    strict: bool | None = Field(None, description="Accepted: any; the schema is always followed strictly.")


class ResponseFormat(NullIsAbsent):
    """Constrains the answer: tokens that would violate the format are excluded before sampling."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_tags(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") == "structural_tag":
            raise PydanticCustomError("not_honoured", 'send the type "json_schema", `structured_outputs`, or `tools`')
        return values

    type: Literal["text", "json_object", "json_schema"] = Field(description="Any text, any JSON object, or a schema.")
    json_schema: JsonSchema | None = Field(None, description="Only for the type json_schema, which requires it.")


class ChatRequest(OpenAIRequest, ToolFields):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(
        min_length=1,
        fail_fast=True,
        description="Conversation to answer, in the model's chat template; if the last message is the assistant's, it "
        "is continued.",
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate; none: as many as fit in the context."
    )
    max_tokens: int | None = Field(None, ge=1, description="The older name of `max_completion_tokens`.")
    logprobs: bool = Field(False, description="Return the log-probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="Also of this many likeliest tokens; only with `logprobs`."
    )
    response_format: ResponseFormat | None = Field(None, description="Constrains the answer; none: any text.")
    add_generation_prompt: bool = Field(
        True, description="End the prompt inside the assistant's turn, so that it is continued; false: end as sent."
    )
    functions: EmptyList = empty(list, description="Accepted: []; send `tools`.")
    function_call: Only[Literal["none", "auto"]] = Field("none", description="Accepted: none, auto.")
    modalities: Only[list[Literal["text"]]] = Field(["text"], description="Accepted: text.")
    audio: Nothing = Field(None, description="Accepted: null; answers are text.")
    prediction: Any = Field(None, description="Accepted: any; it would only save time.")
    web_search_options: Nothing = Field(None, description="Accepted: null; nothing is searched.")
    moderation: Nothing = Field(None, description="Accepted: null; nothing is moderated.")
    reasoning_effort: InertText | None = Field(None, description="Passed to the chat template, for those that know it.")
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(encodable)] = empty(
        dict, description='Variables for the chat template, such as {"enable_thinking": false}.'
    )
    verbosity: InertText = Field("", description="Accepted: any; it has no effect on answers.")
