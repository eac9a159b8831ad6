"""Log lines: one per request, with its times and without its text."""

import asyncio
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Never

import pytest

from service.settings import Settings
from service.telemetry.logs import configure_logging
from tests.support.fake_engine import ByteTokenizer, FakeEngine
from tests.support.harness import app_of, client_of, engines_of, server_of, two_engines
from tests.support.raw_client import leave_raw, open_raw

Asked = tuple[str, str, object, dict[str, Any]]
"""Method, path, body and headers."""
SECRET = "tell nobody that the cake is a lie"


@pytest.fixture
def stream() -> io.StringIO:
    """Where configure_logging writes."""
    return io.StringIO()


def served(
    stream: io.StringIO,
    requests: Sequence[Asked],
    engines: Mapping[str, FakeEngine] | None = None,
    tokenizer: ByteTokenizer | None = None,
    **settings: Any,
) -> str:
    """Every log line of (method, path, body, headers) sent to one app, as JSON."""
    settings = {"log_format": "json", **settings}

    async def go() -> None:
        app = app_of(engines or two_engines(), tokenizer=tokenizer, **settings)
        async with client_of(app) as client:
            configure_logging(Settings(**settings), stream)
            for method, path, body, headers in requests:
                await client.request(method, path, json=body, headers=headers)

    asyncio.run(go())
    # The client logs into the same root.
    return "".join(line for line in stream.getvalue().splitlines(True) if "httpx" not in line)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def access_lines(text: str) -> list[dict[str, Any]]:
    return [line for line in lines_of(text) if line["logger"] == "ottava.access"]


def test_a_generation_has_one_line_with_everything(stream: io.StringIO) -> None:
    headers = {"x-request-id": "abc-1", "authorization": "Bearer alice-012345"}
    text = served(stream, [("POST", "/generate", {"prompt": "hi"}, headers)], api_keys="alice:alice-012345")
    (line,) = access_lines(text)
    assert line["level"] == "INFO"
    expected = {"method": "POST", "route": "/generate", "status": 200, "key": "alice", "request_id": "abc-1"}
    expected |= {"variant": "w8a8", "outcome": "stop", "num_runs": 1, "prompt_tokens": 2, "generated_tokens": 6}
    assert {name: line[name] for name in expected} == expected
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["e2e_ms"] <= line["duration_ms"]
    assert line["message"].startswith("POST /generate 200 ")
    assert line["time"][:2] == "20"


def test_a_comparison_counts_both_runs(stream: io.StringIO) -> None:
    (line,) = access_lines(served(stream, [("POST", "/generate", {"prompt": "hi", "compare": True}, {})]))
    assert (line["num_runs"], line["generated_tokens"], line["variant"]) == (2, 12, "w8a8")


@pytest.mark.parametrize("streams", [False, True])
def test_no_text_of_prompt_or_answer_is_logged(stream: io.StringIO, streams: bool) -> None:
    requests: list[Asked] = [
        ("POST", "/generate", {"prompt": SECRET, "stream": streams}, {}),
        ("POST", "/generate", {"messages": [{"role": "user", "content": SECRET}], "stream": streams}, {}),
        ("POST", "/generate", {"prompt": SECRET, "temprature": 1}, {}),
        ("POST", "/generate", {"prompt": SECRET * 9}, {}),
        ("POST", "/generate", {"prompt": SECRET, "stop": 3}, {}),
        ("POST", "/generate?" + SECRET.replace(" ", "+"), {"prompt": SECRET}, {}),
    ]
    text = served(stream, requests, two_engines(reply="cake cake"), log_level="debug")
    assert len(access_lines(text)) == len(requests)
    assert "cake" not in text
    text = served(stream, requests[:1], two_engines(reply="cake cake", fail_at=3), log_level="debug")
    assert "engine_failed" in text or "failed" in text
    assert "cake" not in text


def test_the_text_is_logged_where_asked(stream: io.StringIO) -> None:
    body = {"prompt": "naïve?", "compare": True}
    (line,) = access_lines(
        served(stream, [("POST", "/generate", body, {})], two_engines(reply="so 😀"), log_prompts=True)
    )
    assert line["prompt"] == "naïve?"
    assert line["output"] == ["so 😀", "so 😀"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "route"),
    [
        ("POST", "/generate", {"prompt": 1}, 422, "/generate"),
        ("POST", "/generate", {"prompt": "x" * 64}, 400, "/generate"),
        ("GET", "/info", None, 200, "/info"),
        ("GET", "/page/none.css", None, 404, "/page/{name}"),
        ("GET", "/a/b/c", None, 404, "unknown"),
    ],
)
def test_every_request_has_one_line(
    stream: io.StringIO, method: str, path: str, body: dict[str, object] | None, status: int, route: str
) -> None:
    (line,) = access_lines(served(stream, [(method, path, body, {})]))
    assert (line["method"], line["status"], line["route"]) == (method, status, route)
    assert "variant" not in line


def test_probes_are_for_debugging_alone(stream: io.StringIO) -> None:
    requests: list[Asked] = [("GET", path, None, {}) for path in ("/health", "/ready", "/metrics")]
    assert access_lines(served(stream, requests)) == []
    lines = access_lines(served(stream, requests, log_level="debug"))
    assert [line["level"] for line in lines] == ["DEBUG"] * 3


def test_every_line_of_a_request_has_its_id(stream: io.StringIO) -> None:
    request = ("POST", "/generate", {"prompt": "a"}, {"x-request-id": "abc-2"})
    lines = lines_of(served(stream, [request], engines_of(FakeEngine("w8a8")), tokenizer=Exploding()))
    assert {line["logger"] for line in lines} >= {"ottava.access", "service.web.middleware.faults"}
    assert {line["request_id"] for line in lines} == {"abc-2"}
    assert "RuntimeError: oh" in next(line["exc_info"] for line in lines if "exc_info" in line)


class Exploding(ByteTokenizer):
    def encode(self, text: str, adds_special: bool = True) -> Never:
        raise RuntimeError("oh")


def test_an_id_cannot_forge_a_line(stream: io.StringIO) -> None:
    requests: list[Asked] = [
        ("GET", "/info", None, {"x-request-id": given})
        for given in (b"a\x0bb", b"a\x85b", b"x" * 200, b'1" status=500')
    ]
    lines = served(stream, requests, log_format="text").splitlines()
    assert len(lines) == 4
    assert all("INFO web ottava.access: GET /info 200 " in line for line in lines)
    assert lines[-1].endswith(r'request_id="1\" status=500"')
    assert not any("xxx" in line or "\x85" in line for line in lines)


def test_text_lines_are_readable(stream: io.StringIO) -> None:
    text = served(stream, [("POST", "/generate", {"prompt": "hi"}, {})], log_format="text")
    (line,) = [line for line in text.splitlines() if "ottava.access" in line]
    assert "INFO web ottava.access: POST /generate 200 duration_ms=" in line
    assert " variant=w8a8 outcome=stop num_runs=1 prompt_tokens=2 generated_tokens=6 " in line


def test_the_server_speaks_the_same_format_and_a_client_that_left_shows(stream: io.StringIO) -> None:
    async def go() -> None:
        engines = two_engines(delay_s=60)
        app = app_of(engines)
        configure_logging(Settings(log_format="json"), stream)
        async with server_of(app, log_level="info") as port:
            _, writer = await open_raw(port, {"prompt": "a"})
            while not engines["w8a8"].submitted:
                await asyncio.sleep(0.01)
            await leave_raw(writer)
            while engines["w8a8"].active:
                await asyncio.sleep(0.01)

    asyncio.run(go())
    lines = lines_of(stream.getvalue())
    assert "uvicorn.error" in {line["logger"] for line in lines}
    assert "uvicorn.access" not in {line["logger"] for line in lines}
    (line,) = access_lines(stream.getvalue())
    assert line["outcome"] == "abort"
    assert line["status"] in (None, 499)
