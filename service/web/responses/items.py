"""The items of a conversation in the Responses API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from service.web.openai.inert import InertText
from service.web.schemas.bodies import NullIsAbsent, Text
from service.web.schemas.content import kind_of, list_or_text, text_in_parts
from service.web.schemas.tools import CallArguments, ToolName

NAMESPACE = r"^[A-Za-z0-9_:/-]{1,63}$"
NamespaceName = Annotated[str, Field(pattern=NAMESPACE)]
SERVED_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


class Item(NullIsAbsent):
    """What items have in common; an item of an answer can be sent back unchanged."""

    id: InertText = Field("", description="Accepted; nothing is stored that it could name.")
    status: InertText = Field("", description="Accepted: any.")


class MessageItem(Item):
    """A message."""

    type: Literal["message"] = Field("message", description="May be left out.")
    role: Literal["system", "developer", "user", "assistant"] = Field(description="Role of the author.")
    content: text_in_parts("input_text", "output_text") = Field(  # type: ignore[valid-type]
        description="The text: a string, or text parts, which are joined by line breaks."
    )
    phase: InertText = Field("", description="Accepted: any.")


class CallItem(Item):
    """A call that the assistant has made."""

    type: Literal["function_call"] = Field(description="A call of a function.")
    call_id: Text = Field(description="What the function's answer names.")
    name: ToolName = Field(description="The function.")
    namespace: NamespaceName | None = Field(None, description="The namespace of the function.")
    arguments: CallArguments = Field(
        "{}", description="The JSON of an object.", json_schema_extra={"contentMediaType": "application/json"}
    )
    caller: Any = Field(None, description="Accepted: any.")
    parsed_arguments: Any = Field(None, description="Accepted: any; OpenAI's client adds what it read in `arguments`.")


class ResultItem(Item):
    """What a function has answered."""

    type: Literal["function_call_output"] = Field(description="The answer to a call.")
    call_id: Text = Field(description="The call that it answers.")
    output: text_in_parts("input_text", "output_text") = Field(  # type: ignore[valid-type]
        description="The answer: a string, or text parts, which are joined by line breaks."
    )
    name: InertText = Field("", description="Accepted: any.")
    namespace: InertText = Field("", description="Accepted: any.")
    caller: Any = Field(None, description="Accepted: any.")


class ReasoningItem(Item):
    """What the assistant thought."""

    type: Literal["reasoning"] = Field(description="Reasoning.")
    content: text_in_parts("reasoning_text") | None = Field(  # type: ignore[valid-type]
        None, description="The reasoning, shown to chat templates that know it."
    )
    summary: text_in_parts("summary_text") | None = Field(  # type: ignore[valid-type]
        None, description="Shown where there is no `content`."
    )
    encrypted_content: Text | None = Field(None, description="Accepted: any; this server encrypts none.")


def _kind(value: Any) -> str | None:
    kind = kind_of(value, "message")
    return kind if kind in SERVED_ITEMS else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="unknown_kind",
        custom_error_message="this server reads text and calls of functions alone, and stores no items: send those of "
        f"the types {', '.join(SERVED_ITEMS)}",
    ),
]


def _as_items(value: Any) -> Any:
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[list[InputItem], BeforeValidator(_as_items), Field(json_schema_extra=list_or_text)]
"""A conversation; a string is the user's message."""
