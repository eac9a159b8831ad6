"""Prometheus: every series, exact counts, and the state routes."""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Never

import httpx
import pytest

from service.telemetry import metrics
from tests.service.kinds import Samples
from tests.support.fake_engine import INFO, NO_PID, FakeEngine
from tests.support.harness import app_of, client_of, engines_of, metrics_of, total, two_engines

SERIES = {
    "time_to_first_token_seconds": metrics.TTFT_BUCKETS,
    "inter_token_latency_seconds": metrics.TOKEN_BUCKETS,
    "request_time_per_output_token_seconds": metrics.TOKEN_BUCKETS,
    "e2e_request_latency_seconds": metrics.E2E_BUCKETS,
    "request_queue_time_seconds": metrics.TTFT_BUCKETS,
    "request_prefill_time_seconds": metrics.TTFT_BUCKETS,
    "request_decode_time_seconds": metrics.E2E_BUCKETS,
    "request_prompt_tokens": metrics.LENGTH_BUCKETS,
    "request_generation_tokens": metrics.LENGTH_BUCKETS,
    "step_batch_size": metrics.BATCH_BUCKETS,
    "agreement_ratio": metrics.AGREEMENT_BUCKETS,
}


def scrape_after(
    *bodies: object, engines: Mapping[str, FakeEngine] | None = None, **options: Any
) -> tuple[list[httpx.Response], Samples]:
    async def go() -> tuple[list[httpx.Response], Samples]:
        async with client_of(app_of(engines or two_engines(**options))) as client:
            answers = [await client.post("/generate", json=body) for body in bodies]
            return answers, await metrics_of(client)

    return asyncio.run(go())


def test_each_rank_is_counted_and_one_that_has_ended_is_not_up() -> None:
    dead = replace(INFO.ranks[0], rank=1, pid=NO_PID, free_bytes=None)

    async def go() -> tuple[Samples, Any]:
        async with client_of(app_of(two_engines(), info=replace(INFO, ranks=[*INFO.ranks, dead]))) as client:
            return await metrics_of(client), (await client.get("/info")).json()

    samples, info = asyncio.run(go())
    for rank, is_up in ((0, 1), (1, 0)):
        label = f"rank={rank}"
        assert samples["ottava_rank_up", label] == is_up
        assert samples["ottava_rank_weight_bytes", label, "variant=w8a8"] == 1000
        assert samples["ottava_rank_kv_cache_bytes", label, "variant=fp16"] == 2000
    assert samples["ottava_rank_free_bytes", "rank=0"] == 3000
    assert ("ottava_rank_free_bytes", "rank=1") not in samples
    assert [rank["state"] for rank in info["ranks"]] == ["running", "ended"]


def test_every_series_is_there_with_its_buckets() -> None:
    _, samples = scrape_after({"prompt": "ab", "compare": True}, reply="hello")
    for name, buckets in SERIES.items():
        for variant in ("w8a8",) if name == "agreement_ratio" else ("w8a8", "fp16"):
            label = f"variant={variant}"
            keys = [key for key in samples if key[0] == f"ottava_{name}_bucket" and label in key]
            found = {part for key in keys for part in key[1:] if part.startswith("le=")}
            assert found == {f"le={float(le)}" for le in buckets} | {"le=+Inf"}, name
            assert sum(samples[key] for key in samples if key[0] == f"ottava_{name}_count" and label in key) >= 1, name
    for variant in ("w8a8", "fp16"):
        label = f"variant={variant}"
        assert samples["ottava_num_requests_running", label] == 0
        assert samples["ottava_num_requests_waiting", label] == 0
        assert samples["ottava_kv_cache_usage_ratio", label] == 0
        assert samples["ottava_weight_bytes", label] == 1000
        assert samples["ottava_kv_cache_bytes", label] == 2000
        assert samples["ottava_preemptions_total", label] == 2
        assert samples["ottava_late_steps_total", label] == 3
        assert samples["ottava_prompt_tokens_total", label] == 2
        assert samples["ottava_generation_tokens_total", label] == 6
        assert samples["ottava_prefix_cache_hit_tokens_total", label] == 0
        assert samples["ottava_inter_token_latency_seconds_count", label] == 5
        assert (
            samples[
                "ottava_info", "device=fake", "dtype=float32", "family=fake", "max_model_len=64", "model=fake", label
            ]
            == 1
        )
    for measure in ("ttft", "tpot", "e2e"):
        assert samples["ottava_speedup_ratio_count", "how=compare", f"measure={measure}", "variant=w8a8"] == 1
    assert samples["ottava_agreement_ratio_sum", "how=compare", "variant=w8a8"] == 1
    assert samples["ottava_step_batch_size_count", "variant=w8a8"] == 6
    assert samples["ottava_step_batch_size_sum", "variant=w8a8"] == 6


@pytest.mark.parametrize(
    ("body", "options", "num_first", "num_tokens"),
    [
        ({"max_tokens": 1}, {}, 1, 1),
        ({"stop": ["h"]}, {}, 1, 1),
        ({"stream": True}, {}, 1, 6),
        ({"stream": True}, {"tokens_per_step": 4}, 1, 6),
        ({}, {"fail_at": 1}, 1, 1),
        ({}, {"fail_at": 0}, 0, 0),
    ],
    ids=["one token", "cut at once", "stream", "several a step", "failed behind it", "failed before it"],
)
def test_a_first_token_is_counted_once_however_its_answer_ends(
    body: dict[str, object], options: dict[str, Any], num_first: int, num_tokens: int
) -> None:
    _, samples = scrape_after({"prompt": "abc"} | body, reply="hello", **options)
    assert total(samples, "ottava_time_to_first_token_seconds_count") == num_first
    assert total(samples, "ottava_prompt_tokens_total") == 3 * num_first
    assert total(samples, "ottava_generation_tokens_total") == num_tokens
    assert total(samples, "ottava_inter_token_latency_seconds_count") == max(0, num_tokens - 1)


def test_buckets_are_those_of_the_interface() -> None:
    ttft = ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80"
    token = ".001 .002 .003 .004 .005 .0075 .01 .015 .02 .025 .05 .075 .1 .15 .2 .3 .5 .75 1 2.5"
    e2e = ".1 .3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240"
    for buckets, text in ((metrics.TTFT_BUCKETS, ttft), (metrics.TOKEN_BUCKETS, token), (metrics.E2E_BUCKETS, e2e)):
        assert list(buckets) == [float(word) for word in text.split()]


def test_batch_histogram_counts_steps() -> None:
    buckets, total_rows = metrics._batch_histogram((0, 5, 0, 2, 1))
    assert dict(buckets) == {
        "1.0": 5, "2.0": 5, "4.0": 8, "8.0": 8, "16.0": 8, "32.0": 8, "64.0": 8, "128.0": 8, "256.0": 8, "512.0": 8,
        "+Inf": 8,
    }  # fmt: skip
    assert total_rows == 5 + 6 + 4
    assert metrics._batch_histogram(())[0][-1] == ("+Inf", 0.0)


def test_every_request_is_counted_once() -> None:
    bodies = [
        {"prompt": "a"},
        {"prompt": "a", "stream": True},
        {"prompt": "a", "max_tokens": 2},
        {"prompt": "a", "stop": "l"},
        {"prompt": "a", "variant": "fp16"},
        {"prompt": "a", "compare": True},
        {"prompt": ""},
        {"prompt": "a", "max_tokens": 64},
        {"prompt": "a", "temperature": 9},
        {"prompt": 1},
        {"prompt": "a", "variant": "nope"},
        {"prompt": "a", "variant": "fp16", "compare": True},
    ]
    _, samples = scrape_after(*bodies)
    counts = {key[1:]: value for key, value in samples.items() if key[0] == "ottava_requests_total" and value}
    assert counts == {
        ("outcome=stop", "variant=w8a8"): 4,
        ("outcome=length", "variant=w8a8"): 1,
        ("outcome=stop", "variant=fp16"): 2,
        ("outcome=rejected", "variant=w8a8"): 2,
        ("outcome=rejected", "variant=fp16"): 1,
        ("outcome=rejected", "variant=none"): 3,
    }
    # One run more than requests: the comparison made two.
    assert total(samples, "ottava_requests_total") == len(bodies) + 1
    assert total(samples, "ottava_e2e_request_latency_seconds_count") == 7


def test_other_routes_are_not_counted() -> None:
    async def go() -> Samples:
        async with client_of(app_of(two_engines())) as client:
            for path in ("/health", "/nope", "/info"):
                await client.get(path)
            await client.get("/generate")
            return await metrics_of(client)

    assert total(asyncio.run(go()), "ottava_requests_total") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_errors_and_refusals_have_their_outcome(stream: bool) -> None:
    body = {"prompt": "a", "stream": stream}
    _, samples = scrape_after(body, body, engines=engines_of(FakeEngine("w8a8", fail_at=2)))
    assert samples["ottava_requests_total", "outcome=error", "variant=w8a8"] == 2
    _, samples = scrape_after(body, engines=engines_of(FakeEngine("w8a8", max_waiting=0)))
    assert samples["ottava_requests_total", "outcome=rejected", "variant=w8a8"] == 1
    assert total(samples, "ottava_requests_total") == 1


def test_two_apps_have_their_own_counts() -> None:
    scrape_after({"prompt": "a"})
    _, samples = scrape_after({"prompt": "a"})
    assert total(samples, "ottava_requests_total") == 1


def test_ready_only_after_the_self_check() -> None:
    async def go() -> tuple[httpx.Response, ...]:
        release = threading.Event()

        def once_released() -> dict[str, str]:
            assert release.wait(30)
            return {}

        app = app_of(two_engines(), once_released)
        async with client_of(app, wait_s=0.05) as client:
            before = [await client.get("/health"), await client.get("/ready")]
            refused = await client.post("/generate", json={"prompt": "a"})
            release.set()
            while (after := await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.01)
            return *before, refused, after, await client.post("/generate", json={"prompt": "a"})

    health, ready, refused, after, answer = asyncio.run(go())
    assert health.status_code == 200
    assert ready.status_code == 503
    assert ready.json()["ready"] is False
    assert set(ready.json()["variants"]) == {"w8a8", "fp16"}
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
    assert refused.headers["retry-after"] == "1"
    assert after.json() == {"ready": True, "variants": {"w8a8": "ready", "fp16": "ready"}}
    assert answer.status_code == 200


def test_a_refused_variant_says_why_and_the_other_serves() -> None:
    async def go() -> list[httpx.Response]:
        app = app_of(two_engines(), lambda: {"w8a8": "output is not finite"})
        async with client_of(app) as client:
            return [
                await client.get("/ready"),
                await client.get("/health"),
                await client.post("/generate", json={"prompt": "a"}),
                await client.post("/generate", json={"prompt": "a", "variant": "fp16"}),
            ]

    ready, health, refused, served = asyncio.run(go())
    assert (ready.status_code, ready.json()["variants"]) == (503, {"w8a8": "output is not finite"})
    assert health.status_code == 200
    assert refused.status_code == 503
    assert "output is not finite" in refused.json()["error"]["message"]
    assert served.status_code == 200


def test_a_self_check_that_raises_lets_nothing_become_ready() -> None:
    def broken() -> Never:
        raise ValueError("no device")

    async def go() -> httpx.Response:
        async with client_of(app_of(two_engines(), broken)) as client:
            return await client.get("/ready")

    ready = asyncio.run(go())
    assert ready.status_code == 503
    assert all("no device" in reason for reason in ready.json()["variants"].values())


def test_info_and_unknown_routes() -> None:
    async def go() -> list[httpx.Response]:
        async with client_of(app_of(two_engines())) as client:
            return [await client.get("/info"), await client.get("/nope"), await client.get("/generate")]

    info, missing, method = asyncio.run(go())
    assert info.json() == asdict(INFO) | {name: info.json()[name] for name in ("limits", "rows")}
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_allowed")
    assert method.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("a\tb", False)]
)
def test_request_id_is_the_clients_if_sane(given: str, kept: bool) -> None:
    async def go() -> list[httpx.Response]:
        async with client_of(app_of(two_engines())) as client:
            paths = ("/health", "/nope", "/metrics")
            answers = [await client.get(path, headers={"x-request-id": given}) for path in paths]
            body = {"prompt": "a", "stream": True}
            return [*answers, await client.post("/generate", json=body, headers={"x-request-id": given})]

    for response in asyncio.run(go()):
        assert (response.headers["x-request-id"] == given) is kept
        assert 0 < len(response.headers["x-request-id"]) <= 128
