"""POST /admin/reload and SIGHUP over a reload that is a fake: one at a time, counted, and never a half-way state."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.engine.api import Reloaded
from service.errors import ReloadFailed
from tests.service.kinds import Samples
from tests.support.harness import DEADLINE_S, app_of, client_of, metrics_of, two_engines, until
from tests.support.life import Life

DONE = Reloaded("w8a8", "new", 2, datetime(2024, 5, 6, tzinfo=UTC), 1.5, 0.25)


class FakeReload:
    """Waits for `go`, then returns or raises `result`."""

    def __init__(self, result: Reloaded | Exception = DONE) -> None:
        self.result = result
        self.go = threading.Event()
        self.asked: list[str | None] = []
        self.threads: set[str] = set()

    def __call__(self, model: str | None) -> Reloaded:
        self.asked.append(model)
        self.threads.add(threading.current_thread().name)
        assert self.go.wait(DEADLINE_S)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def app_with(reload: FakeReload, self_check: Callable[[], Mapping[str, str]] = dict, **settings: Any) -> FastAPI:
    return app_of(two_engines(), self_check, reload=reload, **settings)


def reload_once(reload: FakeReload, body: Mapping[str, object], **settings: Any) -> tuple[httpx.Response, Samples]:
    reload.go.set()

    async def go() -> tuple[httpx.Response, Samples]:
        async with client_of(app_with(reload, **settings)) as client:
            answer = await client.post("/admin/reload", json=body)
            return answer, await metrics_of(client)

    return asyncio.run(go())


def test_it_answers_what_is_served_now() -> None:
    reload = FakeReload()
    answer, samples = reload_once(reload, {"model": "/models/new"})
    assert answer.status_code == 200
    assert answer.json() == {
        "variant": "w8a8",
        "checkpoint": "new",
        "generation": 2,
        "loaded_at": "2024-05-06T00:00:00Z",
        "load_s": 1.5,
        "pause_s": 0.25,
    }
    assert reload.asked == ["/models/new"]
    assert reload.threads == {"reload"}
    assert samples["ottava_reloads_total", "outcome=reloaded"] == 1
    assert samples["ottava_reloads_total", "outcome=failed"] == 0


@pytest.mark.parametrize("body", [{}, {"model": None}])
def test_without_a_model_the_present_folder_is_meant(body: dict[str, object]) -> None:
    reload = FakeReload()
    assert reload_once(reload, body)[0].status_code == 200
    assert reload.asked == [None]


@pytest.mark.parametrize("body", [{"model": 3}, {"model": ""}, {"folder": "x"}, {"model": "\0" * 5000}])
def test_a_body_of_another_shape_reloads_nothing(body: dict[str, object]) -> None:
    reload = FakeReload()
    assert reload_once(reload, body)[0].status_code in (400, 422)
    assert reload.asked == []


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(ReloadFailed("the folder is gone", "model"), 409, "reload_failed"), (KeyError("secret"), 500, "internal_error")],
)
def test_a_reload_that_fails_says_so(
    error: Exception, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer, samples = reload_once(FakeReload(error), {})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "secret" not in answer.text
    assert samples["ottava_reloads_total", "outcome=failed"] == 1
    assert "the old weights serve on" in caplog.text


def test_engines_without_a_checkpoint_have_none_to_reload() -> None:
    async def go() -> httpx.Response:
        app = app_of(two_engines())
        async with client_of(app) as client:
            return await client.post("/admin/reload", json={})

    answer = asyncio.run(go())
    assert answer.status_code == 409
    assert "no checkpoint" in answer.json()["error"]["message"]


def test_one_reload_at_a_time_and_requests_go_on_meanwhile() -> None:
    reload = FakeReload()

    async def go() -> tuple[httpx.Response, ...]:
        async with client_of(app_with(reload)) as client:
            first = asyncio.ensure_future(client.post("/admin/reload", json={}))
            await until(lambda: bool(reload.asked))
            second = await client.post("/admin/reload", json={})
            answer = await client.post("/generate", json={"prompt": "x"})
            reload.go.set()
            return await first, second, answer, await client.post("/admin/reload", json={})

    first, second, answer, third = asyncio.run(go())
    assert [response.status_code for response in (first, second, answer, third)] == [200, 409, 200, 200]
    assert "running already" in second.json()["error"]["message"]
    assert reload.asked == [None, None]


def test_a_client_that_leaves_does_not_end_the_reload() -> None:
    reload = FakeReload()

    async def go() -> tuple[httpx.Response, Samples]:
        app = app_with(reload)
        async with client_of(app) as client:
            first = asyncio.ensure_future(client.post("/admin/reload", json={}))
            await until(lambda: bool(reload.asked))
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            second = await client.post("/admin/reload", json={})
            reload.go.set()
            await until(lambda: not app.state.serving.reloads.is_running)
            return second, await metrics_of(client)

    second, samples = asyncio.run(go())
    assert second.status_code == 409
    assert samples["ottava_reloads_total", "outcome=reloaded"] == 1


def test_a_good_checkpoint_heals_a_variant_that_the_self_check_refused() -> None:
    reload = FakeReload()
    reload.go.set()

    async def go() -> tuple[httpx.Response, ...]:
        async with client_of(app_with(reload, lambda: {"w8a8": "not finite", "fp16": "not finite either"})) as client:
            before = await client.post("/generate", json={"prompt": "x"})
            await client.post("/admin/reload", json={})
            return before, await client.post("/generate", json={"prompt": "x"}), await client.get("/ready")

    before, after, ready = asyncio.run(go())
    assert (before.status_code, after.status_code) == (503, 200)
    assert ready.json()["variants"] == {"fp16": "not finite either"}


def test_nothing_is_reloaded_before_the_self_check_is_done() -> None:
    checking, reload = threading.Event(), FakeReload()

    def once_checked() -> dict[str, str]:
        assert checking.wait(DEADLINE_S)
        return {}

    async def go() -> httpx.Response:
        async with client_of(app_with(reload, once_checked), wait_s=0.05) as client:
            answer = await client.post("/admin/reload", json={})
            while "starting the engine" in answer.text:
                await asyncio.sleep(0.01)
                answer = await client.post("/admin/reload", json={})
            checking.set()
            return answer

    answer = asyncio.run(go())
    assert answer.status_code == 409
    assert "self-check" in answer.json()["error"]["message"]
    assert reload.asked == []


def test_the_keys_are_read_again_and_a_bad_file_reloads_nothing(tmp_path: Path) -> None:
    path, reload = tmp_path / "keys", FakeReload()
    path.write_text("anna:first-key-of-all\n")
    reload.go.set()

    async def go() -> tuple[list[int], httpx.Response]:
        async with client_of(app_with(reload, admin_api_keys_file=path)) as client:
            old, new = ({"authorization": f"Bearer {key}-key-of-all"} for key in ("first", "second"))
            path.write_text("anna:second-key-of-all\n")
            answers = [await client.post("/admin/reload", json={}, headers=h) for h in (new, old, old, new)]
            path.write_text("")
            return [answer.status_code for answer in answers], await client.post("/admin/reload", json={}, headers=new)

    codes, refused = asyncio.run(go())
    assert codes == [401, 200, 401, 200]
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_failed")
    assert "holds no key" in refused.json()["error"]["message"]
    assert reload.asked == [None, None]


def test_a_hangup_reloads_and_a_draining_server_does_not(caplog: pytest.LogCaptureFixture) -> None:
    reload = FakeReload()
    life = Life(reload=reload)

    async def go() -> tuple[httpx.Response, ...]:
        async with life.run():
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: bool(reload.asked))
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: "SIGHUP: a reload is running already" in caplog.text)
            answer = await life.ask(3)
            reload.go.set()
            await until(lambda: not life.app.state.serving.reloads.is_running)
            slow = life.ask(100)
            await life.running(1)
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: life.app.state.serving.is_draining)
            refused = await life.client.post("/admin/reload", json={})
            return answer, refused, await slow

    answer, refused, slow = asyncio.run(go())
    assert [response.status_code for response in (answer, refused, slow)] == [200, 409, 200]
    assert "stopping" in refused.json()["error"]["message"]
    assert reload.asked == [None]
