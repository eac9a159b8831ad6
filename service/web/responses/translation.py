"""A request of the Responses API as a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.errors import InvalidRequest
from service.web.openai.requests import ChatMessage, ChatRequest, JsonSchema, ResponseFormat
from service.web.openai.turns import Turns
from service.web.responses.items import CallItem, MessageItem, ReasoningItem, ResultItem
from service.web.responses.requests import ResponsesRequest, TextFormat
from service.web.responses.tools import chosen, defined_tools, flat_name
from service.web.schemas.bodies import Sampling
from service.web.schemas.tools import CalledFunction, PastCall

NAMES: Mapping[str, str] = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
}
"""The fields of a chat that have another name here."""


def chat_request(body: ResponsesRequest, *, takes_later_system: bool) -> ChatRequest:
    """The request as a chat. takes_later_system: of its chat template; see `Turns`.

    Raises:
        InvalidRequest: a field does not go with another one.
    """
    fields: dict[str, Any] = {
        name: getattr(body, name) for name in Sampling.model_fields if name in body.model_fields_set
    }
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    if body.reasoning is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    return ChatRequest(
        **fields,
        messages=_messages(body, Turns(takes_later_system=takes_later_system)),
        max_completion_tokens=body.max_output_tokens,
        tools=defined_tools(body.tools),
        tool_choice=chosen(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _messages(body: ResponsesRequest, turns: Turns) -> list[ChatMessage]:
    if body.instructions:
        turns.say("system", body.instructions)
    for item in body.input:
        match item:
            case MessageItem():
                turns.say(item.role, item.content)
            case ReasoningItem():
                turns.think(item.summary if item.content is None else item.content)
            case CallItem():
                name = flat_name(item.name, item.namespace)
                function = CalledFunction(name=name, arguments=item.arguments)
                turns.call(PastCall(id=item.call_id, type="function", function=function))
            case ResultItem():
                turns.answer(item.call_id, item.output)
    return turns.messages()


def _response_format(wanted: TextFormat) -> ResponseFormat:
    if (wanted.schema_ is not None) != (wanted.type == "json_schema"):
        remedy = "send it as well" if wanted.schema_ is None else 'send the type "json_schema", or leave it out'
        raise InvalidRequest(
            f"`text.format.type` is {wanted.type!r}, which does not go with "
            f"{'no' if wanted.schema_ is None else 'a'} `schema`; {remedy}",
            "text",
        )
    if wanted.schema_ is None:
        return ResponseFormat(type=wanted.type)
    schema = JsonSchema(name=wanted.name or "answer", schema=wanted.schema_)
    return ResponseFormat(type="json_schema", json_schema=schema)
