"""Bodies of POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from service.web.openai.inert import EmptyList, InertText, Nothing
from service.web.schemas.bodies import (
    MAX_STOPS,
    TEMPERATURE,
    NullIsAbsent,
    Sampling,
    ShortText,
    Temperature,
    Text,
    empty,
)
from service.web.schemas.content import kind_of, list_or_text, text_in_parts
from service.web.schemas.tools import MAX_TOOLS, AllowedCallers, ToolName, encodable

Object = Annotated[dict[str, Any], AfterValidator(encodable)]
CLEARS_THINKING = "clear_thinking_"


def _clears_thinking(value: Any) -> Any:
    edits = (value.get("edits") or []) if isinstance(value, dict) else value
    kinds = [kind_of(edit) for edit in edits] if isinstance(edits, list) else [None]
    if value is not None and not all(isinstance(kind, str) and kind.startswith(CLEARS_THINKING) for kind in kinds):
        raise PydanticCustomError(
            "not_honoured", "leave it out, and leave what the model is not to see out of `messages`"
        )
    return value


ContextManagement = Annotated[Any, AfterValidator(_clears_thinking)]
CACHED = "Accepted: any; prompts are found by their content."


class Cacheable(NullIsAbsent):
    """What blocks and tools have in common."""

    cache_control: Any = Field(None, description=CACHED)


class TextBlock(Cacheable):
    """A text."""

    type: Literal["text"] = Field(description="Text.")
    text: Text = Field(description="The text.")
    citations: Any = Field(None, description="Accepted: any; the model is not shown it.")


class ToolUseBlock(Cacheable):
    """A call that the assistant has made."""

    type: Literal["tool_use"] = Field(description="A call of a tool.")
    id: Text = Field(description="What the tool's result names.")
    name: ToolName = Field(description="The tool.")
    input: Object = Field(description="Its arguments.")
    caller: Any = Field(None, description="Accepted: any.")


class ToolResultBlock(Cacheable):
    """What a tool has answered."""

    type: Literal["tool_result"] = Field(description="The result of a call.")
    tool_use_id: Text = Field(description="The call that it answers.")
    content: text_in_parts("text") = Field(  # type: ignore[valid-type]
        "", description="The result: a string, or text blocks, which are joined by line breaks."
    )
    is_error: bool = Field(False, description="Accepted: any; the model is shown the content alone.")


class ThinkingBlock(NullIsAbsent):
    """What the assistant thought."""

    type: Literal["thinking"] = Field(description="Reasoning.")
    thinking: Text = Field(description="The reasoning, shown to chat templates that know it.")
    signature: Text = Field("", description="Accepted: any; nothing is signed.")


class RedactedThinkingBlock(NullIsAbsent):
    """What the assistant thought, encrypted by another server."""

    type: Literal["redacted_thinking"] = Field(description="Reasoning that cannot be read.")
    data: Text = Field(description="Accepted: any; the model is not shown it.")


SERVED_BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


def _kind(value: Any) -> str | None:
    kind = kind_of(value)
    return kind if kind in SERVED_BLOCKS else None


ContentBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")],
    Discriminator(
        _kind,
        custom_error_type="unknown_kind",
        custom_error_message="this server reads text alone, no images and no documents: send blocks of the types "
        f"{', '.join(SERVED_BLOCKS)}",
    ),
]


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class MessageParam(NullIsAbsent):
    """A turn of a conversation."""

    role: Literal["user", "assistant", "system"] = Field(description="The author.")
    content: Annotated[list[ContentBlock], BeforeValidator(_as_blocks), Field(json_schema_extra=list_or_text)] = Field(
        description="A string, or blocks; texts are joined by line breaks."
    )


class CustomTool(Cacheable):
    """A tool that the client runs."""

    type: Literal["custom"] = Field("custom", description="Accepted: custom, or left out.")
    name: ToolName = Field(description="Letters, digits, _ . : / and -.")
    description: Text | None = Field(None, description="What it does; shown to the model.")
    input_schema: Object = Field(description="JSON schema of its arguments. Forced calls are held to it.")
    strict: bool | None = Field(None, description="Accepted: any; forced calls are always held to the schema.")
    input_examples: list[Any] = empty(list, description="Accepted: any; the model is not shown them.")
    defer_loading: bool = Field(False, description="Accepted: any; every tool is shown from the start.")
    eager_input_streaming: bool | None = Field(None, description="Accepted: any; see `tool_choice`.")
    allowed_callers: AllowedCallers = Field(["direct"], description="Accepted: any with direct: the model calls.")


def _tool_kind(value: Any) -> str | None:
    return "custom" if kind_of(value, "custom") == "custom" else None


MessagesTool = Annotated[
    Annotated[CustomTool, Tag("custom")],
    Discriminator(
        _tool_kind,
        custom_error_type="unknown_kind",
        custom_error_message="this server has no tools of its own: send tools with an `input_schema`, which the client "
        "runs",
    ),
]


class MessagesChoice(NullIsAbsent):
    """Whether the model must call."""

    type: Literal["auto", "any", "tool", "none"] = Field(
        description="auto: the model chooses; any: a call; tool: a call of the tool `name`; none: no call."
    )
    name: ToolName | None = Field(None, description="One of `tools`; only for the type tool, which requires it.")
    disable_parallel_tool_use: bool = Field(False, description="Whether an answer may hold one call at most.")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.name is not None) != (self.type == "tool"):
            raise PydanticCustomError("not_one", "send a `name` with the type tool, and with no other")
        return self


class Thinking(NullIsAbsent):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"] = Field(
        description="Passed to the chat template as `enable_thinking`, for those that know it: false if disabled."
    )
    budget_tokens: int | None = Field(None, description="Accepted: any; reasoning counts towards `max_tokens` alone.")
    display: InertText = Field("", description="Accepted: any; all reasoning is shown.")


class OutputFormat(NullIsAbsent):
    """Constrains the answer: tokens that would violate the schema are excluded before sampling."""

    type: Literal["json_schema"] = Field(description="A schema.")
    schema_: dict[str, Any] = Field(alias="schema", description="JSON schema of the answer.")


class OutputConfig(NullIsAbsent):
    """What the answer is."""

    effort: InertText | None = Field(None, description="Passed to the chat template as `reasoning_effort`.")
    format: OutputFormat | None = Field(None, description="None: any text.")


class MessagesMetadata(NullIsAbsent):
    """Labels for the client's own use."""

    user_id: Annotated[Text, Field(max_length=4096)] = Field("", description="Accepted; it has no effect on answers.")


class PromptFields(NullIsAbsent):
    """What of a request makes its prompt."""

    model: str | None = Field(None, description="NAME, NAME:VARIANT or VARIANT, see /v1/models; none: the first there.")
    messages: list[MessageParam] = Field(
        min_length=1,
        fail_fast=True,
        description="Conversation to answer, in the model's chat template; if the last message is the assistant's, it "
        "is continued.",
    )
    system: Annotated[list[TextBlock], BeforeValidator(_as_blocks), Field(json_schema_extra=list_or_text)] = Field(
        [], description="The system's message: a string, or text blocks, which are joined by line breaks."
    )
    tools: list[MessagesTool] = empty(
        list, max_length=MAX_TOOLS, description="What the model may call; it needs a chat template that knows tools."
    )
    tool_choice: MessagesChoice | None = Field(None, description="Whether the model must call; none: auto.")
    thinking: Thinking | None = Field(None, description="None: as the chat template has it.")
    output_config: OutputConfig | None = Field(None, description="What the answer is.")
    cache_control: Any = Field(None, description=CACHED)
    context_management: ContextManagement = Field(
        None, description="Accepted: edits of the types clear_thinking_..., as the chat template decides what it shows."
    )
    mcp_servers: EmptyList = empty(list, description="Accepted: []; the server calls no tools.")
    speed: InertText = Field("", description="Accepted: any; there is one speed.")


class MessagesRequest(PromptFields, Sampling):
    """Body of POST /v1/messages."""

    max_tokens: int = Field(
        ge=1,
        description="Most tokens to generate; fewer where the context leaves less, and then the answer ends with "
        "model_context_window_exceeded.",
    )
    stop: list[ShortText] = empty(
        list,
        alias="stop_sequences",
        max_length=MAX_STOPS,
        description="Strings that end the answer and are cut off it; also special tokens' names.",
    )
    temperature: Temperature = Field(1.0, ge=0, le=2, description=TEMPERATURE)
    metadata: MessagesMetadata | None = Field(None, description="Accepted; it has no effect on answers.")
    container: Nothing = Field(None, description="Accepted: null; there are none.")
    service_tier: InertText = Field("auto", description="Accepted: any; there is one tier.")
    inference_geo: InertText = Field("", description="Accepted: any.")
    diagnostics: Any = Field(None, description="Accepted: any.")


class CountRequest(PromptFields):
    """Body of POST /v1/messages/count_tokens."""
