"""The names that a server answers to: a web page cannot reach it by a name of its own (DNS rebinding)."""

import asyncio
from typing import Any

import httpx
import pytest

from service.errors import InvalidSettings
from service.settings import load_settings
from tests.support.fake_engine import FakeRequest
from tests.support.harness import app_of, client_of, server_of, two_engines

KEY = "a-key-for-the-tests"


def get(name: str | None, path: str = "/health", **settings: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client_of(app_of(two_engines(), **settings)) as client:
            request = client.build_request("GET", path)
            if name is None:
                del request.headers["host"]
            else:
                request.headers["host"] = name
            return await client.send(request)

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("name", "settings", "status"),
    [
        ("localhost", {}, 200),
        ("LocalHost:8000", {}, 200),
        ("127.0.0.1:8000", {}, 200),
        ("[::1]:8000", {}, 200),
        ("[::1]", {"host": "::1"}, 200),
        ("127.0.0.2:80", {"host": "127.0.0.2"}, 200),
        ("[0:0:0:0:0:0:0:1]", {"host": "0:0:0:0:0:0:0:1"}, 200),
        # A probe of HTTP/1.0; no browser leaves it out.
        (None, {}, 200),
        ("evil.example", {}, 421),
        ("evil.example:8000", {}, 421),
        ("localhost.evil.example", {}, 421),
        ("evil.example#localhost", {}, 421),
        ("localhost:8000:evil", {}, 421),
        ("127.0.0.2", {}, 421),
        ("[::1", {}, 421),
        ("::1", {}, 421),
        ("", {}, 421),
        ("0.0.0.0", {}, 421),
        # Elsewhere and behind keys every name is good, unless some are named.
        ("evil.example", {"api_keys": KEY}, 200),
        ("evil.example", {"host": "0.0.0.0", "allow_anonymous": True}, 200),
        ("evil.example", {"allowed_hosts": "*"}, 200),
        ("llm.example:443", {"allowed_hosts": "LLM.example,other.example"}, 200),
        ("evil.example", {"allowed_hosts": "llm.example"}, 421),
        ("evil.example", {"allowed_hosts": "llm.example", "api_keys": KEY}, 421),
        ("evil.example", {"allowed_hosts": "llm.example", "host": "0.0.0.0", "api_keys": KEY}, 421),
        ("llm.example", {"allowed_hosts": "llm.example", "host": "0.0.0.0", "api_keys": KEY}, 200),
        ("localhost", {"allowed_hosts": "llm.example", "host": "0.0.0.0", "api_keys": KEY}, 200),
    ],
)
def test_who_answers_to_which_name(name: str | None, settings: dict[str, Any], status: int) -> None:
    assert get(name, **settings).status_code == status


@pytest.mark.parametrize("path", ["/", "/generate", "/metrics", "/nowhere"])
def test_a_wrong_name_is_told_everywhere(path: str) -> None:
    response = get("evil.example:8000", path)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (421, "unknown_host", None)
    for word in ("'evil.example:8000'", "localhost, 127.0.0.1, [::1]", "--allowed-hosts"):
        assert word in error["message"]
    assert response.headers["x-request-id"]
    assert "access-control-allow-origin" not in response.headers


def test_a_long_name_is_not_sent_back_whole() -> None:
    assert len(get("x" * 10_000).text) < 500


def test_nothing_of_a_refused_request_runs() -> None:
    async def go() -> tuple[httpx.Response, list[list[FakeRequest]]]:
        engines = two_engines()
        async with client_of(app_of(engines, cors_origins="*")) as client:
            headers = {"host": "evil.example", "origin": "http://evil.example"}
            answer = await client.post("/generate", json={"prompt": "a"}, headers=headers)
            return answer, [engine.submitted for engine in engines.values()]

    response, submitted = asyncio.run(go())
    assert response.status_code == 421
    assert submitted == [[], []]


def test_over_a_real_socket() -> None:
    async def go() -> list[int]:
        async with server_of(app_of(two_engines())) as port, httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{port}/ready"
            return [(await client.get(url, headers=headers)).status_code for headers in ({}, {"host": "evil.example"})]

    assert asyncio.run(go()) == [200, 421]


@pytest.mark.parametrize("name", ["http://llm.example", "llm.example:8000", "*.example", "llm.example/", "a b"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InvalidSettings, match=r"is no host name; write it without scheme and port"):
        load_settings(allowed_hosts=name)
