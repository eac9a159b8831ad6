"""A request of the Messages API as a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from service.errors import InvalidRequest
from service.web.messages.requests import (
    CustomTool,
    MessageParam,
    MessagesChoice,
    MessagesRequest,
    PromptFields,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from service.web.openai.requests import ChatRequest, JsonSchema, ResponseFormat
from service.web.openai.turns import Turns
from service.web.schemas.bodies import Sampling
from service.web.schemas.content import SEPARATOR
from service.web.schemas.tools import (
    CalledFunction,
    ChosenFunction,
    ChosenTool,
    FunctionDefinition,
    PastCall,
    ToolDefinition,
    Words,
)

NAMES: Mapping[str, str] = {"response_format": "output_config", "stop": "stop_sequences"}
"""The fields of a chat that have another name here."""
BILLING = "x-anthropic-billing-header:"
"""How a block of `system` begins that Claude Code writes for Anthropic's servers, not for the model."""
SPEAKERS: Mapping[type, str] = {
    ToolUseBlock: "assistant",
    ThinkingBlock: "assistant",
    RedactedThinkingBlock: "assistant",
    ToolResultBlock: "user",
}
"""The only role that may send a block."""
CHOICES: Mapping[str, Words] = {"auto": "auto", "any": "required", "none": "none"}


def chat_request(body: PromptFields, *, takes_later_system: bool) -> ChatRequest:
    """The request as a chat, without the number of tokens. takes_later_system: of its chat template; see `Turns`.

    Raises:
        InvalidRequest: a block is in a message of another role than its own.
    """
    fields: dict[str, Any] = {}
    if isinstance(body, MessagesRequest):
        fields |= {name: getattr(body, name) for name in Sampling.model_fields if name in body.model_fields_set}
    config = body.output_config
    if config is not None:
        fields["reasoning_effort"] = config.effort
    if config is not None and config.format is not None:
        schema = JsonSchema(name="answer", schema=config.format.schema_)
        fields["response_format"] = ResponseFormat(type="json_schema", json_schema=schema)
    if body.thinking is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": body.thinking.type != "disabled"}
    if body.tool_choice is not None:
        fields["tool_choice"] = _choice(body.tool_choice)
        fields["parallel_tool_calls"] = not body.tool_choice.disable_parallel_tool_use
    turns = Turns(takes_later_system=takes_later_system)
    system = _joined([block for block in body.system if not block.text.startswith(BILLING)])
    if system:
        turns.say("system", system)
    for place, message in enumerate(body.messages):
        _add(turns, place, message)
    return ChatRequest(**fields, messages=turns.messages(), tools=[_tool(tool) for tool in body.tools])


def _add(turns: Turns, place: int, message: MessageParam) -> None:
    """Add a message to the conversation; neighbouring texts of it become one."""
    texts: list[TextBlock] = []
    for block in message.content:
        owner = SPEAKERS.get(type(block), message.role)
        if owner != message.role:
            raise InvalidRequest(
                f"`messages.{place}` has the role {message.role!r} and a block of the type {block.type!r}, which is "
                f"the {owner}'s alone; send it in a message of the role {owner!r}",
                "messages",
            )
        if isinstance(block, TextBlock):
            texts.append(block)
            continue
        _say(turns, message, texts)
        match block:
            case ToolUseBlock():
                function = CalledFunction(name=block.name, arguments=json.dumps(block.input, ensure_ascii=False))
                turns.call(PastCall(id=block.id, type="function", function=function))
            case ToolResultBlock():
                turns.answer(block.tool_use_id, block.content)
            case ThinkingBlock():
                turns.think(block.thinking)
    _say(turns, message, texts)
    if not message.content:
        turns.say(message.role, "")


def _say(turns: Turns, message: MessageParam, texts: list[TextBlock]) -> None:
    """Add what these blocks say, and empty the list."""
    if texts:
        turns.say(message.role, _joined(texts))
        texts.clear()


def _joined(blocks: list[TextBlock]) -> str:
    return SEPARATOR.join(block.text for block in blocks)


def _tool(tool: CustomTool) -> ToolDefinition:
    function = FunctionDefinition(name=tool.name, description=tool.description, parameters=tool.input_schema)
    return ToolDefinition(type="function", function=function)


def _choice(choice: MessagesChoice) -> Words | ChosenTool:
    if choice.name is None:
        return CHOICES[choice.type]
    return ChosenTool(type="function", function=ChosenFunction(name=choice.name))
