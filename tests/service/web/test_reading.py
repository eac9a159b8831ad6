"""Bodies are read, and refused, as FastAPI reads and refuses them."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from service.web.app import ROUTERS
from service.web.failures import CountedRoute
from service.web.openai.requests import ChatRequest
from service.web.reading import direct_handler
from service.web.schemas.bodies import Body
from service.web.schemas.generate import GenerateRequest


class DirectRoute(APIRoute):
    def get_route_handler(self) -> Any:
        handler = direct_handler(self.endpoint)
        assert handler is not None
        return handler


async def chat(body: ChatRequest, http: HTTPRequest) -> Response:
    return JSONResponse([http.url.path, body.model_dump(mode="json")])


async def generate(body: GenerateRequest, http: HTTPRequest) -> Response:
    return JSONResponse([http.url.path, body.model_dump(mode="json")])


def app_with(route_class: type[APIRoute]) -> FastAPI:
    app = FastAPI()
    router = APIRouter(route_class=route_class)
    router.post("/chat")(chat)
    router.post("/generate")(generate)
    app.include_router(router)

    async def tell(_: HTTPRequest, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            return JSONResponse([repr(error.errors()), repr(error.body)], 422)
        assert isinstance(error, HTTPException)
        return JSONResponse([type(error.__cause__).__name__, str(error.__cause__)], error.status_code)

    app.add_exception_handler(RequestValidationError, tell)
    app.add_exception_handler(HTTPException, tell)
    return app


BODIES = {
    "right": b'{"prompt": "a", "messages": null}',
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "text": b'"a"',
    "number": b"7",
    "no json": b'{"prompt": ',
    "half": b'{"prompt": "a"} x',
    "unknown": b'{"promt": "a"}',
    "wrong type": b'{"prompt": 7, "messages": 8, "temperature": "hot"}',
    "out of range": b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "temperature": 3}',
    "deep place": b'{"messages": [{"role": "king", "content": "a"}, {"role": "user", "content": {"a": 1}}]}',
    "chat": b'{"messages": [{"role": "user", "content": "a"}], "stop": "x"}',
    "no utf-8": b'{"prompt": "\xff"}',
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "nested": b"[" * 100_000,
    "digits": b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}",
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "twice": b'{"prompt": "a", "prompt": "b"}',
}
TYPES = {
    "json": "application/json",
    "charset": "Application/JSON; charset=utf-8",
    "kind of json": "application/problem+json",
    "text": "text/plain",
    "form": "application/x-www-form-urlencoded",
    "text json": "text/json",
    "broken": "json",
    "empty": "",
    "none": None,
}


@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize("body", BODIES)
def test_a_body_is_read_as_fastapi_reads_it(body: str, content_type: str) -> None:
    given = TYPES[content_type]

    async def answers(app: FastAPI) -> list[tuple[int, Any]]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            client.headers.pop("content-type", None)
            headers = {} if given is None else {"content-type": given}
            got = [await client.post(path, content=BODIES[body], headers=headers) for path in ("/chat", "/generate")]
        return [(answer.status_code, answer.json()) for answer in got]

    ours, theirs = (asyncio.run(answers(app_with(kind))) for kind in (DirectRoute, APIRoute))
    assert ours == theirs
    if (body, content_type) == ("right", "json"):
        assert [status for status, _ in ours] == [422, 200]


async def with_another(body: Body, http: HTTPRequest, serving: int) -> Response:
    raise NotImplementedError


async def without_body(http: HTTPRequest) -> Response:
    raise NotImplementedError


async def of_a_model(body: Body, http: HTTPRequest) -> Body:
    raise NotImplementedError


def test_the_routes_of_generations_are_read_directly() -> None:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, CountedRoute)]
    direct = {route.path for route in routes if direct_handler(route.endpoint) is not None}
    assert direct == {"/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"}


def test_what_a_route_depends_on_is_asked() -> None:
    def refuse() -> None:
        raise HTTPException(403)

    app = FastAPI()
    router = APIRouter(route_class=CountedRoute, dependencies=[Depends(refuse)])
    router.post("/generate")(generate)
    app.router.routes.extend(router.routes)
    app.state.serving = SimpleNamespace(metrics=SimpleNamespace(count=lambda *_: None))

    async def go() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as client:
            return (await client.post("/generate", json={"prompt": "a"})).status_code

    assert asyncio.run(go()) == 403


@pytest.mark.parametrize("endpoint", [with_another, without_body, of_a_model])
def test_other_endpoints_are_left_to_fastapi(endpoint: Any) -> None:
    assert direct_handler(endpoint) is None
