"""Puts a conversation that was sent in small items together as the messages of a chat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from service.errors import InvalidRequest
from service.web.openai.requests import ChatMessage
from service.web.schemas.tools import PastCall

Role = Literal["system", "developer", "user", "assistant", "tool"]
Speaker = Literal["system", "developer", "user", "assistant"]
PARAGRAPH = "\n\n"
INSTRUCTORS = ("system", "developer")


@dataclass(slots=True)
class _Draft:
    role: Role
    content: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[PastCall] = field(default_factory=list)
    call_id: str | None = None

    def message(self) -> ChatMessage:
        beside: dict[str, Any] = {}
        if self.thoughts:
            beside["reasoning_content"] = PARAGRAPH.join(self.thoughts)
        if self.calls:
            beside["tool_calls"] = self.calls
        if self.call_id is not None:
            beside["tool_call_id"] = self.call_id
        return ChatMessage(role=self.role, content=PARAGRAPH.join(self.content), **beside)


class Turns:
    """A conversation that grows.

    What the assistant thinks, says and calls, in this order, becomes one message. So do messages of the user, or of
    system and developer, that follow one another: many chat templates want the roles to take turns.

    Args:
        takes_later_system: whether the template shows a system message after others; else the user says it.
    """

    def __init__(self, *, takes_later_system: bool) -> None:
        self._takes_later_system = takes_later_system
        self._drafts: list[_Draft] = []

    def say(self, role: Speaker, text: str) -> None:
        """Add a message."""
        is_first = all(draft.role in INSTRUCTORS for draft in self._drafts)
        if role in INSTRUCTORS and not (is_first or self._takes_later_system):
            role = "user"
        if role == "assistant":
            draft = self._assistant(goes_on=not self._last.calls)
        elif _alike(self._last.role, role):
            draft = self._last
        else:
            draft = self._begin(role)
        draft.content.append(text)

    def think(self, text: str | None) -> None:
        """Add reasoning of the assistant. None, or an empty text, is none."""
        if text:
            self._assistant(goes_on=not (self._last.content or self._last.calls)).thoughts.append(text)

    def call(self, call: PastCall) -> None:
        """Add a call by the assistant."""
        self._assistant(goes_on=True).calls.append(call)

    def answer(self, call_id: str, text: str) -> None:
        """Add a tool's answer to a call."""
        draft = self._begin("tool")
        draft.call_id = call_id
        draft.content.append(text)

    def messages(self) -> list[ChatMessage]:
        """The conversation so far.

        Raises:
            InvalidRequest: it has no message.
        """
        if not self._drafts:
            raise InvalidRequest("`messages` has nothing that is said; send a text of the user", "messages")
        return [draft.message() for draft in self._drafts]

    @property
    def _last(self) -> _Draft:
        """The last message; before the first one, an answer of a tool, which nothing goes on with."""
        return self._drafts[-1] if self._drafts else _Draft("tool")

    def _assistant(self, *, goes_on: bool) -> _Draft:
        """The assistant's message that is being put together; a new one unless that goes on."""
        return self._last if goes_on and self._last.role == "assistant" else self._begin("assistant")

    def _begin(self, role: Role) -> _Draft:
        self._drafts.append(_Draft(role))
        return self._drafts[-1]


def _alike(role: Role, other: Role) -> bool:
    return role == other == "user" or (role in INSTRUCTORS and other in INSTRUCTORS)
