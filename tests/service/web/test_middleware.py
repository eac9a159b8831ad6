"""What stands around every answer: ids, security headers, CORS, and an answer to a fault of ours."""

import asyncio
from typing import Any, Never

import httpx
import pytest
from fastapi import FastAPI

from service.errors import InvalidSettings
from service.settings import load_settings
from service.web.middleware.envelope import SECURITY_HEADERS
from tests.support.fake_engine import FakeEngine
from tests.support.harness import app_of, client_of, engines_of, two_engines

SITE, STRANGER = "https://chat.example.org", "https://evil.example.org"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


def answer(
    method: str, path: str, headers: dict[str, str] | None = None, app: FastAPI | None = None, **settings: Any
) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client_of(app or app_of(two_engines(), **settings)) as client:
            body = {"prompt": "a"} if method == "POST" else None
            return await client.request(method, path, headers=headers, json=body)

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/generate", 200),
        ("GET", "/metrics", 200),
        ("GET", "/docs", 200),
        ("GET", "/nowhere", 404),
        ("GET", "/generate", 405),
    ],
)
def test_every_answer_has_the_security_headers_and_an_id(method: str, path: str, status: int) -> None:
    response = answer(method, path)
    assert response.status_code == status
    assert {name: response.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    assert response.headers["x-request-id"]


def test_a_route_keeps_its_own_policy() -> None:
    policies = answer("GET", "/").headers.get_list("content-security-policy")
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert "frame-ancestors 'none'" in policies[0]


def test_a_fault_has_them_too() -> None:
    def explode(*_: object) -> Never:
        raise RuntimeError("secret")

    app = app_of(engines_of(FakeEngine("w8a8")), cors_origins=SITE)
    app.state.serving.engines["w8a8"].submit = explode
    response = answer("POST", "/generate", {"origin": SITE}, app)
    assert response.status_code == 500
    assert {name: response.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    assert response.headers["access-control-allow-origin"] == SITE
    assert "secret" not in response.text


def test_cors_is_off_by_default() -> None:
    response = answer("POST", "/generate", {"origin": SITE})
    assert not [name for name in response.headers if name.startswith("access-control")]
    response = answer("OPTIONS", "/generate", {"origin": SITE, **PREFLIGHT})
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_cors_lets_the_named_origins_in_and_no_other() -> None:
    settings: dict[str, Any] = {"cors_origins": f"{SITE}, https://other.example.org", "api_keys": "alice:0123456789"}
    allowed = answer("OPTIONS", "/generate", {"origin": SITE, **PREFLIGHT}, **settings)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == SITE
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in allowed.headers
    refused = answer("OPTIONS", "/generate", {"origin": STRANGER, **PREFLIGHT}, **settings)
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    for origin, expected in ((SITE, SITE), (STRANGER, None)):
        response = answer("POST", "/generate", {"origin": origin, "authorization": "Bearer 0123456789"}, **settings)
        assert response.status_code == 200
        assert response.headers.get("access-control-allow-origin") == expected
    unauthorized = answer("POST", "/generate", {"origin": SITE}, **settings)
    assert unauthorized.status_code == 401
    assert unauthorized.headers["access-control-allow-origin"] == SITE
    assert "x-request-id" in unauthorized.headers["access-control-expose-headers"].lower()


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://a b", "ftp://x", "null"])
def test_what_is_no_origin_is_refused_at_start(origin: str) -> None:
    with pytest.raises(InvalidSettings, match="is no origin"):
        load_settings(cors_origins=origin)
    assert load_settings(cors_origins="*,http://localhost:3000").cors_origins == ("*", "http://localhost:3000")
