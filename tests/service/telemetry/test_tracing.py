"""Traces: nothing of them unless asked; then one span per request and one per generation, by the conventions."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Protocol, cast

import pytest

from service.errors import InvalidSettings
from service.telemetry import tracing
from service.telemetry.tracing import is_traced, open_tracer
from tests.support.fake_engine import FakeEngine
from tests.support.harness import app_of, client_of, server_of, two_engines

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode

from service.telemetry.spans import SpanTracer

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class EndedSpan(Protocol):
    """A span as the exporter keeps it: here each has attributes and an end."""

    name: str
    kind: SpanKind
    status: Status
    context: SpanContext
    parent: Any
    attributes: Mapping[str, Any]
    start_time: int
    end_time: int


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*tracing.ENDPOINTS, *tracing.PROTOCOLS, "OTEL_SDK_DISABLED", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


def spans_of(
    monkeypatch: pytest.MonkeyPatch,
    body: Mapping[str, object],
    headers: Mapping[str, str] | None = None,
    path: str = "/generate",
    engines: Mapping[str, FakeEngine] | None = None,
    **settings: Any,
) -> list[EndedSpan]:
    """The spans of one request, the HTTP one last."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr("service.web.app.open_tracer", lambda model: SpanTracer(model, SimpleSpanProcessor(exporter)))

    async def go() -> None:
        async with client_of(app_of(engines or two_engines(), **settings)) as client:
            await client.post(path, json=body, headers=headers)

    asyncio.run(go())
    spans = cast(list[EndedSpan], exporter.get_finished_spans())
    return sorted(spans, key=lambda span: span.kind == SpanKind.SERVER)


def test_a_generation_makes_two_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "hi", "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "max_tokens": 20}
    run, http = spans_of(monkeypatch, body, {"x-request-id": "abc"})
    assert (run.name, run.kind) == ("text_completion fake", SpanKind.INTERNAL)
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "ottava",
        "gen_ai.request.model": "fake",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7.0,
        "gen_ai.request.seed": 3,
        "gen_ai.request.max_tokens": 20,
        "gen_ai.response.model": "fake",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 6,
        "ottava.variant": "w8a8",
    }
    assert {name: run.attributes[name] for name in expected} == expected
    assert run.attributes["gen_ai.response.id"].startswith("gen-")
    assert 0 < run.attributes["gen_ai.response.time_to_first_chunk"] < 5
    assert (http.name, http.kind, http.parent) == ("POST /generate", SpanKind.SERVER, None)
    expected = {"http.request.method": "POST", "http.route": "/generate", "http.response.status_code": 200}
    expected |= {"server.address": "localhost", "url.scheme": "http", "ottava.request_id": "abc"}
    assert {name: http.attributes[name] for name in expected} == expected
    assert run.parent.span_id == http.context.span_id
    assert http.start_time <= run.start_time < run.end_time <= http.end_time
    assert not any(
        value == "hi" or "hello" in str(value) for value in (*run.attributes.values(), *http.attributes.values())
    )


def test_the_callers_trace_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run, http = spans_of(monkeypatch, {"prompt": "hi"}, {"traceparent": PARENT, "tracestate": "a=b"})
    assert f"{http.context.trace_id:032x}" == f"{run.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{http.parent.span_id:016x}" == PARENT.split("-")[2]
    assert spans_of(monkeypatch, {"prompt": "hi"}, {"traceparent": "nonsense"})[-1].parent is None
    assert spans_of(monkeypatch, {"prompt": "hi"}, {"traceparent": PARENT[:-1] + "0"}) == []


def test_a_comparison_has_a_span_for_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, http = spans_of(monkeypatch, {"prompt": "hi", "compare": True})
    assert [span.attributes["ottava.variant"] for span in (first, second)] == ["w8a8", "fp16"]
    assert first.end_time <= second.start_time
    assert http.attributes["http.response.status_code"] == 200


def test_failures_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    run, http = spans_of(monkeypatch, {"prompt": "hi"}, engines=two_engines(fail_at=2))
    assert run.status.status_code == http.status.status_code == StatusCode.ERROR
    assert (run.attributes["error.type"], http.attributes["error.type"]) == ("error", "500")
    assert run.attributes["gen_ai.usage.output_tokens"] == 2
    run, http = spans_of(monkeypatch, {"prompt": "hi", "timeout_s": 0.05}, engines=two_engines(delay_s=0.03))
    assert (run.attributes["error.type"], http.attributes["http.response.status_code"]) == ("timeout", 504)
    (http,) = spans_of(monkeypatch, {"prompt": 1})
    assert http.status.status_code == StatusCode.UNSET


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({ENDPOINT: ""}, False),
        ({ENDPOINT: "http://x"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, True),
        ({ENDPOINT: "http://x", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_traces_are_asked_for_by_the_standard_variables(environment: dict[str, str], expected: bool) -> None:
    assert is_traced(environment) is expected
    if not expected:
        assert open_tracer(lambda: "fake", environment) is None


def test_what_is_not_spoken_or_not_installed_is_told_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match=r"PROTOCOL is 'grpc'.*http/protobuf"):
        open_tracer(lambda: "fake", {ENDPOINT: "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "service.telemetry.spans")
    with pytest.raises(InvalidSettings, match=r"is not installed: pip install 'ottava\[otel\]'"):
        open_tracer(lambda: "fake", {ENDPOINT: "http://x"})


def test_nothing_is_imported_unless_asked() -> None:
    code = (
        "import sys; from tests.support.harness import *; app_of(two_engines()); unwanted = "
        "('opentelemetry.sdk', 'opentelemetry.exporter', 'service.telemetry.spans'); "
        "print([name for name in sys.modules if name.startswith(unwanted)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real exporter, a real socket, the real environment variables; the last spans go out at shutdown."""
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-llm")

    async def go() -> int:
        async with server_of(app_of(two_engines())) as port:
            import httpx

            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                await client.post("/generate", json={"prompt": "hi", "stream": True})
            return port

    try:
        port = asyncio.run(go())
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    ((path, request),) = received
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert names["service.name"] == "my-llm"
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert set(spans) == {"POST /generate", "text_completion fake"}
    attributes = {item.key: item.value for item in spans["POST /generate"].attributes}
    assert attributes["server.port"].int_value == port
