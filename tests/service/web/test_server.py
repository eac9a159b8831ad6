"""The life of the server: draining, engines that fail, and what the supervisor sees."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest

from service.web.server import FAILED
from tests.service.kinds import Samples
from tests.support.harness import DEADLINE_S, events_of, metrics_of, until, until_ready
from tests.support.life import LETTERS, Life
from tests.support.narrowed import present
from tests.support.scripted_runner import Hang, raising


def test_a_signal_drains_and_loses_nobody() -> None:
    """Eight run and four wait; whoever comes after the signal is refused, over the socket that still listens."""
    # Slow steps, so that the four requests below are answered before the first answer is done, on a busy machine too.
    life = Life(step_s=0.03)

    async def go() -> tuple[
        httpx.Response, httpx.Response, httpx.Response, httpx.Response, httpx.Response, list[httpx.Response]
    ]:
        async with life.run():
            asked = [life.ask(50, stream=i % 2 == 0, variant="w8a8") for i in range(12)]
            await life.running(8)
            before = await life.client.get("/ready")
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: life.app.state.serving.is_draining)
            refused = await life.client.post("/generate", json={"prompt": "x"})
            ready, health, metrics = [await life.client.get(path) for path in ("/ready", "/health", "/metrics")]
            assert not any(task.done() for task in asked)
            return before, refused, ready, health, metrics, await asyncio.gather(*asked)

    before, refused, ready, health, metrics, answers = asyncio.run(go())
    assert before.status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert (ready.status_code, health.status_code, metrics.status_code) == (503, 200, 200)
    assert ready.json()["variants"] == dict.fromkeys(("w8a8", "fp16"), "the server is stopping")
    for i, answer in enumerate(answers):
        text = events_of(answer)[-1]["text"] if i % 2 == 0 else answer.json()["text"]
        assert answer.status_code == 200
        assert text == LETTERS[:50]
        assert ("[DONE]" in answer.text) == (i % 2 == 0)
    assert life.server.exit_code == 0
    life.assert_empty()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_soon(number: signal.Signals) -> None:
    life = Life(drain_timeout_s=600)

    async def go() -> None:
        async with life.run():
            os.kill(os.getpid(), number)

    asyncio.run(go())
    assert life.server.exit_code == 0


def test_whoever_is_not_done_in_time_is_told() -> None:
    life = Life(drain_timeout_s=0.1)

    async def go() -> list[httpx.Response]:
        async with life.run():
            asked = [life.ask(800, stream=i % 2 == 0, ignore_eos=True) for i in range(12)]
            await life.running(8)
            await asyncio.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            return await asyncio.gather(*asked)

    answers = asyncio.run(go())
    for i, answer in enumerate(answers):
        if i % 2:
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            error = answer.json()["error"]
        else:
            assert "[DONE]" not in answer.text
            *deltas, last = events_of(answer)
            error = last["error"]
            if i < 8:
                assert "".join(delta["text"] for delta in deltas).startswith("ABC")
        assert error["code"] == "draining"
        assert "0.1 s after it had been told to" in error["message"]
    assert life.server.exit_code == 0
    life.assert_empty()


def test_an_engine_that_fails_for_good_ends_the_process_after_the_others_are_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    life = Life()
    life.runners["w8a8"].on_execute = raising(RuntimeError("secret"), 10)

    async def go() -> tuple[httpx.Response, ...]:
        async with life.run():
            other = life.ask(50, variant="fp16")
            lost = life.ask(50, variant="w8a8", stream=True)
            failed = await lost
            # The other is still running: the server drains.
            health, ready, late = (
                await life.client.get("/health"),
                await life.client.get("/ready"),
                await life.client.post("/generate", json={"prompt": "x", "variant": "fp16"}),
            )
            return failed, health, ready, late, await other

    failed, health, ready, late, other = asyncio.run(go())
    assert events_of(failed)[-1]["error"]["code"] == "engine_failed"
    assert "secret" not in failed.text
    assert (health.status_code, ready.status_code) == (503, 503)
    assert late.json()["error"]["code"] == "draining"
    assert other.json()["text"] == LETTERS[:50]
    assert life.server.exit_code == FAILED != 0
    life.assert_empty()


def test_an_operator_may_want_the_process_to_stay(caplog: pytest.LogCaptureFixture) -> None:
    life = Life(exit_on_failure=False)
    life.runners["w8a8"].on_read = raising(RuntimeError("gone"), 3)

    async def go() -> tuple[httpx.Response, list[httpx.Response], Samples]:
        async with life.run():
            failed = await life.ask(50, variant="w8a8")
            answers = [
                await life.client.get("/health"),
                await life.ask(5, variant="w8a8"),
                await life.ask(5, variant="fp16"),
            ]
            samples = await metrics_of(life.client)
            os.kill(os.getpid(), signal.SIGTERM)
            return failed, answers, samples

    failed, answers, samples = asyncio.run(go())
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_failed")
    assert [answer.status_code for answer in answers] == [503, 500, 200]
    assert answers[2].json()["text"] == LETTERS[:5]
    assert samples["ottava_engine_restarts_total", "variant=w8a8"] == 0
    assert life.server.exit_code == 0


def test_a_fault_costs_the_running_and_the_service_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    life = Life(engine_restarts=3)
    life.runners["w8a8"].on_execute = raising(RuntimeError("once"), 10)

    async def go() -> tuple[list[httpx.Response], httpx.Response, Samples]:
        async with life.run():
            answers = await asyncio.gather(*(life.ask(30) for _ in range(12)))
            health, samples = await life.client.get("/health"), await metrics_of(life.client)
            os.kill(os.getpid(), signal.SIGTERM)
            return answers, health, samples

    answers, health, samples = asyncio.run(go())
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [500] * 8
    assert all(answer.json()["text"] == LETTERS[:30] for answer in answers if answer.status_code == 200)
    assert health.status_code == 200
    assert samples["ottava_engine_restarts_total", "variant=w8a8"] == 1
    assert samples["ottava_kv_cache_usage_ratio", "variant=w8a8"] == 0
    life.assert_empty()


def test_a_stuck_step_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """The baseline's request stands behind the stuck step: it cannot finish, so it is ended instead of left hanging."""
    life = Life(step_timeout_s=0.3)
    hang = life.runners["w8a8"].on_execute = Hang(from_step=5)

    async def go() -> tuple[httpx.Response, httpx.Response]:
        async with life.run():
            answers = await asyncio.gather(life.ask(50, variant="w8a8"), life.ask(50, variant="fp16", stream=True))
            hang.release.set()
        return answers

    stuck, behind = asyncio.run(go())
    assert (stuck.status_code, stuck.json()["error"]["code"]) == (500, "engine_failed")
    assert events_of(behind)[-1]["error"]["code"] in ("draining", "engine_failed")
    assert life.server.exit_code == FAILED


PROGRAM = """
import sys
from service.web import server
from tests.support.narrowed import present
from tests.support.scripted_runner import Hang
from tests.support.life import Life

life = Life(step_s=0.02, port={port}, step_timeout_s=3, drain_timeout_s=600)
{more}
sys.exit(server.run(life.app, life.settings))
"""


@asynccontextmanager
async def process(more: str = "") -> AsyncIterator[tuple[subprocess.Popen[bytes], httpx.AsyncClient]]:
    """`server.run` in a process of its own, and a client of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    child = subprocess.Popen([sys.executable, "-c", PROGRAM.format(port=port, more=more)], stderr=subprocess.PIPE)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S) as client:
            await until_ready(client, child)
            yield child, client
    finally:
        child.kill()
        child.wait()
        present(child.stderr).close()


def test_a_process_that_is_told_to_end_twice_ends_at_once() -> None:
    """First it drains: it does not end while a request runs."""

    async def go() -> int:
        body = {"prompt": "x", "max_tokens": 900, "stream": True}
        async with process() as (child, client), client.stream("POST", "/generate", json=body) as answer:
            child.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.5)
            assert child.poll() is None
            child.send_signal(signal.SIGTERM)
            code = await asyncio.to_thread(child.wait, DEADLINE_S)
            with pytest.raises(httpx.TransportError):
                await answer.aread()
            return code

    assert asyncio.run(go()) == 128 + signal.SIGTERM


def test_a_process_ends_with_its_streams_whole() -> None:
    async def go() -> tuple[list[httpx.Response], int]:
        body = {"prompt": "x", "max_tokens": 40, "stream": True}
        async with process() as (child, client), AsyncExitStack() as streams:
            begun = [client.stream("POST", "/generate", json=body) for _ in range(4)]
            answers = [await streams.enter_async_context(stream) for stream in begun]
            child.send_signal(signal.SIGTERM)
            await asyncio.gather(*(answer.aread() for answer in answers))
            return answers, await asyncio.to_thread(child.wait, DEADLINE_S)

    answers, code = asyncio.run(go())
    assert [events_of(answer)[-1]["text"] for answer in answers] == [LETTERS[:40]] * 4
    assert code == 0


def test_a_process_whose_engine_hangs_ends_with_an_error() -> None:
    """Its thread cannot be ended, and must not keep the process."""

    async def go() -> tuple[httpx.Response, int, str]:
        async with process("life.runners['w8a8'].on_read = Hang(from_step=3)") as (child, client):
            answer = await client.post("/generate", json={"prompt": "x", "max_tokens": 40})
            return answer, await asyncio.to_thread(child.wait, DEADLINE_S), present(child.stderr).read().decode()

    answer, code, log = asyncio.run(go())
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")
    assert code == FAILED
    assert "stuck while reading a decode step" in log
