"""Engine and web as two processes: what becomes of everyone where one of them dies, hangs, or never starts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from benchmarks.processes import children, is_running
from service.busy_poll import PollingEventLoop
from service.host.channel.process import ProcessLink
from service.settings import Settings
from service.web.app import create_app
from tests.service.kinds import Samples
from tests.support.harness import DEADLINE_S, events_of, host_of, metrics_of, server_of, total, until, until_ready
from tests.support.narrowed import present

ROOT = Path(__file__).parents[4]


def app_of(options: dict[str, object] | None = None, **settings: Any) -> FastAPI:
    """An app whose scripted engines run in a process of their own."""
    given = Settings(**settings)
    command = (sys.executable, "-m", "tests.support.engine_child", json.dumps(options or {}))
    return create_app(host_of(ProcessLink(given, command), dict.fromkeys(given.variants), given), given)


def engine_pid(app: FastAPI) -> int:
    pid: int = app.state.serving.host._link._process.pid
    return pid


def client_at(port: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S, limits=limits)


def body_of(num_tokens: int, **more: object) -> dict[str, object]:
    return {"prompt": "x", "max_tokens": num_tokens, "ignore_eos": True, **more}


async def told(client: httpx.AsyncClient, body: dict[str, object]) -> list[dict[str, Any]]:
    """The events of a stream."""
    return events_of(await client.post("/generate", json=body | {"stream": True}))


@pytest.mark.parametrize("busy_poll_ms", [0, 40])
def test_requests_are_served_by_processes_that_poll_and_by_those_that_sleep(busy_poll_ms: float) -> None:
    """One request after the other, some after a longer pause than a process polls; then both variants at once."""

    async def go() -> list[Any]:
        app = app_of({"step_s": 0.001}, variants="w8a8,fp16", busy_poll_ms=busy_poll_ms)
        async with server_of(app) as port, client_at(port) as client:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, PollingEventLoop)
            assert loop.busy_poll_s == busy_poll_ms / 1e3
            answers = []
            for pause_s in (0.0, 0.0, 0.02, 0.1, 0.0):
                await asyncio.sleep(pause_s)
                answers.append(await client.post("/generate", json=body_of(20)))
            bodies = [body_of(30) | {"variant": variant} for variant in ("w8a8", "fp16") * 5]
            answers += await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))
            assert [answer.status_code for answer in answers] == [200] * 15
            return [answer.json()["text"] for answer in answers]

    with asyncio.Runner(loop_factory=PollingEventLoop) as runner:
        texts = runner.run(go())
    assert len(set(texts[:5])) == 1
    assert len(set(texts[5:])) == 1
    assert len(texts[0]) == 20


def test_an_engine_that_is_killed_is_started_again_and_everyone_is_told(tmp_path: Path) -> None:
    """50 streams run and 10 wait: those are told before there is another process, these are served by it."""
    gate = tmp_path / "gate"
    gate.touch()

    async def go() -> tuple[
        list[list[dict[str, Any]]],
        httpx.Response,
        httpx.Response,
        httpx.Response,
        list[httpx.Response],
        httpx.Response,
        int,
        int,
        Samples,
    ]:
        app = app_of({"step_s": 0.02, "rows": 50, "gate": str(gate)}, variants="w8a8")
        async with server_of(app) as port, client_at(port) as client:
            running = [asyncio.ensure_future(told(client, body_of(2000))) for _ in range(50)]
            engine = app.state.serving.engines["w8a8"]
            await until(lambda: engine.stats().num_running == 50)
            waiting = [asyncio.ensure_future(client.post("/generate", json=body_of(5))) for _ in range(10)]
            await until(lambda: engine.stats().num_waiting == 10)
            old = engine_pid(app)
            gate.unlink()
            os.kill(old, signal.SIGKILL)
            ended = await asyncio.gather(*running)
            health, ready = await client.get("/health"), await client.get("/ready")
            late = await client.post("/generate", json=body_of(5))
            gate.touch()
            served = await asyncio.gather(*waiting)
            again = await client.get("/ready")
            return ended, health, ready, late, served, again, old, engine_pid(app), await metrics_of(client)

    ended, health, ready, late, served, again, old, new, samples = asyncio.run(go())
    for events in ended:
        assert events[-1]["error"]["code"] == "engine_failed"
        assert "started again" in events[-1]["error"]["message"]
    assert (health.status_code, ready.status_code) == (200, 503)
    assert ready.json()["variants"]["w8a8"] in ("starting the engine", "loading nothing")
    assert (late.status_code, late.json()["error"]["code"]) == (503, "not_ready")
    assert [response.json()["text"] for response in served] == ["ABCDE"] * 10
    assert again.status_code == 200
    assert old != new
    assert not is_running(old)
    assert samples["ottava_engine_restarts_total", "variant=w8a8"] == 1
    assert samples["ottava_requests_total", "outcome=error", "variant=w8a8"] == 50
    assert samples["ottava_requests_total", "outcome=length", "variant=w8a8"] == 10
    assert samples["ottava_requests_total", "outcome=rejected", "variant=w8a8"] == 1
    assert samples["ottava_num_requests_running", "variant=w8a8"] == 0
    assert samples["ottava_num_requests_waiting", "variant=w8a8"] == 0
    assert samples["ottava_kv_cache_usage_ratio", "variant=w8a8"] == 0
    assert total(samples, "ottava_step_batch_size_count") > 0


def test_a_client_that_leaves_while_the_engine_is_started_again_costs_nobody(tmp_path: Path) -> None:
    """Two run and three wait; one of these goes while there is no engine, which the next one must not hear of."""
    gate = tmp_path / "gate"
    gate.touch()

    async def go() -> tuple[list[httpx.Response], httpx.Response, Samples]:
        app = app_of({"step_s": 0.02, "rows": 2, "gate": str(gate)}, variants="w8a8")
        async with server_of(app) as port, client_at(port) as client:
            running = [asyncio.ensure_future(told(client, body_of(2000))) for _ in range(2)]
            engine = app.state.serving.engines["w8a8"]
            await until(lambda: engine.stats().num_running == 2)
            waiting = [asyncio.ensure_future(client.post("/generate", json=body_of(5))) for _ in range(3)]
            await until(lambda: engine.stats().num_waiting == 3)
            old = engine_pid(app)
            gate.unlink()
            os.kill(old, signal.SIGKILL)
            await asyncio.gather(*running)
            await until(lambda: engine_pid(app) != old)
            waiting[0].cancel()
            await until(lambda: engine.stats().num_waiting == 2)
            assert not app.state.serving.is_ready
            gate.touch()
            served = await asyncio.gather(*waiting[1:])
            return served, await client.post("/generate", json=body_of(5)), await metrics_of(client)

    served, after, samples = asyncio.run(go())
    assert [response.json()["text"] for response in [*served, after]] == ["ABCDE"] * 3
    assert samples["ottava_requests_total", "outcome=abort", "variant=w8a8"] == 1
    assert samples["ottava_num_requests_waiting", "variant=w8a8"] == 0


def test_an_engine_that_cannot_read_what_it_is_sent_is_replaced() -> None:
    async def go() -> tuple[int, int, httpx.Response]:
        app = app_of(variants="w8a8")
        async with server_of(app) as port, client_at(port) as client:
            old = engine_pid(app)
            app.state.serving.host._link.send({"no": "message"})
            await until(lambda: not app.state.serving.is_ready)
            await until(lambda: app.state.serving.is_ready)
            return old, engine_pid(app), await client.post("/generate", json=body_of(5))

    old, new, response = asyncio.run(go())
    assert old != new
    assert not is_running(old)
    assert response.json()["text"] == "ABCDE"


def test_it_is_started_again_as_often_as_the_settings_allow_and_then_fails_for_good() -> None:
    async def go() -> tuple[httpx.Response, httpx.Response]:
        app = app_of(variants="w8a8", engine_restarts=1)
        async with server_of(app) as port, client_at(port) as client:
            host = app.state.serving.host
            os.kill(engine_pid(app), signal.SIGKILL)
            await until(lambda: not app.state.serving.is_ready)
            await until(lambda: app.state.serving.is_ready)
            os.kill(engine_pid(app), signal.SIGKILL)
            await until(host.failed.is_set)
            return await client.get("/health"), await client.post("/generate", json=body_of(5))

    health, refused = asyncio.run(go())
    assert health.status_code == 503
    assert "SIGKILL" in health.json()["variants"]["w8a8"]
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "engine_failed")


@pytest.mark.parametrize("options", [{"hang_at": 3}, {"poison_at": 3}], ids=["a step that hangs", "a lost GPU"])
def test_a_process_that_cannot_go_on_is_replaced(options: dict[str, object]) -> None:
    async def go() -> tuple[httpx.Response, httpx.Response, bool]:
        app = app_of(options, variants="w8a8", step_timeout_s=2)
        async with server_of(app) as port, client_at(port) as client:
            old = engine_pid(app)
            lost = await client.post("/generate", json=body_of(50))
            await until(lambda: engine_pid(app) != old and app.state.serving.is_ready)
            return lost, await client.post("/generate", json=body_of(2)), not is_running(old)

    lost, served, is_old_gone = asyncio.run(go())
    assert (lost.status_code, lost.json()["error"]["code"]) == (500, "engine_failed")
    assert "secret" not in lost.text
    assert served.json()["text"] == "AB"
    assert is_old_gone


def test_the_start_can_be_watched(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    stages = {"starting the engine", "loading nothing"}

    async def go() -> int:
        app = app_of({"gate": str(gate)}, variants="w8a8")
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                seen: set[str] = set()
                end_s = time.monotonic() + DEADLINE_S
                while not stages <= seen:
                    assert time.monotonic() < end_s, seen
                    health, ready = await client.get("/health"), await client.get("/ready")
                    assert (health.status_code, ready.status_code) == (200, 503)
                    seen.add(ready.json()["variants"]["w8a8"])
                    refusals = [await client.get("/info"), await client.post("/generate", json=body_of(1))]
                    assert {r.status_code for r in refusals} == {503}
                    await asyncio.sleep(0.02)
                gate.touch()
                await until(lambda: app.state.serving.is_ready)
                return (await client.get("/ready")).status_code

    assert asyncio.run(go()) == 200


WEB = """
import asyncio, json, sys
from service.web import server
from tests.service.host.channel.test_process import app_of
from service.settings import Settings

app = app_of({"step_s": 0.01}, variants="w8a8", port=%d)
sys.exit(server.run(app, Settings(variants="w8a8", port=%d)))
"""


def test_a_web_that_is_killed_leaves_no_engine() -> None:
    port = 18423 + os.getpid() % 1000
    web = subprocess.Popen([sys.executable, "-c", WEB % (port, port)], stderr=subprocess.PIPE, cwd=ROOT)

    async def running() -> int:
        async with client_at(port) as client:
            await until_ready(client, web)
            asked = [asyncio.ensure_future(client.post("/generate", json=body_of(3000))) for _ in range(8)]
            await asyncio.sleep(0.3)
            (engine,) = children(web.pid)
            web.kill()
            await asyncio.gather(*asked, return_exceptions=True)
            return engine

    try:
        engine = asyncio.run(running())
        killed_s = time.monotonic()
        while is_running(engine) and time.monotonic() < killed_s + DEADLINE_S:
            time.sleep(0.02)
        assert not is_running(engine)
    finally:
        web.kill()
        web.wait()
        present(web.stderr).close()
