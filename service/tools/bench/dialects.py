"""The three routes that can be loaded: their bodies, and what an event of their streams says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec

from service.tools.bench.prompts import Prompt
from service.tools.bench.record import Counted

DONE = b"[DONE]"


class Told(NamedTuple):
    """What a server says of a request: tokens of the prompt, of these found in its prefix cache, and generated."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


class News(NamedTuple):
    """What one event says. num_tokens: that came with it; of OpenAI's routes 1, since those do not tell."""

    num_tokens: int = 0
    usage: Told | None = None
    error: str | None = None


class Dialect(Protocol):
    """One route."""

    path: str
    takes_ids: bool
    counted: Counted

    def body(self, prompt: Prompt, model: str | None) -> dict[str, Any]:
        """The request without its sampling parameters. model: or variant, by the route."""
        ...

    def read(self, event: bytes) -> News:
        """What an event says.

        Raises:
            msgspec.DecodeError: it is not of this route.
        """
        ...


class _Cached(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None

    def told(self, details: _Cached | None) -> Told:
        return Told(self.prompt_tokens, (details and details.cached_tokens) or 0, self.completion_tokens)


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Generated(msgspec.Struct, gc=False):
    token_ids: list[int] = []
    finish_reason: str | None = None
    usage: _Usage | None = None
    metrics: _Cached | None = None
    error: Any = None


_chunks, _generated = msgspec.json.Decoder(_Chunk), msgspec.json.Decoder(_Generated)


class Completions:
    """POST /v1/completions."""

    path, takes_ids, counted = "/v1/completions", True, Counted.USAGE

    def body(self, prompt: Prompt, model: str | None) -> dict[str, Any]:
        return {"model": model, "prompt": prompt.ids or prompt.text, **_STREAMED}

    def read(self, event: bytes) -> News:
        return _news(event, _brings_text)


class Chat:
    """POST /v1/chat/completions."""

    path, takes_ids, counted = "/v1/chat/completions", False, Counted.USAGE

    def body(self, prompt: Prompt, model: str | None) -> dict[str, Any]:
        return {"model": model, "messages": prompt.messages, **_STREAMED}

    def read(self, event: bytes) -> News:
        return _news(event, _brings_content)


class Generate:
    """POST /generate, ottava's own."""

    path, takes_ids, counted = "/generate", True, Counted.IDS

    def body(self, prompt: Prompt, model: str | None) -> dict[str, Any]:
        named = {} if model is None else {"variant": model}
        if prompt.ids:
            return {"prompt_ids": prompt.ids, "stream": True, **named}
        given = {"messages": prompt.messages} if prompt.is_conversation else {"prompt": prompt.text}
        return {**given, "stream": True, **named}

    def read(self, event: bytes) -> News:
        told = _generated.decode(event)
        if told.error is not None:
            return News(error=code_of(told.error))
        if told.usage is None and told.finish_reason is None:
            return News(len(told.token_ids))
        # The last event is the whole answer, whose ids came before.
        usage = told.usage
        return News(usage=None if usage is None else usage.told(told.metrics))


ROUTES: Mapping[str, Dialect] = {"completions": Completions(), "chat": Chat(), "generate": Generate()}

_TOKEN, _NOTHING = News(1), News()
_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def error_code(body: bytes) -> str:
    """The code of an error's body, or else its type; empty if there is neither."""
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return ""
    return code_of(found.get("error", found) if isinstance(found, dict) else found)


def code_of(error: object) -> str:
    """The code of an error object, or else its type; empty if there is neither."""
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


def error_message(body: bytes) -> str:
    """The message of an error's body, or its first characters."""
    try:
        found = msgspec.json.decode(body)
        error = found.get("error", found)
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, AttributeError, KeyError):
        return body[:200].decode(errors="replace")


def _news(event: bytes, brings: Callable[[_Choice], bool]) -> News:
    told = _chunks.decode(event)
    if told.error is not None:
        return News(error=code_of(told.error))
    usage, is_token = told.usage, False
    for choice in told.choices:
        is_token = is_token or brings(choice)
    if usage is None:
        return _TOKEN if is_token else _NOTHING
    return News(int(is_token), usage.told(usage.prompt_tokens_details))


def _brings_text(choice: _Choice) -> bool:
    # A token that is a part of a character has no text yet; the event that only tells the end has none either.
    return bool(choice.text) or choice.finish_reason is None


def _brings_content(choice: _Choice) -> bool:
    delta = choice.delta
    if delta is None:
        return False
    if delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls:
        return True
    # Many servers send the role before the first token, in an event of its own.
    return delta.content is not None and delta.role is None and choice.finish_reason is None
