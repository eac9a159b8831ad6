"""Tools in the Responses API, and the names that the model knows them by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, Discriminator, Field, PlainValidator, Tag, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.errors import InvalidRequest
from service.web.responses.items import NamespaceName
from service.web.schemas.bodies import NullIsAbsent, Text
from service.web.schemas.content import kind_of
from service.web.schemas.tools import (
    TOOL_NAME,
    AllowedCallers,
    ChosenFunction,
    ChosenTool,
    FunctionDefinition,
    ToolDefinition,
    ToolName,
    Words,
    encodable,
)

LEFT_OUT = frozenset({"web_search"})
"""Tools of OpenAI's servers that Codex sends without being asked to: beside functions they are left out."""
MAX_NAME_CHARS = 128
Parameters = Annotated[dict[str, Any], AfterValidator(encodable)]


class FunctionTool(NullIsAbsent):
    """A function that the model may call."""

    type: Literal["function"] = Field(description="A function.")
    name: ToolName = Field(description="Letters, digits, _ . : / and -.")
    description: Text | None = Field(None, description="What it does; shown to the model.")
    parameters: Parameters | None = Field(
        None, description="JSON schema of its arguments; none: it takes none. Forced calls are held to it."
    )
    strict: bool | None = Field(None, description="Accepted: any; forced calls are always held to the schema.")
    output_schema: Any = Field(None, description="Accepted: any; the model is not shown it.")
    allowed_callers: AllowedCallers = Field(["direct"], description="Accepted: any with direct: the model calls.")
    defer_loading: bool = Field(False, description="Accepted: any; every function is shown from the start.")

    def defined(self, namespace: str | None = None) -> ToolDefinition:
        """The function as a chat has it."""
        function = FunctionDefinition(
            name=flat_name(self.name, namespace), description=self.description, parameters=self.parameters
        )
        return ToolDefinition(type="function", function=function)


class NamespaceTool(NullIsAbsent):
    """Functions that belong together. The model knows each as NAMESPACE.NAME."""

    type: Literal["namespace"] = Field(description="A namespace.")
    name: NamespaceName = Field(description="Letters, digits, _ : / and -.")
    description: Text | None = Field(None, description="Accepted: any; the model is shown the functions'.")
    tools: list[FunctionTool] = Field(description="The functions.")


def _kind(value: Any) -> str | None:
    kind = kind_of(value)
    if kind in LEFT_OUT:
        return "left_out"
    return kind if kind in ("function", "namespace") else None


_LEFT_OUT_SCHEMA = {"type": "object", "properties": {"type": {"enum": sorted(LEFT_OUT)}}, "required": ["type"]}
ResponsesTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[dict[str, Any], AfterValidator(encodable), WithJsonSchema(_LEFT_OUT_SCHEMA), Tag("left_out")],
    Discriminator(
        _kind,
        custom_error_type="unknown_kind",
        custom_error_message="this server has no tools of its own, and no custom ones, whose input is free text: send "
        "functions, or namespaces of functions, which the client runs",
    ),
]


class NamedFunction(NullIsAbsent):
    """The one function that must be called."""

    type: Literal["function"] = Field(description="Only functions are served.")
    name: ToolName = Field(description="One of `tools`.")
    namespace: NamespaceName | None = Field(None, description="Its namespace, if it is in one.")


def _choice(value: Any) -> Words | NamedFunction:
    if isinstance(value, str) and value in get_args(Words):
        return cast(Words, value)
    try:
        return NamedFunction.model_validate(value)
    except ValidationError as error:
        raise PydanticCustomError(
            "no_choice", 'send none, auto, required, or {"type": "function", "name": "..."}'
        ) from error


_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": list(get_args(Words))},
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "name": {"type": "string", "pattern": TOOL_NAME}},
            "required": ["type", "name"],
            "additionalProperties": False,
        },
    ]
}
ResponsesChoice = Annotated[Words | NamedFunction, PlainValidator(_choice), WithJsonSchema(_CHOICE_SCHEMA)]


def flat_name(name: str, namespace: str | None) -> str:
    """The name by which the model knows a function.

    Raises:
        InvalidRequest: it is longer than MAX_NAME_CHARS.
    """
    if namespace is None:
        return name
    flat = f"{namespace}.{name}"
    if len(flat) > MAX_NAME_CHARS:
        raise InvalidRequest(
            f"the function {name!r} of the namespace {namespace!r} has {len(flat)} characters in its name, the dot "
            f"between them counted; the limit is {MAX_NAME_CHARS}; send a shorter one",
            "tools",
        )
    return flat


def split_names(tools: Sequence[FunctionTool | NamespaceTool | dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Name that the model knows -> namespace and name, of the functions in namespaces."""
    spaces = [tool for tool in tools if isinstance(tool, NamespaceTool)]
    return {flat_name(tool.name, space.name): (space.name, tool.name) for space in spaces for tool in space.tools}


def defined_tools(tools: Sequence[FunctionTool | NamespaceTool | dict[str, Any]]) -> list[ToolDefinition]:
    """The tools as a chat has them, without those that are left out.

    Raises:
        InvalidRequest: there is nothing else than those, or a name is too long.
    """
    found = list(_defined(tools))
    if tools and not found:
        raise InvalidRequest(
            f"`tools` has nothing but {', '.join(sorted(_types(tools)))}, which this server does not have; send "
            "functions, or leave `tools` out",
            "tools",
        )
    return found


def chosen(choice: Words | NamedFunction | None) -> Words | ChosenTool | None:
    """The choice as a chat has it. Raises as `flat_name`."""
    if not isinstance(choice, NamedFunction):
        return choice
    return ChosenTool(type="function", function=ChosenFunction(name=flat_name(choice.name, choice.namespace)))


def _defined(tools: Sequence[FunctionTool | NamespaceTool | dict[str, Any]]) -> Iterator[ToolDefinition]:
    for tool in tools:
        if isinstance(tool, FunctionTool):
            yield tool.defined()
        elif isinstance(tool, NamespaceTool):
            yield from (each.defined(tool.name) for each in tool.tools)


def _types(tools: Sequence[FunctionTool | NamespaceTool | dict[str, Any]]) -> set[str]:
    return {str(tool["type"]) if isinstance(tool, dict) else tool.type for tool in tools}
