"""GET /requests/recent: which runs it lists and what it says of them."""

import asyncio
from typing import Any

import httpx

from service.engine.api import FinishReason
from service.telemetry.recent import MAX_RECENT, Recent
from tests.support.harness import app_of, client_of, two_engines
from tests.support.run_metrics import metrics_with


def recent_after(*bodies: object, **settings: Any) -> tuple[list[httpx.Response], dict[str, Any]]:
    async def go() -> tuple[list[httpx.Response], dict[str, Any]]:
        async with client_of(app_of(two_engines(delay_s=0.001), **settings)) as client:
            answers = [await client.post("/generate", json=body) for body in bodies]
            return answers, (await client.get("/requests/recent")).json()

    return asyncio.run(go())


def test_a_finished_request_is_listed_without_its_text() -> None:
    (answer,), listed = recent_after({"prompt": "secret", "max_tokens": 3})
    (row,) = listed["requests"]
    body = answer.json()
    assert row.pop("age_s") >= 0
    assert row == {
        "id": body["id"],
        "variant": "w8a8",
        "route": "/generate",
        "finish_reason": "length",
        **{name: body["metrics"][name] for name in ("ttft_ms", "tpot_ms", "e2e_ms")},
        "prompt_tokens": 6,
        "generated_tokens": 3,
    }


def test_a_comparison_lists_both_runs_and_a_refusal_none() -> None:
    _, listed = recent_after({"prompt": "a", "compare": True}, {"prompt": ""}, {"prompt": "a", "stream": True})
    assert [row["variant"] for row in listed["requests"]] == ["w8a8", "fp16", "w8a8"]


def test_only_the_last_hundred_are_kept_and_they_age() -> None:
    now_s = 10.0
    recent = Recent(lambda: now_s)
    for number in range(MAX_RECENT + 5):
        recent.add(str(number), "w8a8", "/generate", FinishReason.STOP, metrics_with())
    now_s = 12.5
    rows = recent.rows()
    assert [row.id for row in rows] == [str(number) for number in range(5, MAX_RECENT + 5)]
    assert {row.age_s for row in rows} == {2.5}
