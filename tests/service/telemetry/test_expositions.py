"""Both expositions of the metrics, and the trace ids that the second carries."""

import asyncio
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as text_families

from service.telemetry.metrics import Exemplar, exemplar_of
from service.telemetry.negotiation import prefers_openmetrics
from service.telemetry.record import RequestRecord
from tests.support.expositions import full_exposition
from tests.support.harness import app_of, client_of, two_engines

PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
TRACE, PARENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
LATENCIES = {
    f"ottava_{name}_seconds"
    for name in (
        "time_to_first_token", "inter_token_latency", "request_time_per_output_token", "e2e_request_latency",
        "request_queue_time", "request_prefill_time", "request_decode_time",
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        ("APPLICATION/OpenMetrics-Text;Q=0.5", True),
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
        ("text/plain;q=0.9, application/openmetrics-text;q=0.8", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=x", False),
        (";;,,q=1", False),
    ],
)
def test_the_client_chooses_the_exposition(accept: str, expected: bool) -> None:
    assert prefers_openmetrics(accept) is expected


def test_without_tracing_both_expositions_say_the_same() -> None:
    text, openmetrics = full_exposition("text/plain"), full_exposition(PROMETHEUS_2)
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics.text.endswith("# EOF\n")
    assert names(text_families(text.text)) == names(read(openmetrics.text))
    assert exemplars(openmetrics.text) == {}


def names(families: Iterable[Metric]) -> set[tuple[object, ...]]:
    """Names and labels of all samples."""
    return {(sample.name, *sorted(sample.labels.items())) for family in families for sample in family.samples}


def read(openmetrics: str) -> list[Metric]:
    """The families of an OpenMetrics exposition; raises if it is not a valid one."""
    return list(text_string_to_metric_families(openmetrics))  # type: ignore[no-untyped-call]


def exemplars(openmetrics: str) -> dict[str, list[dict[str, str]]]:
    """family -> the labels of its exemplars, for those that have any."""
    found = {
        family.name: [sample.exemplar.labels for sample in family.samples if sample.exemplar is not None]
        for family in read(openmetrics)
    }
    return {name: labels for name, labels in found.items() if labels}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Turns tracing on, with an exporter that keeps the spans. Returns it."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from service.telemetry.spans import SpanTracer

    for name in ("OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    exporter = InMemorySpanExporter()
    monkeypatch.setattr("service.web.app.open_tracer", lambda model: SpanTracer(model, SimpleSpanProcessor(exporter)))
    return exporter


def ask(body: dict[str, object], **headers: str) -> tuple[httpx.Response, httpx.Response]:
    """The OpenMetrics and the plain exposition after one request."""

    async def go() -> tuple[httpx.Response, httpx.Response]:
        async with client_of(app_of(two_engines(delay_s=0.002))) as client:
            (await client.post("/generate", json=body, headers=headers)).raise_for_status()
            accept = {"accept": "application/openmetrics-text"}
            return await client.get("/metrics", headers=accept), await client.get("/metrics")

    return asyncio.run(go())


def test_every_latency_leads_to_the_callers_trace(traced: Any) -> None:
    openmetrics, text = ask({"prompt": "hi"}, traceparent=f"00-{TRACE}-{PARENT_SPAN}-01")
    found = exemplars(openmetrics.text)
    assert set(found) == LATENCIES
    assert all(labels == {"trace_id": TRACE} for each in found.values() for labels in each)
    assert TRACE not in text.text


def test_a_new_trace_is_the_one_that_is_exported(traced: Any) -> None:
    openmetrics, _ = ask({"prompt": "hi", "compare": True})
    named = {labels["trace_id"] for each in exemplars(openmetrics.text).values() for labels in each}
    spans = [span for span in traced.get_finished_spans() if span.attributes.get("http.route") == "/generate"]
    assert named == {f"{span.context.trace_id:032x}" for span in spans}
    assert len(named) == 1
    assert len({span.context.trace_id for span in traced.get_finished_spans()}) == 3, "each request has its own"


@pytest.mark.parametrize(("sampler", "flags"), [("", "00"), ("always_off", None), ("parentbased_always_off", None)])
def test_a_trace_that_is_not_exported_is_not_named(
    traced: Any, monkeypatch: pytest.MonkeyPatch, sampler: str, flags: str | None
) -> None:
    if sampler:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    headers = {} if flags is None else {"traceparent": f"00-{TRACE}-{PARENT_SPAN}-{flags}"}
    openmetrics, _ = ask({"prompt": "hi"}, **headers)
    assert exemplars(openmetrics.text) == {}
    assert not [span for span in traced.get_finished_spans() if span.attributes.get("http.route") == "/generate"]


def test_of_a_run_s_gaps_only_those_longer_than_all_before_are_marked() -> None:
    exemplar = Exemplar({"trace_id": TRACE})
    marked = [exemplar.of_gap(gap_s) is not None for gap_s in (0.02, 0.01, 0.02, 0.03, 0.01, 0.5)]
    assert marked == [True, False, False, True, False, True]


def test_there_is_no_exemplar_without_a_sampled_trace() -> None:
    record = RequestRecord("a", "POST", "/generate", "http", ("localhost", 80), {})
    assert exemplar_of(None) is exemplar_of(record) is None
    record.trace_id = int(TRACE, 16)
    assert exemplar_of(record) is None
    record.is_sampled = True
    assert exemplar_of(record) == Exemplar({"trace_id": TRACE})
