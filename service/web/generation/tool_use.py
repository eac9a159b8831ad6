"""Tools of a request: what the model is shown, what its answer is held to, and the calls in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from service.engine.api import FinishReason
from service.errors import InvalidRequest
from service.text.json.keywords import PARAM
from service.text.json.schema import GrammarRules
from service.text.protocols import TokenizerLike
from service.text.reasoning import ReasoningParser
from service.text.tools.calls import Arguments, Called, Event, Said, Tool, ToolParser
from service.text.tools.forced import PARAM as TOOLS
from service.text.tools.forced import ForcedParser, call_grammar
from service.text.tools.format import Format
from service.text.tools.parser import FreeParser
from service.web.schemas.generate import End
from service.web.schemas.tools import (
    ChosenTool,
    FunctionCall,
    FunctionDelta,
    PastCall,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    ToolDefinition,
)

SERVED = "Hermes and Qwen, Llama 3, Mistral"


class WithTools(Protocol):
    """A body with tools."""

    @property
    def tools(self) -> list[ToolDefinition]: ...

    @property
    def tool_choice(self) -> ToolChoice | None: ...

    @property
    def parallel_tool_calls(self) -> bool: ...


class Turn(Protocol):
    """A message of a conversation that may call tools, or answer a call."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str | None: ...

    @property
    def name(self) -> str | None: ...

    @property
    def thoughts(self) -> str | None: ...

    @property
    def tool_calls(self) -> list[PastCall]: ...

    @property
    def tool_call_id(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How the answers to a request may call tools.

    tools: those that may be called.
    is_forced: whether an answer must call one, and consists of calls alone.
    most: calls in an answer; None for any number.
    """

    format: Format
    tools: tuple[Tool, ...]
    is_forced: bool
    most: int | None

    def parser(self) -> ToolParser:
        """A parser for one answer."""
        if self.is_forced:
            return ForcedParser(self.format.frame)
        return FreeParser(self.format, {tool.name for tool in self.tools}, self.most)

    def rules(self, tokenizer: TokenizerLike) -> GrammarRules:
        """The rules for the calls; see `call_grammar`."""
        return call_grammar(self.tools, self.format, tokenizer.special_ids, is_parallel=self.most is None)


def tool_use(body: WithTools, tokenizer: TokenizerLike) -> ToolUse | None:
    """How the request's answers may call tools; None if not at all.

    Raises:
        InvalidRequest: the model's chat template has no tools in a format that is served, two tools have one name, or
            `tool_choice` names none of them.
    """
    choice, names = body.tool_choice, [tool.function.name for tool in body.tools]
    if choice == "none" or not (names or isinstance(choice, ChosenTool) or choice == "required"):
        return None
    if not names:
        raise InvalidRequest("`tool_choice` asks for a call, but there are no `tools`; send them", "tool_choice")
    if tokenizer.tool_format is None:
        raise InvalidRequest(
            f"`tools` are sent, but this model's chat template has no tools in a format that is served ({SERVED}); "
            "leave `tools` out, or serve a model that was trained to call them",
            "tools",
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"`tools` holds {twice!r} twice; give each its own name", "tools")
    chosen = choice.function.name if isinstance(choice, ChosenTool) else None
    if chosen is not None and chosen not in names:
        raise InvalidRequest(
            f"`tool_choice` names {chosen!r}, which is none of `tools`; send one of: {', '.join(names)}", "tool_choice"
        )
    tools = tuple(Tool(tool.function.name, tool.function.parameters) for tool in body.tools)
    return ToolUse(
        format=tokenizer.tool_format,
        tools=tuple(tool for tool in tools if chosen in (None, tool.name)),
        is_forced=chosen is not None or choice == "required",
        most=1 if chosen is not None or not body.parallel_tool_calls else None,
    )


class TextRules(NamedTuple):
    """What an answer is held to that calls no tool.

    param: the field that says so.
    make: makes its rules, or the text of rules that do not go together with others.
    """

    param: str
    make: Callable[[], GrammarRules | str]


async def answer_rules(of_text: TextRules | None, use: ToolUse | None, tokenizer: TokenizerLike) -> str | None:
    """The grammar's rules that an answer is held to, as for `Engine.compile`; None for any text.

    of_text: None if an answer that calls no tool may be any text.

    Raises as `Rules.all`, `call_grammar` and `of_text.make`.
    """
    if of_text is None and (use is None or not use.is_forced):
        return None

    def made() -> str:
        calls = None if use is None else use.rules(tokenizer)
        if of_text is None or (use is not None and use.is_forced):
            assert calls is not None
            return calls.text()
        rules = of_text.make()
        if isinstance(rules, GrammarRules):
            return (rules if calls is None else rules | calls).text()
        if calls is not None:
            raise InvalidRequest(
                f"`{of_text.param}` holds a regular expression or a grammar, beside which no tools can be called; "
                'leave one of them out, or send `tool_choice` "none"',
                of_text.param,
            )
        return rules

    with blaming(of_text, use):
        return await asyncio.to_thread(made)


@contextmanager
def blaming(of_text: TextRules | None, use: ToolUse | None) -> Iterator[None]:
    """Name the field that a schema or grammar came in, whose refusals inside all name `response_format`."""
    is_forced = use is not None and use.is_forced
    try:
        yield
    except InvalidRequest as error:
        if error.param != PARAM or (of_text is None and not is_forced):
            raise
        param = TOOLS if is_forced or of_text is None else of_text.param
        raise InvalidRequest(error.message, param) from error


def is_continued(messages: Sequence[Turn]) -> bool:
    """Whether an answer to these messages goes on with the last one's text."""
    return messages[-1].role == "assistant" and not messages[-1].tool_calls


def shown_messages(messages: Sequence[Turn], tokenizer: TokenizerLike) -> list[dict[str, Any]]:
    """The messages as chat templates expect them.

    Raises:
        InvalidRequest: they hold calls of tools, or answers to them, and the model's chat template knows no tools.
    """
    format_ = tokenizer.tool_format
    shown: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        entry: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.name is not None:
            entry["name"] = message.name
        if message.thoughts is not None:
            entry["reasoning_content"] = message.thoughts
        if message.role == "tool" or message.tool_calls:
            if format_ is None:
                raise InvalidRequest(
                    f"`messages.{place}` is part of a call of tools, but this model's chat template has no tools in a "
                    f"format that is served ({SERVED}); leave such messages out",
                    "messages",
                )
            if message.tool_calls:
                calls = [call.shown() for call in message.tool_calls]
                entry["tool_calls"] = [{**call, "id": format_.adapts_id(call["id"])} for call in calls]
            if message.tool_call_id is not None:
                entry["tool_call_id"] = format_.adapts_id(message.tool_call_id)
        shown.append(entry)
    return shown


def shown_tools(body: WithTools, use: ToolUse | None) -> list[dict[str, Any]] | None:
    """The tools as chat templates expect them; None if the answer may call none."""
    return None if use is None else [tool.shown() for tool in body.tools]


class Told(NamedTuple):
    """What new text of an answer adds for its client."""

    content: str
    calls: list[ToolCallDelta]
    reasoning: str = ""


class Answering:
    """Divides one answer, as it grows, into its reasoning, its content and its calls.

    Args:
        use: None if it may hold no calls.
        reasoning: None if it holds no reasoning.
    """

    def __init__(self, use: ToolUse | None, reasoning: ReasoningParser | None = None) -> None:
        self._use = use
        self._parser = None if use is None else use.parser()
        self._reasoning = reasoning
        self.num_calls = 0

    def grown(self, text: str, *, is_last: bool) -> Told:
        """What the next text of the answer adds."""
        if self._parser is None and self._reasoning is None:
            return Told(text, [])
        thought, events = self.divided(text, is_last=is_last)
        return self._told(events)._replace(reasoning=thought)

    def divided(self, text: str, *, is_last: bool) -> tuple[str, list[Event]]:
        """What the next text adds to the reasoning, and what it adds behind that, in order."""
        thought, content = "", text
        if self._reasoning is not None:
            thought, content = self._reasoning.push(text)
            if is_last:
                rest = self._reasoning.flush()
                thought, content = thought + rest.reasoning, content + rest.content
        if self._parser is None:
            return thought, [Said(content)] if content else []
        events = self._parser.push(content)
        if is_last:
            events += self._parser.flush()
        return thought, events

    def make_id(self) -> str:
        """An id for a call, as the model's format has them."""
        assert self._use is not None
        return self._use.format.makes_id()

    def _told(self, events: Sequence[Event]) -> Told:
        content: list[str] = []
        calls: list[ToolCallDelta] = []
        for event in events:
            match event:
                case Said(text):
                    content.append(text)
                case Called(index, name):
                    self.num_calls += 1
                    function = FunctionDelta(name=name, arguments="")
                    calls.append(ToolCallDelta(index=index, id=self.make_id(), type="function", function=function))
                case Arguments(index, text):
                    if not calls or calls[-1].index != index:
                        calls.append(ToolCallDelta(index=index, function=FunctionDelta(arguments="")))
                    calls[-1].function.arguments += text
        return Told("".join(content), calls)


def end_of(end: End, num_calls: int) -> End:
    """Why an answer ended: `tool_calls` if it is complete and calls tools."""
    return "tool_calls" if num_calls and end is FinishReason.STOP else end


class Whole(NamedTuple):
    """A complete answer."""

    content: str
    calls: list[ToolCall]
    reasoning: str


def whole(answering: Answering, text: str) -> Whole:
    """A complete answer, which nothing of has been read before."""
    content, deltas, thought = answering.grown(text, is_last=True)
    calls = [
        ToolCall(
            id=delta.id or "",
            type="function",
            function=FunctionCall(name=delta.function.name or "", arguments=delta.function.arguments),
        )
        for delta in deltas
    ]
    return Whole(content, calls, thought)
