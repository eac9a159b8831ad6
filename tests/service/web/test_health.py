"""HEAD on the operators' routes, over a real connection: the server leaves the body out, not the application."""

import asyncio
from typing import Any

import httpx
import pytest

from service.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.harness import app_of, client_of, engines_of, server_of, two_engines, until

PATHS = ("/health", "/ready", "/info", "/metrics")


def fetched(engines: dict[str, FakeEngine]) -> dict[str, tuple[httpx.Response, httpx.Response]]:
    """By path, the answers to GET and to HEAD."""

    async def go() -> dict[str, tuple[httpx.Response, httpx.Response]]:
        app = app_of(engines)
        async with server_of(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            failing = [engine for engine in engines.values() if engine.failure is not None]
            await until(lambda: len(app.state.serving.failures()) == len(failing))
            return {path: (await client.get(path), await client.head(path)) for path in PATHS}

    return asyncio.run(go())


@pytest.mark.parametrize("path", PATHS)
def test_head_gives_the_status_and_headers_of_get(path: str) -> None:
    get, head = fetched(two_engines())[path]
    assert (get.status_code, head.status_code, head.content) == (200, 200, b"")
    assert get.content
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_tells_that_an_engine_has_failed() -> None:
    engine = FakeEngine("w8a8")
    engine.fail(RuntimeError("x"))
    answers = fetched(engines_of(engine))
    assert [answers[path][1].status_code for path in ("/health", "/ready")] == [503, 503]


@pytest.mark.parametrize("path", ["/generate", "/requests/recent", "/admin/reload"])
def test_no_other_route_takes_it(path: str) -> None:
    async def go() -> int:
        async with server_of(app_of(two_engines())) as port, httpx.AsyncClient() as client:
            return (await client.head(f"http://127.0.0.1:{port}{path}")).status_code

    assert asyncio.run(go()) == 405


def test_info_has_every_limit_of_a_request() -> None:
    """Those of the settings under their names; each setting that limits a request is among them."""

    async def go() -> dict[str, Any]:
        async with client_of(app_of(two_engines(), max_prompt_tokens=77, max_mask_ms=5.5)) as client:
            answer = (await client.get("/info")).json()
            assert isinstance(answer, dict)
            return answer

    info = asyncio.run(go())
    limits = info["limits"]
    assert info["rows"] == Settings().max_num_requests
    assert (limits["max_prompt_tokens"], limits["max_mask_ms"], limits["max_tokens_limit"]) == (77, 5.5, None)
    assert (limits["max_logprobs"], limits["max_choices"]) == (1 << 18, 128)
    names = list(Settings.model_fields)
    of_requests = names[names.index("max_prompt_tokens") : names.index("host")]
    assert set(of_requests) <= set(limits)
