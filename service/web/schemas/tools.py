"""Tools in request bodies, and calls of them in conversations and answers."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, BaseModel, Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.web.schemas.bodies import Body, NullIsAbsent, Text, empty, whole_unicode

MAX_TOOLS = 512


def encodable(value: dict[str, Any]) -> dict[str, Any]:
    """The object, unchanged. Raises a pydantic error if a text in it cannot be shown to the model."""
    try:
        whole_unicode(json.dumps(value, ensure_ascii=False))
    except RecursionError as error:
        raise PydanticCustomError("too_deep", "send fewer levels") from error
    return value


def _direct(value: list[str]) -> list[str]:
    if "direct" not in value:
        raise PydanticCustomError("not_honoured", 'leave it out, or add "direct": nobody else than the model calls')
    return value


AllowedCallers = Annotated[list[str], AfterValidator(_direct)]
"""Who may call a tool: always the model itself."""
TOOL_NAME = r"^[A-Za-z0-9_.:/-]{1,128}$"
ToolName = Annotated[str, Field(pattern=TOOL_NAME)]


class FunctionDefinition(NullIsAbsent):
    """A function that the model may call."""

    name: ToolName = Field(description="Letters, digits, _ . : / and -.")
    description: Text | None = Field(None, description="What it does; shown to the model.")
    parameters: Annotated[dict[str, Any], AfterValidator(encodable)] | None = Field(
        None,
        description="JSON schema of its arguments; none: it takes none. Forced calls are held to it.",
    )
    strict: bool | None = Field(None, description="Accepted: any; forced calls are always held to the schema.")


class ToolDefinition(NullIsAbsent):
    """A tool: a function."""

    type: Literal["function"] = Field(description="Only functions are served.")
    function: FunctionDefinition = Field(description="The function.")

    def shown(self) -> dict[str, Any]:
        """The tool as chat templates expect it, without what the client left out."""
        function = self.function
        given = {"name": function.name, "description": function.description, "parameters": function.parameters}
        return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


class ChosenFunction(NullIsAbsent):
    """The name of a function."""

    name: ToolName = Field(description="One of `tools`.")


class ChosenTool(NullIsAbsent):
    """The one tool that must be called."""

    type: Literal["function"] = Field(description="Only functions are served.")
    function: ChosenFunction = Field(description="The function to call.")


Words = Literal["none", "auto", "required"]


def _choice(value: Any) -> Words | ChosenTool:
    if isinstance(value, str) and value in get_args(Words):
        return cast(Words, value)
    try:
        return ChosenTool.model_validate(value)
    except ValidationError as error:
        raise PydanticCustomError(
            "no_choice", 'send none, auto, required, or {"type": "function", "function": {"name": "..."}}'
        ) from error


_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": list(get_args(Words))},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string", "pattern": TOOL_NAME}},
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "function"],
            "additionalProperties": False,
        },
    ]
}
ToolChoice = Annotated[Words | ChosenTool, PlainValidator(_choice), WithJsonSchema(_CHOICE_SCHEMA)]


def _arguments(value: str) -> str:
    """The arguments of a call in a conversation, if they are a JSON object."""
    try:
        found = json.loads(value or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise PydanticCustomError("not_arguments", "send the JSON of an object")
    encodable(found)
    return value


CallArguments = Annotated[Text, AfterValidator(_arguments)]
"""The arguments of a call in a conversation: the JSON of an object."""


class CalledFunction(NullIsAbsent):
    """A function that the assistant has called."""

    name: ToolName = Field(description="Its name.")
    arguments: CallArguments = Field(
        "{}", description="The JSON of an object.", json_schema_extra={"contentMediaType": "application/json"}
    )
    parsed_arguments: Any = Field(None, description="Accepted: any; OpenAI's client adds what it read in `arguments`.")


class PastCall(NullIsAbsent):
    """A call that the assistant has made earlier in the conversation."""

    id: Text = Field("", description="What the tool's answer names in `tool_call_id`.")
    type: Literal["function"] = Field("function", description="Only functions are served.")
    function: CalledFunction = Field(description="What was called, and with what.")
    index: int | None = Field(None, description="Accepted: any; calls are taken in the order sent.")

    def shown(self) -> dict[str, Any]:
        """The call as chat templates expect it: with the arguments as an object."""
        arguments = json.loads(self.function.arguments or "{}")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class ToolFields(Body):
    """The fields of a body whose answer may call tools."""

    tools: list[ToolDefinition] = empty(
        list, max_length=MAX_TOOLS, description="What the model may call; it needs a chat template that knows tools."
    )
    tool_choice: ToolChoice | None = Field(
        None, description="auto, as if left out: the model chooses; none: no call; required: a call; or a tool to call."
    )
    parallel_tool_calls: bool = Field(True, description="Whether an answer may hold several calls.")


class FunctionCall(BaseModel):
    """What an answer calls."""

    name: str
    arguments: str = Field(description="The JSON of an object, unless the answer was cut by its length.")


class ToolCall(BaseModel):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionDelta(BaseModel):
    """A piece of a call. name: only in the first one; the pieces of `arguments` add up."""

    name: str | None = None
    arguments: str = ""


class ToolCallDelta(BaseModel):
    """What an event adds to a call. id and type: only in its first piece."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta
