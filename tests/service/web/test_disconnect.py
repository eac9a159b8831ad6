"""Clients that leave, over a real socket: what they asked for is freed, the others notice nothing."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping

import httpx
import pytest
from starlette.types import Message

from service.text.tools.hermes import HERMES
from service.web.generation import compiling
from service.web.generation.sse import EventStream
from tests.service.kinds import Samples
from tests.support.fake_engine import ByteTokenizer, FakeEngine
from tests.support.harness import DEADLINE_S, app_of, metrics_of, server_of, total, two_engines, until
from tests.support.raw_client import leave_raw, open_raw


def _is_free(engines: Mapping[str, FakeEngine]) -> bool:
    return not any(engine.active for engine in engines.values())


USER = [{"role": "user", "content": "a"}]
BODIES: dict[str, dict[str, object]] = {
    "/generate": {"prompt": "a", "max_tokens": 60},
    "/v1/responses": {"input": "a", "max_output_tokens": 50},
    "/v1/messages": {"messages": USER, "max_tokens": 60},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("delay_s", [0.01, 60.0])
def test_a_client_that_leaves_frees_its_request(path: str, stream: bool, delay_s: float) -> None:
    """delay_s 60: it leaves before the first token, when nothing is ever sent to it."""

    async def go() -> tuple[FakeEngine, Samples, int]:
        engines = two_engines(delay_s=delay_s)
        app = app_of(engines)
        async with server_of(app) as port:
            body = {**BODIES[path], "stream": stream, "ignore_eos": True}
            reader, writer = await open_raw(port, body, path)
            await until(lambda: bool(engines["w8a8"].submitted))
            if stream and delay_s < 1:
                assert b"data: " in await reader.readuntil(b"data: ")
            await leave_raw(writer)
            await until(lambda: _is_free(engines))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                samples = await metrics_of(client)
        return engines["w8a8"], samples, app.state.serving.traffic.num_active

    engine, samples, num_active = asyncio.run(go())
    assert [request.finish_reason for request in engine.freed] == ["abort"]
    assert samples["ottava_requests_total", "outcome=abort", "variant=w8a8"] == 1
    assert total(samples, "ottava_requests_total") == 1
    assert samples["ottava_kv_cache_usage_ratio", "variant=w8a8"] == 0
    assert num_active == 0


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_during_the_baseline_frees_it_too(stream: bool) -> None:
    async def go() -> dict[str, FakeEngine]:
        engines = two_engines()
        engines["fp16"].delay_s = 60.0
        app = app_of(engines)
        async with server_of(app) as port:
            _, writer = await open_raw(port, {"prompt": "a", "stream": stream, "compare": True})
            await until(lambda: bool(engines["fp16"].submitted))
            await leave_raw(writer)
            await until(lambda: _is_free(engines))
        return engines

    engines = asyncio.run(go())
    assert engines["w8a8"].freed[0].finish_reason == "stop"
    assert engines["fp16"].freed[0].finish_reason == "abort"


def test_a_third_leaves_and_the_others_are_answered_right() -> None:
    async def go() -> Samples:
        engines = two_engines(delay_s=0.01, reply=lambda ids, params: bytes(ids).decode()[::-1] * 2)
        async with (
            server_of(app_of(engines)) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S) as client,
        ):

            async def one(n: int) -> None:
                body = {"prompt": f"request {n}", "stream": n % 2 == 0}
                if n % 3 == 0:
                    _, writer = await open_raw(port, body)
                    await asyncio.sleep(0.02 + n * 0.001)
                    await leave_raw(writer)
                    return
                response = await client.post("/generate", json=body)
                text = response.text.split("data: ")[-2] if body["stream"] else response.text
                assert json.loads(text)["text"] == f"request {n}"[::-1] * 2

            await asyncio.gather(*(one(n) for n in range(60)))
            await until(lambda: _is_free(engines))
            return await metrics_of(client)

    samples = asyncio.run(go())
    counts = {key[1:]: value for key, value in samples.items() if key[0] == "ottava_requests_total" and value}
    assert counts == {("outcome=stop", "variant=w8a8"): 40, ("outcome=abort", "variant=w8a8"): 20}


def test_the_stream_is_sent_step_by_step() -> None:
    async def go() -> list[float]:
        async with server_of(app_of(two_engines(delay_s=0.05))) as port:
            reader, writer = await open_raw(port, {"prompt": "a", "stream": True})
            loop = asyncio.get_running_loop()
            times = []
            while b"[DONE]" not in (line := await reader.readline()):
                if line.startswith(b"data: "):
                    times.append(loop.time())
            await leave_raw(writer)
            return times

    times = asyncio.run(go())
    assert len(times) == 7
    assert times[5] - times[0] > 0.2


def test_events_that_piled_up_stop_at_a_disconnect() -> None:
    """All events are there at once, so that sending never waits: the disconnect must still get its turn."""
    sent: list[Message] = []

    async def events() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b"data: {}\n\n"

    async def receive() -> Message:
        await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    closed: list[bool] = []
    stream = EventStream(events(), lambda: closed.append(True))
    asyncio.run(stream({"type": "http"}, receive, send))
    assert len(sent) < 5000
    assert closed == [True]


HELD: dict[str, dict[str, object]] = {
    "/generate": {
        "messages": USER,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "required",
    },
    "/v1/completions": {"prompt": "a", "guided_regex": "a"},
    "/v1/chat/completions": {"messages": USER, "response_format": {"type": "json_object"}},
    "/v1/responses": {"input": "a", "text": {"format": {"type": "json_object"}}},
    "/v1/messages": {
        "messages": USER,
        "max_tokens": 9,
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    },
}


@pytest.mark.parametrize("path", HELD)
def test_a_client_that_leaves_while_its_grammar_is_compiled_is_no_fault(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[str] = []

    async def compile_for_ever(*_: object) -> None:
        events.append("begun")
        try:
            await asyncio.sleep(DEADLINE_S)
        finally:
            events.append("ended")

    monkeypatch.setattr(compiling, "_compile", compile_for_ever)

    async def go() -> Samples:
        app = app_of(two_engines(), tokenizer=ByteTokenizer(HERMES))
        async with server_of(app) as port:
            _, writer = await open_raw(port, HELD[path], path)
            await until(lambda: bool(events))
            await leave_raw(writer)
            await until(lambda: events == ["begun", "ended"])
            await until(lambda: app.state.serving.traffic.num_active == 0)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                return await metrics_of(client)

    samples = asyncio.run(go())
    assert total(samples, "ottava_requests_total") == 0
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
