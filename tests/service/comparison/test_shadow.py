"""Shadow mode over fake engines: what is replayed, when it gives way, and what it feeds."""

import asyncio
from typing import Any

import httpx
import pytest

from service.comparison.shadow import TOKEN_BYTES, Shadow
from service.comparison.tally import WINDOW, Comparisons
from service.engine.api import SamplingParams
from service.errors import InvalidSettings
from service.measures import Agreement, Speedup
from service.settings import BASELINE, load_settings
from service.telemetry.metrics import ServiceMetrics
from service.web.state import Serving
from tests.service.kinds import Samples
from tests.support.fake_engine import INFO, ByteTokenizer, FakeEngine, FakeRequest
from tests.support.harness import app_of, client_of, metrics_of, total, two_engines, until


def outcomes(samples: Samples) -> dict[str, float]:
    names = ("replayed", "dropped", "abandoned")
    return {name: samples["ottava_shadow_total", f"outcome={name}", "variant=w8a8"] for name in names}


def shadowed(
    *bodies: object, engines: dict[str, FakeEngine] | None = None, **settings: Any
) -> tuple[list[dict[str, Any]], Samples, dict[str, Any]]:
    """Answers, series and summary once no sample waits."""

    async def go() -> tuple[list[dict[str, Any]], Samples, dict[str, Any]]:
        app = app_of(engines or two_engines(), shadow_rate=settings.pop("shadow_rate", 1.0), **settings)
        async with client_of(app) as client:
            answers = [await client.post("/generate", json=body) for body in bodies]
            await until(lambda: app.state.serving.shadow.num_waiting == 0)
            assert all(answer.status_code == 200 for answer in answers)
            return (
                [answer.json() for answer in answers],
                await metrics_of(client),
                (await client.get("/compare")).json(),
            )

    return asyncio.run(go())


def test_a_live_request_is_replayed_afterwards_and_feeds_the_ratios_alone() -> None:
    engines = two_engines(delay_s=0.001)
    engines["fp16"].reply = "help!"
    (answer,), samples, summary = shadowed({"prompt": "a"}, engines=engines)
    assert engines["w8a8"].log == [("start", "w8a8"), ("end", "w8a8"), ("start", "fp16"), ("end", "fp16")]
    assert set(answer) == {"id", "variant", "text", "token_ids", "finish_reason", "usage", "metrics"}
    assert outcomes(samples) == {"replayed": 1, "dropped": 0, "abandoned": 0}
    for measure in ("ttft", "tpot", "e2e"):
        assert samples["ottava_speedup_ratio_count", "how=shadow", f"measure={measure}", "variant=w8a8"] == 1
    assert samples["ottava_agreement_ratio_sum", "how=shadow", "variant=w8a8"] == pytest.approx(4 / 6)
    # The replay is nobody's request: it shows up in no count and no latency of the baseline.
    assert total(samples, "ottava_requests_total") == total(samples, "ottava_e2e_request_latency_seconds_count") == 1
    assert samples["ottava_generation_tokens_total", "variant=fp16"] == 0
    assert summary["shadow"]["count"] == 1
    assert summary["shadow"]["contended"] == 0
    assert summary["shadow"]["agreement_mean"] == pytest.approx(4 / 6)
    assert summary["shadow"]["identical_ratio"] == 0
    assert summary["shadow"]["speedup_median"]["e2e"] > 0
    assert summary["compare"]["count"] == 0
    assert summary["shadow_state"] == {"rate": 1.0, "waiting": 0}


def test_a_sampled_request_is_replayed_with_the_seed_it_drew() -> None:
    engines = two_engines()
    shadowed({"prompt": "a", "temperature": 1, "max_tokens": 3}, engines=engines)
    (live,), (replay,) = engines["w8a8"].submitted, engines["fp16"].submitted
    assert live.params.seed is None
    assert replay.params.seed == replay.seed == live.seed
    assert replay.params.max_tokens == 3
    assert replay.prompt_ids == live.prompt_ids


def test_a_replay_stops_at_the_stop_string_too() -> None:
    engines = two_engines(reply="a.b.c", delay_s=0.001)
    _, samples, _ = shadowed({"prompt": "a", "stop": "."}, engines=engines)
    assert engines["fp16"].freed[0].finish_reason == "stop"
    assert samples["ottava_agreement_ratio_sum", "how=shadow", "variant=w8a8"] == 1


def test_the_baselines_own_requests_and_comparisons_are_not_replayed() -> None:
    engines = two_engines()
    bodies = {"prompt": "a", "variant": "fp16"}, {"prompt": "a", "compare": True}
    _, samples, summary = shadowed(*bodies, engines=engines)
    assert outcomes(samples) == {"replayed": 0, "dropped": 0, "abandoned": 0}
    assert len(engines["fp16"].submitted) == 2
    assert (summary["compare"]["count"], summary["shadow"]["count"]) == (1, 0)


def test_at_rate_zero_nothing_is_replayed() -> None:
    engines = two_engines()
    _, samples, _ = shadowed({"prompt": "a"}, engines=engines, shadow_rate=0.0)
    assert not engines["fp16"].submitted
    assert sum(outcomes(samples).values()) == 0


def test_the_share_that_is_drawn_is_the_rate() -> None:
    engines = two_engines()
    draws = iter([0.29, 0.3, 0.0, 0.99])
    app = app_of(engines)
    metrics = ServiceMetrics(app.state.serving.engines, lambda: INFO)
    shadow = Shadow(
        app.state.serving.engines,
        BASELINE,
        tokenizer=ByteTokenizer,
        traffic=app.state.serving.traffic,
        comparisons=Comparisons(metrics),
        metrics=metrics,
        rate=0.3,
        max_waiting=1,
        draw=lambda: next(draws),
    )
    assert [shadow.wants("w8a8") for _ in range(4)] == [True, False, True, False]


def test_a_full_queue_drops_and_counts() -> None:
    async def go() -> tuple[int, dict[str, float], Samples]:
        engines = two_engines()
        app = app_of(engines, shadow_rate=1.0, shadow_queue=2)
        async with client_of(app) as client:
            app.state.serving.traffic.enter()  # somebody is here, so nothing is idle
            for _ in range(5):
                await client.post("/generate", json={"prompt": "a"})
            waiting = app.state.serving.shadow.num_waiting
            before = outcomes(await metrics_of(client))
            app.state.serving.traffic.leave()
            await until(lambda: app.state.serving.shadow.num_waiting == 0)
            return waiting, before, await metrics_of(client)

    waiting, before, after = asyncio.run(go())
    assert waiting == 2
    assert before == {"replayed": 0, "dropped": 3, "abandoned": 0}
    assert outcomes(after) == {"replayed": 2, "dropped": 3, "abandoned": 0}
    # They ran with company, the replays alone: their times say nothing, their tokens do.
    assert total(after, "ottava_speedup_ratio_count") == 0
    assert after["ottava_agreement_ratio_count", "how=shadow", "variant=w8a8"] == 2


@pytest.mark.parametrize("variant", ["w8a8", "fp16"])
def test_a_live_request_ends_the_replay_that_it_meets(variant: str) -> None:
    async def go() -> tuple[httpx.Response, FakeRequest, dict[str, FakeEngine], Samples]:
        engines = two_engines()
        engines["fp16"].delay_s = 0.05
        app = app_of(engines, shadow_rate=1.0)
        async with client_of(app) as client:
            await client.post("/generate", json={"prompt": "a", "ignore_eos": True, "max_tokens": 20})
            await until(lambda: bool(engines["fp16"].active))
            answer = await client.post("/generate", json={"prompt": "a", "variant": variant, "max_tokens": 1})
            replay = next(request for request in engines["fp16"].freed if request.id.endswith("-shadow"))
            await until(lambda: app.state.serving.shadow.num_waiting == 0)
            return answer, replay, engines, await metrics_of(client)

    answer, replay, engines, samples = asyncio.run(go())
    assert answer.status_code == 200
    assert replay.finish_reason == "abort"
    assert len(replay.output) < 20
    assert outcomes(samples)["abandoned"] == 1
    assert not any(engine.active for engine in engines.values())


def test_a_replay_waits_while_an_engine_holds_anything() -> None:
    async def go() -> tuple[int, int]:
        engines = two_engines(delay_s=0.001)
        app = app_of(engines, shadow_rate=1.0)
        async with client_of(app) as client:
            stranger = app.state.serving.engines["w8a8"].submit(
                [1], SamplingParams(ignore_eos=True, max_tokens=10_000), "x"
            )
            await client.post("/generate", json={"prompt": "a"})
            await asyncio.sleep(0.05)
            early = len(engines["fp16"].submitted)
            stranger.finish("abort")
            await until(lambda: app.state.serving.shadow.num_waiting == 0)
            return early, len(engines["fp16"].submitted)

    assert asyncio.run(go()) == (0, 1)


def test_a_baseline_that_fails_ends_the_replay_and_not_shadow_mode(caplog: pytest.LogCaptureFixture) -> None:
    engines = two_engines()
    engines["fp16"].fail_at = 2
    _, samples, _ = shadowed({"prompt": "a"}, {"prompt": "b"}, engines=engines)
    assert outcomes(samples) == {"replayed": 0, "dropped": 0, "abandoned": 2}
    assert total(samples, "ottava_agreement_ratio_count") == 0
    assert "the replay of gen-" in caplog.text


def test_a_baseline_refused_by_the_self_check_is_not_used() -> None:
    async def go() -> tuple[int, int]:
        engines = two_engines()
        app = app_of(engines, lambda: {"fp16": "not finite"}, shadow_rate=1.0)
        async with client_of(app) as client:
            await client.post("/generate", json={"prompt": "a"})
            return app.state.serving.shadow.num_waiting, len(engines["fp16"].submitted)

    assert asyncio.run(go()) == (0, 0)


def test_shutdown_abandons_what_runs_and_what_waits() -> None:
    async def go() -> tuple[dict[str, FakeEngine], Serving]:
        engines = two_engines()
        engines["fp16"].delay_s = 10
        app = app_of(engines, shadow_rate=1.0)
        async with client_of(app) as client:
            app.state.serving.traffic.enter()
            for _ in range(3):
                await client.post("/generate", json={"prompt": "a"})
            app.state.serving.traffic.leave()
            await until(lambda: bool(engines["fp16"].active))
        return engines, app.state.serving

    engines, serving = asyncio.run(go())
    assert not engines["fp16"].active
    assert serving.shadow.num_waiting == 0
    assert b'ottava_shadow_total{outcome="abandoned",variant="w8a8"} 3.0' in serving.metrics.exposition()


def test_shadow_mode_without_a_baseline_is_refused() -> None:
    with pytest.raises(InvalidSettings, match=r"shadow_rate is 0.1 .* add fp16 to variants"):
        load_settings(variants="w8a8", shadow_rate=0.1)
    load_settings(variants="w8a8", shadow_rate=0.0)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(InvalidSettings, match="shadow_rate"):
        load_settings(shadow_rate=rate)


def test_the_summary_is_of_the_window_and_leaves_contended_times_out() -> None:
    comparisons = Comparisons(ServiceMetrics(app_of(two_engines()).state.serving.engines, lambda: INFO))
    alike = Agreement(common_prefix_tokens=1, match_ratio=1.0, logprob_delta_mean=None)
    parted = Agreement(common_prefix_tokens=0, match_ratio=0.5, logprob_delta_mean=None)

    def add(ratio: float, agreement: Agreement = alike, contended: bool = False, unequal: bool = False) -> None:
        comparisons.add(
            "shadow",
            "w8a8",
            Speedup(ttft=ratio, tpot=None, e2e=ratio, tokens_per_s=ratio),
            agreement,
            is_contended=contended,
            is_unequal=unequal,
        )

    add(100.0, parted)
    for ratio in (1.0, 2.0, 3.0):
        add(ratio)
    add(50.0, parted, contended=True)
    add(70.0, alike, unequal=True)
    found = comparisons.summary()["shadow"]
    assert (found.count, found.contended, found.unequal) == (6, 1, 1)
    assert found.speedup_median == Speedup(ttft=2.5, tpot=None, e2e=2.5, tokens_per_s=2.5)
    assert found.agreement_mean == pytest.approx(5 / 6)
    assert found.identical_ratio == pytest.approx(4 / 6)
    for _ in range(WINDOW):
        add(4.0)
    found = comparisons.summary()["shadow"]
    assert (found.count, found.agreement_mean, found.speedup_median.e2e) == (6 + WINDOW, 1.0, 4.0)


def test_a_contended_comparison_gives_agreement_and_no_speed() -> None:
    async def go() -> tuple[dict[str, Any], Samples, dict[str, Any]]:
        engines = two_engines(delay_s=0.002)
        app = app_of(engines)
        async with client_of(app) as client:
            stranger = app.state.serving.engines["fp16"].submit(
                [1], SamplingParams(ignore_eos=True, max_tokens=10_000), "x"
            )
            answer = await client.post("/generate", json={"prompt": "a", "compare": True})
            stranger.finish("abort")
            return answer.json(), await metrics_of(client), (await client.get("/compare")).json()

    answer, samples, summary = asyncio.run(go())
    assert answer["contended"] is True
    assert total(samples, "ottava_speedup_ratio_count") == 0
    assert samples["ottava_agreement_ratio_count", "how=compare", "variant=w8a8"] == 1
    assert (summary["compare"]["count"], summary["compare"]["contended"]) == (1, 1)
    assert set(summary["compare"]["speedup_median"].values()) == {None}


DEAR = {"prompt": "abc", "echo": True, "logprobs": 5, "max_tokens": 3, "model": "w8a8"}


def test_what_waits_keeps_no_log_probability_that_nobody_compares() -> None:
    async def go() -> tuple[Any, FakeRequest]:
        engines = two_engines()
        app = app_of(engines, shadow_rate=1.0)
        async with client_of(app) as client:
            serving = app.state.serving
            serving.traffic.enter()
            assert (await client.post("/v1/completions", json=DEAR)).status_code == 200
            (sample,) = serving.shadow._samples
            serving.traffic.leave()
            await until(lambda: serving.shadow.num_waiting == 0)
            return sample, engines["fp16"].submitted[0]

    sample, replay = asyncio.run(go())
    assert sample.progress.prompt_logprobs == ()
    assert [token.top_logprobs for token in sample.tokens] == [()] * 3
    assert all(token.logprob is not None for token in sample.tokens)
    assert (replay.params.logprobs, replay.params.prompt_logprobs) == (0, None)


def test_what_waits_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> tuple[int, dict[str, float]]:
        app = app_of(two_engines(), shadow_rate=1.0)
        async with client_of(app) as client:
            app.state.serving.traffic.enter()
            for _ in range(4):
                await client.post("/generate", json={"prompt": "abcd", "max_tokens": 4})
            return app.state.serving.shadow.num_waiting, outcomes(await metrics_of(client))

    monkeypatch.setattr("service.comparison.shadow.MAX_WAITING_BYTES", 2 * 8 * TOKEN_BYTES)
    waiting, counted = asyncio.run(go())
    assert (waiting, counted["dropped"]) == (2, 2)
