"""The HTTP client of `ottava chat`: a conversation with a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from service.errors import ChatError
from service.web.keys import is_loopback
from service.web.schemas.generate import Delta, GenerateResponse

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 660.0
"""Above the server's default timeout of 600 s, because the server's error says more than a timeout here."""

DATA = "data: "
END = "[DONE]"
MAX_SHOWN = 200


def open_client(url: str, api_key: str | None) -> httpx.Client:
    """An HTTP client for the server at url.

    Raises:
        ChatError: url is not an http or https address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ChatError(f"url {url!r} is no address of a server; write it as http://127.0.0.1:8000")
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
    # A proxy from the environment cannot reach this machine's loopback.
    return httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=not is_loopback(parts.hostname))


class Chat:
    """One conversation. variant: None for the server's default. Only complete answers are added to it."""

    def __init__(self, client: httpx.Client, system: str | None, variant: str | None, compare: bool, **sampling: Any):
        """sampling: fields of POST /generate; None for the server's default."""
        self.variant = variant
        self.compare = compare
        self._client = client
        self._system = system
        self._sampling = sampling
        self._turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Remove all turns; the system message stays."""
        self._turns.clear()

    def info(self) -> dict[str, Any]:
        """The answer to GET /info. Raises ChatError as `ask`."""
        with _reachable(self._client):
            response = self._client.get("/info")
            _refuse(response)
            served: dict[str, Any] = response.json()
        return served

    def ask(self, question: str) -> Iterator[Delta | GenerateResponse]:
        """Yield the pieces of an answer, then the baseline's if comparing, and last the whole answer.

        Raises:
            ChatError: no server answers, it refuses the request, or its answer is cut off.
        """
        turns = [*self._turns, {"role": "user", "content": question}]
        with (
            _reachable(self._client),
            self._client.stream("POST", "/generate", json=self._body(turns)) as response,
        ):
            _refuse(response)
            for event in _events(response):
                item = _item(event)
                if isinstance(item, GenerateResponse):
                    self._turns = [*turns, {"role": "assistant", "content": item.text}]
                yield item

    def _body(self, turns: list[dict[str, str]]) -> dict[str, Any]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        chosen = {"variant": self.variant, **self._sampling}
        given = {name: value for name, value in chosen.items() if value is not None}
        return {"messages": [*system, *turns], "stream": True, "compare": self.compare, **given}


@contextmanager
def _reachable(client: httpx.Client) -> Iterator[None]:
    url = str(client.base_url).rstrip("/")
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ChatError(
            f"no server answers at {url} ({error or 'timed out'}): start one with `ottava serve`, or say where it is "
            "with --url"
        ) from error
    except httpx.HTTPError as error:
        raise ChatError(f"the connection to {url} broke off ({error or type(error).__name__}); ask again") from error


def _refuse(response: httpx.Response) -> None:
    """Raise ChatError with the server's message if the response is an error."""
    if response.is_success:
        return
    text = response.read().decode(errors="replace")
    raise ChatError(f"the server answered {response.status_code}: {_message(text)}")


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        # Not an ottava server, or a proxy in front of it.
        return f"{text[:MAX_SHOWN]!r}, which is no answer of ottava; is --url right?"


def _events(response: httpx.Response) -> Iterator[str]:
    """The data of each server-sent event, up to the one that marks the answer as complete."""
    for line in _lines(response):
        if line == DATA + END:
            return
        if line.startswith(DATA):
            yield line.removeprefix(DATA)
    raise ChatError("the answer broke off: the server closed the connection before its end; ask again")


def _lines(response: httpx.Response) -> Iterator[str]:
    """The complete lines. httpx's own reader also ends a line at U+2028 and others that may be part of an answer."""
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode(errors="replace")


def _item(event: str) -> Delta | GenerateResponse:
    try:
        fields = json.loads(event)
        if "error" in fields:
            raise ChatError(f"the server gave up: {_message(event)}")
        return GenerateResponse.model_validate(fields) if "metrics" in fields else Delta.model_validate(fields)
    except (ValueError, ValidationError) as error:
        raise ChatError(f"{event[:MAX_SHOWN]!r} is no event of ottava; is --url right?") from error
