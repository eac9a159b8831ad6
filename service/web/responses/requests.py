"""Body of POST /v1/responses. Each parameter of OpenAI's is supported, or accepted only where it has no effect."""

from __future__ import annotations

from typing import Annotated, Any, Literal, LiteralString

from pydantic import AfterValidator, Field, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from service.web.openai.inert import EmptyList, InertText, Metadata, Nothing, Only
from service.web.responses.items import Input
from service.web.responses.tools import ResponsesChoice, ResponsesTool
from service.web.schemas.bodies import TEMPERATURE, NullIsAbsent, Sampling, Temperature, Text, empty
from service.web.schemas.tools import MAX_TOOLS, encodable

LOGPROBS = "message.output_text.logprobs"
NOT_THERE = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)
"""What can be asked for in `include` and no answer has: it has no such items, and reasoning is given as it is."""

LOGPROBS_REMEDY: LiteralString = "leave it out, or send `logprobs` to /v1/chat/completions"


def _only(accepted: bool | int | None, remedy: LiteralString) -> WrapValidator:
    """Accepts one value, and refuses everything else with this remedy."""

    def check(value: Any, _: ValidatorFunctionWrapHandler) -> Any:
        # False is equal to 0, and no number.
        if value != accepted or type(value) is not type(accepted):
            raise PydanticCustomError("not_honoured", remedy)
        return value

    return WrapValidator(check)


def _none_there(value: list[str]) -> list[str]:
    if LOGPROBS in value:
        raise PydanticCustomError("not_honoured", LOGPROBS_REMEDY)
    unknown = next((name for name in value if name not in NOT_THERE), None)
    if unknown is not None:
        raise PydanticCustomError("not_honoured", "leave {unknown} out", {"unknown": repr(unknown)})
    return value


class ReasoningConfig(NullIsAbsent):
    """How the model thinks."""

    effort: InertText | None = Field(None, description="Passed to the chat template, for those that know it.")
    summary: InertText = Field("", description="Accepted: any; the reasoning itself is given, in `content`.")
    generate_summary: InertText = Field("", description="Accepted: any, as `summary`.")
    context: InertText = Field("", description="Accepted: any; the chat template decides what it shows.")


class TextFormat(NullIsAbsent):
    """Constrains the answer: tokens that would violate the format are excluded before sampling."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="Any text, any JSON object, or a schema.")
    name: str = Field("", description="For your own use; it has no effect on answers.")
    description: str = Field("", description="For your own use; it has no effect on answers.")
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="JSON schema of the answer; only for the type json_schema, which requires it."
    )
    strict: bool | None = Field(None, description="Accepted: any; the schema is always followed strictly.")


class TextConfig(NullIsAbsent):
    """What the text of the answer is."""

    format: TextFormat | None = Field(None, description="None: any text.")
    verbosity: InertText = Field("", description="Accepted: any; it has no effect on answers.")


class EventOptions(NullIsAbsent):
    """What a stream contains."""

    include_obfuscation: bool = Field(False, description="Accepted: any; events are never padded.")


Stateless = Annotated[
    None, _only(None, "answers are not stored: send the whole conversation in `input`, and leave this out")
]
WithoutLogprobs = Annotated[Literal[False], _only(False, LOGPROBS_REMEDY)]
WithoutTop = Annotated[Literal[0], _only(0, LOGPROBS_REMEDY)]
InForeground = Annotated[
    Literal[False], _only(False, "answers are not stored: wait for this one, with `stream` true if it is long")
]


class ResponsesRequest(NullIsAbsent, Sampling):
    """Body of POST /v1/responses."""

    model: str | None = Field(None, description="NAME, NAME:VARIANT or VARIANT, see /v1/models; none: the first there.")
    input: Input = Field(
        min_length=1,
        fail_fast=True,
        description="Conversation to answer, in the model's chat template; if the last item is the assistant's "
        "message, it is continued.",
    )
    instructions: Text | None = Field(None, description="The system's message, before the conversation.")
    max_output_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate; none: as many as fit in the context."
    )
    temperature: Temperature = Field(1.0, ge=0, le=2, description=TEMPERATURE)
    tools: list[ResponsesTool] = empty(
        list, max_length=MAX_TOOLS, description="What the model may call; it needs a chat template that knows tools."
    )
    tool_choice: ResponsesChoice | None = Field(
        None, description="auto, as if left out: the model chooses; none: no call; required: a call; or a tool to call."
    )
    parallel_tool_calls: bool = Field(True, description="Whether an answer may hold several calls.")
    text: TextConfig | None = Field(None, description="What the text of the answer is.")
    reasoning: ReasoningConfig | None = Field(None, description="How the model thinks.")
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(encodable)] = empty(
        dict, description='Variables for the chat template, such as {"enable_thinking": false}.'
    )
    stream_options: EventOptions | None = Field(None, description="Accepted: any; it has no effect.")
    store: bool = Field(True, description="Accepted: any; answers are not stored.")
    include: Annotated[list[InertText], AfterValidator(_none_there)] = empty(
        list,
        max_length=64,
        description=f"Accepted: {', '.join(NOT_THERE)}; an answer has nothing of what they ask for.",
    )
    metadata: Metadata = empty(dict, description="Given back in the answer; nothing is stored.")
    previous_response_id: Stateless = Field(None, description="Accepted: null; answers are not stored.")
    conversation: Stateless = Field(None, description="Accepted: null; conversations are not stored.")
    prompt: Nothing = Field(None, description="Accepted: null; prompts are not stored.")
    background: InForeground = Field(False, description="Accepted: false.")
    background_options: dict[str, Any] = empty(dict, description="Accepted; nothing runs in the background.")
    truncation: Only[Literal["disabled"]] = Field("disabled", description="Accepted: disabled; nothing is left out.")
    context_management: EmptyList = empty(list, description="Accepted: [].")
    logprobs: WithoutLogprobs = Field(False, description="Accepted: false; /v1/chat/completions has them.")
    top_logprobs: WithoutTop = Field(0, description="Accepted: 0; /v1/chat/completions has log-probabilities.")
    max_tool_calls: int | None = Field(None, description="Accepted: any; it counts calls of tools of the server's own.")
    moderation: Nothing = Field(None, description="Accepted: null; nothing is moderated.")
    access_programs: dict[str, Any] = empty(dict, description="Accepted; there are none.")
    client_metadata: dict[str, Any] = empty(dict, description="Accepted; what Codex tells of itself.")
    user: InertText = Field("", description="Accepted; it has no effect on answers.")
    safety_identifier: InertText = Field("", description="Accepted; it has no effect on answers.")
    service_tier: InertText = Field("auto", description="Accepted: any; there is one tier.")
    prompt_cache_key: InertText = Field("", description="Accepted; prompts are found by their content.")
    prompt_cache_retention: InertText = Field("", description="Accepted; the cache keeps what fits.")
    prompt_cache_options: dict[str, Any] = empty(dict, description="Accepted; prompts are found by their content.")
