"""OpenTelemetry spans of a request: one for HTTP, and inside it one for each generation.

Spans are created from the times in the record after the request has ended, so that tracing does not slow it down. Only
their trace is chosen on arrival, since the metrics' exemplars name it while the request runs.

Source: OpenTelemetry semantic conventions, HTTP server spans and GenAI inference spans.
"""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import SpanKind, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from quant import __version__
from service.engine.api import FinishReason
from service.telemetry.record import RequestRecord, RunRecord

PROVIDER = "ottava"


class _ChosenIds(RandomIdGenerator):
    """Gives the next root span the trace id that was chosen on its request's arrival."""

    chosen: int | None = None

    def generate_trace_id(self) -> int:
        """The chosen id, else a random one."""
        return super().generate_trace_id() if self.chosen is None else self.chosen


class SpanTracer:
    """Creates the spans of requests of one model and passes them to a processor."""

    def __init__(self, model: Callable[[], str], processor: SpanProcessor) -> None:
        # Resource.create reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, which take precedence.
        resource = Resource({SERVICE_NAME: PROVIDER, "service.version": __version__}).merge(Resource.create())
        self._model = model
        self._ids = _ChosenIds()
        self._provider = TracerProvider(resource=resource, id_generator=self._ids)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(PROVIDER, __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, record: RequestRecord) -> None:
        """Set the trace of a request that has arrived: the caller's if it sent `traceparent`, else a new one."""
        self._ids.chosen = None
        context = self._propagator.extract(record.trace)
        caller = get_current_span(context).get_span_context()
        record.trace_id = caller.trace_id if caller.is_valid else self._ids.generate_trace_id()
        sampling = self._provider.sampler.should_sample(context, record.trace_id, record.method, SpanKind.SERVER)
        record.is_sampled = sampling.decision == Decision.RECORD_AND_SAMPLE

    def trace(self, record: RequestRecord) -> None:
        """Create the spans of a finished request, in the trace that `begin` has set."""
        self._ids.chosen = record.trace_id
        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            context=self._propagator.extract(record.trace),
            kind=SpanKind.SERVER,
            attributes=_http_attributes(record),
            start_time=record.epoch_ns,
        )
        if record.status is None or record.status >= 500:
            span.set_status(StatusCode.ERROR)
        inside, operation = set_span_in_context(span), _operation(record)
        for run in record.runs:
            child = self._tracer.start_span(
                f"{operation} {self._model()}",
                context=inside,
                kind=SpanKind.INTERNAL,
                attributes=self._run_attributes(run, operation),
                start_time=_epoch_ns(record, run.started_s),
            )
            if run.outcome not in tuple(FinishReason):
                child.set_status(StatusCode.ERROR)
            child.end(_epoch_ns(record, run.ended_s))
        span.end(_epoch_ns(record, record.ended_s))

    def close(self) -> None:
        """Send all queued spans and stop."""
        self._provider.shutdown()

    def _run_attributes(self, run: RunRecord, operation: str) -> dict[str, AttributeValue]:
        params, metrics = run.params, run.metrics
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self._model(),
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": float(params.top_k),
            "gen_ai.response.id": run.id,
            "gen_ai.response.model": self._model(),
            "gen_ai.usage.input_tokens": metrics.prompt_tokens,
            "gen_ai.usage.output_tokens": metrics.generated_tokens,
            "gen_ai.usage.cache_read.input_tokens": metrics.cached_tokens,
            "ottava.variant": run.variant,
            "ottava.batch_size_mean": metrics.batch_size_mean,
        }
        if params.seed is not None:
            attributes["gen_ai.request.seed"] = params.seed
        if run.outcome in tuple(FinishReason):
            attributes["gen_ai.response.finish_reasons"] = [run.outcome]
        else:
            attributes["error.type"] = run.outcome
        if metrics.ttft_ms is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = metrics.ttft_ms / 1e3
        if metrics.queue_ms is not None:
            attributes["ottava.queue_time_s"] = metrics.queue_ms / 1e3
        return attributes


def exporting_tracer(model: Callable[[], str]) -> SpanTracer:
    """A tracer that sends batches over OTLP, configured by the OTEL_EXPORTER_OTLP_* variables."""
    return SpanTracer(model, BatchSpanProcessor(OTLPSpanExporter()))


def _http_attributes(record: RequestRecord) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "url.path": record.path,
        "url.scheme": record.scheme,
        "server.address": record.server[0],
        "ottava.request_id": record.id,
        "ottava.key": record.key,
    }
    if record.server[1] is not None:
        attributes["server.port"] = record.server[1]
    if record.status is not None:
        attributes["http.response.status_code"] = record.status
        if record.status >= 500:
            attributes["error.type"] = str(record.status)
    else:
        attributes["error.type"] = "client_gone"
    return attributes


def _operation(record: RequestRecord) -> str:
    return "chat" if record.route.endswith("/chat/completions") else "text_completion"


def _epoch_ns(record: RequestRecord, time_s: float) -> int:
    """Convert a monotonic time to nanoseconds since 1970."""
    return record.epoch_ns + round((time_s - record.received_s) * 1e9)
