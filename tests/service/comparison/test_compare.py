"""Comparison with the baseline: the arithmetic, and the route over fake engines."""

import asyncio
from collections.abc import Sequence

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.comparison.compare import agreement, speedup
from service.engine.api import Progress, SamplingParams, Token
from service.measures import measure, percentile
from tests.service.kinds import Samples
from tests.support.fake_engine import FakeEngine
from tests.support.harness import app_of, client_of, engines_of, events_of, metrics_of, post, total, two_engines, until
from tests.support.narrowed import present
from tests.support.run_metrics import metrics_with


def tokens_of(ids: Sequence[int], logprob: float | None = None) -> list[Token]:
    return [Token(token_id, 0.0, logprob) for token_id in ids]


def test_measure_by_its_definitions() -> None:
    progress = Progress(first_scheduled_s=10.5, num_cached=2, num_accepted=1, batch_size_mean=2.5)
    tokens = [Token(7, 11.0), Token(8, 11.1), Token(9, 11.2), Token(9, 11.5)]
    times = measure(progress, tokens, num_prompt=3, received_s=10.0, sent_s=[11.0, 11.25, 11.5, 12.0])
    assert times.model_dump() == {
        "queue_ms": 500,
        "prefill_ms": 500,
        "ttft_ms": 1000,
        "itl_ms": {"mean": pytest.approx(1000 / 3), "p50": 250, "p99": pytest.approx(495)},
        "tpot_ms": pytest.approx(1000 / 3),
        "e2e_ms": 2000,
        "prompt_tokens": 3,
        "generated_tokens": 4,
        "cached_tokens": 2,
        "accepted_tokens": 1,
        "tokens_per_s": 2,
        "batch_size_mean": 2.5,
    }


def test_measure_of_a_run_that_never_started() -> None:
    times = measure(Progress(), [], num_prompt=1, received_s=10.0, sent_s=[])
    assert {name for name, value in times if value is not None} == {
        "prompt_tokens",
        "generated_tokens",
        "cached_tokens",
        "accepted_tokens",
        "batch_size_mean",
    }


def test_speedup_is_above_one_where_this_is_better() -> None:
    this = metrics_with(ttft_ms=10.0, tpot_ms=2.0, e2e_ms=100.0, tokens_per_s=50.0)
    baseline = metrics_with(ttft_ms=20.0, tpot_ms=5.0, e2e_ms=150.0, tokens_per_s=25.0)
    assert speedup(this, baseline).model_dump() == {"ttft": 2, "tpot": 2.5, "e2e": 1.5, "tokens_per_s": 2}
    nothing = metrics_with()
    assert set(speedup(this, nothing).model_dump().values()) == {None}
    assert set(speedup(nothing, baseline).model_dump().values()) == {None}


@pytest.mark.parametrize(
    ("this", "baseline", "prefix", "ratio"),
    [
        ([1, 2, 3], [1, 2, 3], 3, 1),
        ([1, 2, 3], [1, 9, 3, 4], 1, 0.5),
        ([], [], 0, 1),
        ([1], [], 0, 0),
        ([1], [2], 0, 0),
    ],
)
def test_agreement(this: list[int], baseline: list[int], prefix: int, ratio: float) -> None:
    found = agreement(tokens_of(this), tokens_of(baseline))
    assert (found.common_prefix_tokens, found.match_ratio) == (prefix, ratio)


def test_logprobs_are_compared_on_the_common_prefix_alone() -> None:
    this = [Token(1, 0, -1.0), Token(2, 0, -2.0), Token(3, 0, -50.0)]
    baseline = [Token(1, 0, -1.5), Token(2, 0, -1.5), Token(4, 0, -1.0)]
    assert agreement(this, baseline).logprob_delta_mean == pytest.approx(0.5)
    assert agreement(this[2:], baseline[2:]).logprob_delta_mean is None


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_agreement_is_symmetric_and_bounded(a: list[int], b: list[int]) -> None:
    found = agreement(tokens_of(a), tokens_of(b))
    assert found == agreement(tokens_of(b), tokens_of(a))
    assert 0 <= found.match_ratio <= 1
    assert a[: found.common_prefix_tokens] == b[: found.common_prefix_tokens]
    assert (found.match_ratio == 1) == (a == b)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_lies_within(values: list[float], q: float) -> None:
    assert min(values) - 1e-6 <= percentile(values, q) <= max(values) + 1e-6
    assert percentile(values, 0) == min(values)
    assert percentile(values, 100) == max(values)


def test_percentile_is_linear_between_ranks() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


def test_compare_answers_with_both_and_runs_one_after_the_other() -> None:
    engines = two_engines(delay_s=0.001)
    engines["fp16"].reply = "help!"
    engines["fp16"].logprob = -0.75
    answer = post({"prompt": "a", "compare": True, "temperature": 1}, app_of(engines)).json()
    assert engines["w8a8"].log == [("start", "w8a8"), ("end", "w8a8"), ("start", "fp16"), ("end", "fp16")]
    baseline = answer["baseline"]
    assert (answer["variant"], answer["text"]) == ("w8a8", "hello")
    assert (baseline["variant"], baseline["text"]) == ("fp16", "help!")
    assert set(baseline) == {"id", "variant", "text", "token_ids", "finish_reason", "usage", "metrics"}
    assert set(answer) == {*baseline, "baseline", "speedup", "agreement", "contended"}
    assert answer["agreement"] == {
        "common_prefix_tokens": 3,
        "match_ratio": pytest.approx(4 / 6),
        "logprob_delta_mean": pytest.approx(0.25),
    }
    assert answer["contended"] is False
    for name in ("ttft", "tpot", "e2e"):
        ratio = baseline["metrics"][f"{name}_ms"] / answer["metrics"][f"{name}_ms"]
        assert answer["speedup"][name] == pytest.approx(ratio)
    first, second = (engines[variant].submitted[0] for variant in ("w8a8", "fp16"))
    assert first.params == second.params
    assert first.params.seed is not None
    assert first.prompt_ids == second.prompt_ids
    assert second.arrival_s >= present(first.finished_s)


def test_compare_keeps_the_given_seed_and_logprobs() -> None:
    engines = two_engines()
    answer = post({"prompt": "a", "compare": True, "seed": 7, "logprobs": 1}, app_of(engines)).json()
    assert engines["fp16"].submitted[0].params.seed == 7
    assert len(answer["logprobs"]) == len(answer["baseline"]["logprobs"]) == 6


def test_compare_of_one_token_has_no_tpot() -> None:
    answer = post({"prompt": "a", "compare": True, "max_tokens": 1}).json()
    assert answer["speedup"]["tpot"] is None
    assert answer["speedup"]["ttft"] > 0


def test_compare_streams_the_baseline_afterwards() -> None:
    *deltas, last = events_of(post({"prompt": "a", "compare": True, "stream": True}, reply="hey"))
    assert [delta["variant"] for delta in deltas] == ["w8a8"] * 4 + ["fp16"] * 4
    assert "".join(delta["text"] for delta in deltas) == "heyhey"
    assert last["text"] == last["baseline"]["text"] == "hey"
    assert last["agreement"]["match_ratio"] == 1
    assert {delta["id"] for delta in deltas} == {last["id"], last["baseline"]["id"]}


def test_a_stop_string_ends_both_runs() -> None:
    engines = two_engines(reply="a.b.c", delay_s=0.001)
    answer = post({"prompt": "a", "compare": True, "stop": "."}, app_of(engines)).json()
    assert (answer["text"], answer["baseline"]["text"]) == ("a", "a")
    assert engines["w8a8"].log == [("start", "w8a8"), ("end", "w8a8"), ("start", "fp16"), ("end", "fp16")]
    assert answer["contended"] is False


def test_the_baseline_waits_until_the_first_run_has_left_the_engine() -> None:
    engines = two_engines(reply="a.b.c", delay_s=0.001, release_delay_s=0.1)
    answer = post({"prompt": "a", "compare": True, "stop": "."}, app_of(engines)).json()
    assert engines["w8a8"].log[:3] == [("start", "w8a8"), ("end", "w8a8"), ("start", "fp16")]
    assert answer["contended"] is False


def test_a_stranger_that_comes_during_the_second_run_contends() -> None:
    async def go() -> httpx.Response:
        engines = two_engines(delay_s=0.005)
        app = app_of(engines)
        async with client_of(app) as client:
            asked = asyncio.ensure_future(client.post("/generate", json={"prompt": "a", "compare": True}))
            await until(lambda: bool(engines["fp16"].submitted))
            stranger = app.state.serving.engines["w8a8"].submit(
                [1], SamplingParams(ignore_eos=True, max_tokens=60), "x"
            )
            response = await asked
            stranger.finish("abort")
            return response

    assert asyncio.run(go()).json()["contended"] is True


def test_a_failed_baseline_is_found_before_anything_runs() -> None:
    engines = two_engines()
    engines["fp16"].fail(RuntimeError("gone"))
    response = post({"prompt": "a", "compare": True}, app_of(engines))
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
    assert not engines["w8a8"].submitted


def test_without_a_baseline_compare_is_refused() -> None:
    response = post({"prompt": "a", "compare": True}, app_of(engines_of(FakeEngine("w8a8"))))
    assert response.status_code == 400
    assert "--variants w8a8,fp16" in response.json()["error"]["message"]


def test_the_shorter_context_of_the_two_counts() -> None:
    engines = two_engines()
    engines["fp16"].max_model_len = 8
    response = post({"prompt": "123456", "compare": True, "max_tokens": 3}, app_of(engines))
    assert response.status_code == 400
    assert "largest possible here is 2" in response.json()["error"]["message"]


def _beside(
    other: dict[str, object], start_after_s: float = 0.0, **delays: float
) -> tuple[httpx.Response, httpx.Response]:
    """A comparison and another request, started start_after_s later."""

    async def go() -> tuple[httpx.Response, httpx.Response]:
        engines = two_engines()
        for variant, delay_s in delays.items():
            engines[variant].delay_s = delay_s
        async with client_of(app_of(engines)) as client:

            async def later() -> httpx.Response:
                await asyncio.sleep(start_after_s)
                return await client.post("/generate", json=other)

            return await asyncio.gather(client.post("/generate", json={"prompt": "a", "compare": True}), later())

    compared, beside = asyncio.run(go())
    return compared, beside


@pytest.mark.parametrize("variant", ["w8a8", "fp16"])
def test_another_request_during_the_first_run_contends(variant: str) -> None:
    compared, other = _beside({"prompt": "b", "variant": variant}, 0.02, w8a8=0.02)
    assert compared.json()["contended"] is True
    assert "contended" not in other.json()


def test_another_request_during_the_second_run_contends() -> None:
    compared, _ = _beside({"prompt": "b", "max_tokens": 1}, 0.05, fp16=0.03)
    assert compared.json()["contended"] is True


def test_two_comparisons_at_once_contend() -> None:
    for response in _beside({"prompt": "b", "compare": True}):
        assert response.json()["contended"] is True


def test_a_refused_request_does_not_contend() -> None:
    compared, other = _beside({"prompt": ""}, 0.01, w8a8=0.01)
    assert other.status_code == 400
    assert compared.json()["contended"] is False


def test_a_request_in_the_engine_from_elsewhere_contends() -> None:
    async def go() -> httpx.Response:
        engines = two_engines(delay_s=0.005)
        app = app_of(engines)
        async with client_of(app) as client:
            stranger = app.state.serving.engines["fp16"].submit(
                [1], SamplingParams(ignore_eos=True, max_tokens=60), "x"
            )
            response = await client.post("/generate", json={"prompt": "a", "compare": True})
            stranger.finish("abort")
            return response

    assert asyncio.run(go()).json()["contended"] is True


def test_a_comparison_after_another_request_is_clean() -> None:
    async def go() -> httpx.Response:
        async with client_of(app_of(two_engines())) as client:
            await client.post("/generate", json={"prompt": "a"})
            return await client.post("/generate", json={"prompt": "a", "compare": True})

    assert asyncio.run(go()).json()["contended"] is False


@pytest.mark.parametrize("stream", [False, True])
def test_a_baseline_that_fails_fails_the_comparison(stream: bool) -> None:
    async def go() -> tuple[httpx.Response, Samples]:
        engines = two_engines()
        engines["fp16"].fail_at = 1
        async with client_of(app_of(engines)) as client:
            response = await client.post("/generate", json={"prompt": "a", "compare": True, "stream": stream})
            return response, await metrics_of(client)

    response, samples = asyncio.run(go())
    assert "engine_failed" in response.text
    assert response.status_code == (200 if stream else 500)
    assert samples["ottava_requests_total", "outcome=stop", "variant=w8a8"] == 1
    assert samples["ottava_requests_total", "outcome=error", "variant=fp16"] == 1
    assert total(samples, "ottava_agreement_ratio_count") == 0
