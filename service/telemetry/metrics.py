"""Prometheus metrics of one app, in its own registry: runs are observed here, engines are read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from service.engine.api import Engine, EngineStats, FinishReason, HostInfo, RankInfo, Token
from service.errors import CapacityError, ClientGone, NotReady, OttavaError, RequestError, leaves
from service.measures import Agreement, RunMetrics, Speedup
from service.process import is_running
from service.telemetry.record import RequestRecord

# fmt: off
TTFT_BUCKETS = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
TOKEN_BUCKETS = (.001, .002, .003, .004, .005, .0075, .01, .015, .02, .025, .05, .075, .1, .15, .2, .3, .5, .75, 1, 2.5)
E2E_BUCKETS = (.1, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240)
LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SPEEDUP_BUCKETS = (.25, .5, .75, .9, 1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8)
AGREEMENT_BUCKETS = (0, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .99, 1)
DELTA_BUCKETS = (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5)
# fmt: on

How = Literal["compare", "shadow"]
"""The origin of a comparison: a request with `compare`, or shadow mode."""

ERROR, REJECTED, TIMEOUT = "error", "rejected", "timeout"
OUTCOMES = (*FinishReason, ERROR, REJECTED, TIMEOUT)
HOWS: tuple[How, ...] = ("compare", "shadow")
REPLAYED, DROPPED, ABANDONED = "replayed", "dropped", "abandoned"
RELOADED, FAILED = "reloaded", "failed"
WHOLE_BODY, UNKNOWN_FIELD, NO_FIELD = "body", "unknown", "none"
"""Labels of refusals that blame the body as a whole, a field that no body has, or nothing in a body."""
NO_VARIANT = "none"
"""Label of a request with an unreadable body, or with a variant that is not served."""

REASONS = sorted(
    {kind.code for kind in leaves() if issubclass(kind, (RequestError, CapacityError))} - {OttavaError.code}
)
"""Codes of the errors that refuse a request."""


@dataclass(slots=True)
class Exemplar:
    """What the observations of one run carry, so that a slow one leads to its trace. Its labels are never changed."""

    labels: dict[str, str]
    _longest_gap_s: float = 0.0

    def of_gap(self, gap_s: float) -> dict[str, str] | None:
        """The labels, if no earlier gap of the run was as long: marking every token would cost 3 us each."""
        if gap_s <= self._longest_gap_s:
            return None
        self._longest_gap_s = gap_s
        return self.labels


def exemplar_of(record: RequestRecord | None) -> Exemplar | None:
    """The exemplar of a request's runs; None unless its trace will be exported."""
    if record is None or record.trace_id is None or not record.is_sampled:
        return None
    return Exemplar({"trace_id": f"{record.trace_id:032x}"})


class ServiceMetrics:
    """The metrics of the web and, read from `Engine.stats`, of the engines. Most have a label `variant`.

    Args:
        engines: variant -> engine.
        info: returns what is served; raises NotReady before the engines are open.
        is_ready: whether a variant takes requests.
        engine_pid: returns the process of the engines, or None.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        info: Callable[[], HostInfo],
        *,
        is_ready: Callable[[str], bool] = lambda _: True,
        engine_pid: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engines, info, is_ready))
        ProcessCollector(registry=self._registry)
        # A folder of /proc that does not exist gives no series.
        ProcessCollector("ottava_engine", lambda: engine_pid() or "none", registry=self._registry)
        self._ttft = self._histogram("time_to_first_token_seconds", "First token sent - received", TTFT_BUCKETS)
        self._itl = self._histogram("inter_token_latency_seconds", "Between tokens sent", TOKEN_BUCKETS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "(e2e - ttft) / (generated - 1), per request", TOKEN_BUCKETS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Last token sent - received", E2E_BUCKETS)
        self._queue = self._histogram("request_queue_time_seconds", "Received to first step", TTFT_BUCKETS)
        self._prefill = self._histogram("request_prefill_time_seconds", "First step to first token", TTFT_BUCKETS)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last", E2E_BUCKETS)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens per request", LENGTH_BUCKETS)
        self._length = self._histogram("request_generation_tokens", "Generated tokens per request", LENGTH_BUCKETS)
        self._speedup = self._histogram(
            "speedup_ratio", "Baseline time / this variant's time, same request", SPEEDUP_BUCKETS, "measure", "how"
        )
        self._agreement = self._histogram("agreement_ratio", "Tokens equal to the baseline's", AGREEMENT_BUCKETS, "how")
        self._delta = self._histogram(
            "logprob_delta_nats", "Mean |log-probability - baseline's| while texts agree", DELTA_BUCKETS, "how"
        )
        self._shadow = self._counter("shadow", "Requests drawn for shadow mode by what became of them", "outcome")
        self._requests = self._counter("requests", "Runs by how they ended", "outcome")
        self._refused = Counter(
            "refused_requests",
            "Refused requests by the error's code and the field at fault",
            ("reason", "field"),
            namespace="ottava",
            registry=self._registry,
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of runs that got a first token")
        self._tokens = self._counter("generation_tokens", "Tokens sent")
        self._per_token: dict[str, tuple[Counter, Histogram]] = {}
        self._cached = self._counter("prefix_cache_hit_tokens", "Prompt tokens found in the cache")
        self._reloads = Counter(
            "reloads", "Reloads of the int8 checkpoint", ("outcome",), namespace="ottava", registry=self._registry
        )
        for reason in REASONS:
            self._refused.labels(reason, NO_FIELD)
        for outcome in (RELOADED, FAILED):
            self._reloads.labels(outcome)
        for variant in engines:
            for counter in (self._prompt_tokens, self._tokens, self._cached):
                counter.labels(variant)
            for outcome in OUTCOMES:
                self._requests.labels(variant, outcome)
            for outcome in (REPLAYED, DROPPED, ABANDONED):
                self._shadow.labels(variant, outcome)

    def exposition(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self._registry)

    def openmetrics(self) -> bytes:
        """All series in the OpenMetrics format, with exemplars."""
        exposition: bytes = openmetrics.generate_latest(self._registry)  # type: ignore[no-untyped-call]
        return exposition

    def count(self, variant: str, outcome: str) -> None:
        """Count the outcome of a run, or of a request that was refused before it had one."""
        self._requests.labels(variant, outcome).inc()

    @contextmanager
    def counting_refusals(self, variant: str) -> Iterator[None]:
        """Count an exception inside as `rejected`, or as `error` if the server is at fault; not that a client left."""
        try:
            yield
        except ClientGone:
            raise
        except (RequestError, CapacityError):
            self.count(variant, REJECTED)
            raise
        except Exception:
            self.count(variant, ERROR)
            raise

    def first_token(
        self, variant: str, num_prompt: int, num_cached: int, ttft_s: float, exemplar: Exemplar | None = None
    ) -> None:
        """Observe the first token of a run. num_cached: its prompt tokens that were found in the cache."""
        self._ttft.labels(variant).observe(ttft_s, None if exemplar is None else exemplar.labels)
        self._prompt_tokens.labels(variant).inc(num_prompt)
        self._cached.labels(variant).inc(num_cached)

    def tokens_sent(self, variant: str, sent_s: Sequence[float], new: int, exemplar: Exemplar | None = None) -> None:
        """Observe the last `new` of the tokens sent so far."""
        # Looking both up by label takes 3 us, a twentieth of the cost of a token.
        found = self._per_token.get(variant)
        if found is None:
            found = self._per_token[variant] = self._tokens.labels(variant), self._itl.labels(variant)
        tokens, gaps = found
        tokens.inc(new)
        for place in range(max(1, len(sent_s) - new), len(sent_s)):
            gap_s = sent_s[place] - sent_s[place - 1]
            gaps.observe(gap_s, None if exemplar is None else exemplar.of_gap(gap_s))

    def finished(
        self, variant: str, times: RunMetrics, tokens: Sequence[Token], exemplar: Exemplar | None = None
    ) -> None:
        """Observe a run that finished normally, neither cut off nor failed."""
        labels = None if exemplar is None else exemplar.labels
        self._prompt_length.labels(variant).observe(times.prompt_tokens)
        self._length.labels(variant).observe(times.generated_tokens)
        for histogram, value_ms in (
            (self._queue, times.queue_ms),
            (self._prefill, times.prefill_ms),
            (self._tpot, times.tpot_ms),
            (self._e2e, times.e2e_ms),
        ):
            if value_ms is not None:
                histogram.labels(variant).observe(value_ms / 1e3, labels)
        if tokens:
            self._decode.labels(variant).observe(tokens[-1].time_s - tokens[0].time_s, labels)

    def compared(self, how: How, variant: str, speedup: Speedup | None, agreement: Agreement) -> None:
        """Observe one comparison with the baseline; speedup is None if other requests ran meanwhile."""
        for measure in ("ttft", "tpot", "e2e"):
            ratio = getattr(speedup, measure, None)
            if ratio is not None:
                self._speedup.labels(variant, measure, how).observe(ratio)
        self._agreement.labels(variant, how).observe(agreement.match_ratio)
        if agreement.logprob_delta_mean is not None:
            self._delta.labels(variant, how).observe(agreement.logprob_delta_mean)

    def shadowed(self, variant: str, outcome: str) -> None:
        """Count the outcome of a request sampled by shadow mode: replayed, dropped or abandoned."""
        self._shadow.labels(variant, outcome).inc()

    def refused_for(self, error: OttavaError, field: str = NO_FIELD) -> None:
        """Count a request that was refused, unless the server is at fault. field: has few values."""
        if isinstance(error, (RequestError, CapacityError)):
            self._refused.labels(error.code, field).inc()

    def reloaded(self, outcome: str) -> None:
        """Count a finished reload: reloaded, or failed with the old weights still in use."""
        self._reloads.labels(outcome).inc()

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        names = ("variant", *labels)
        return Histogram(name, text, names, namespace="ottava", buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("variant", *labels), namespace="ottava", registry=self._registry)


class _EngineCollector(Collector):
    """Metrics from `Engine.stats()`, read at each scrape so that they are always current."""

    def __init__(
        self, engines: Mapping[str, Engine], info: Callable[[], HostInfo], is_ready: Callable[[str], bool]
    ) -> None:
        self._engines = engines
        self._info = info
        self._is_ready = is_ready

    def describe(self) -> Iterable[Metric]:
        """Returns nothing, because an engine need not be readable while the registry is built."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Read every engine once."""
        stats = {variant: engine.stats() for variant, engine in self._engines.items()}
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(f"ottava_{name}", text, labels=["variant"])
            for variant, reading in stats.items():
                gauge.add_metric([variant], read(reading))
            yield gauge
        ready = GaugeMetricFamily("ottava_ready", "1 if the variant takes requests, else 0", labels=["variant"])
        for variant in self._engines:
            ready.add_metric([variant], float(self._is_ready(variant)))
        yield ready
        preemptions = CounterMetricFamily("ottava_preemptions", "Requests put back to recompute", labels=["variant"])
        restarts = CounterMetricFamily(
            "ottava_engine_restarts", "Restarts after a fault, in the same process or a new one", labels=["variant"]
        )
        steps = CounterMetricFamily(
            "ottava_steps",
            "Steps by how they were launched: as one graph, or kernel by kernel",
            labels=["variant", "kind"],
        )
        padding = CounterMetricFamily(
            "ottava_step_padding_tokens", "Token rows that filled steps up to the sizes of graphs", labels=["variant"]
        )
        late = CounterMetricFamily(
            "ottava_late_steps", "Steps not launched before the end of the one before", labels=["variant"]
        )
        drafts = CounterMetricFamily(
            "ottava_speculative_draft_tokens", "Draft tokens that a step has checked", labels=["variant"]
        )
        accepted = CounterMetricFamily(
            "ottava_speculative_accepted_tokens", "Draft tokens that were right", labels=["variant"]
        )
        batches = HistogramMetricFamily("ottava_step_batch_size", "Requests per step", labels=["variant"])
        for variant, reading in stats.items():
            preemptions.add_metric([variant], reading.num_preemptions)
            restarts.add_metric([variant], reading.num_restarts)
            steps.add_metric([variant, "graph"], reading.num_graph_steps)
            steps.add_metric([variant, "plain"], reading.num_plain_steps)
            padding.add_metric([variant], reading.num_padding_tokens)
            late.add_metric([variant], reading.num_late_steps)
            drafts.add_metric([variant], reading.num_draft_tokens)
            accepted.add_metric([variant], reading.num_accepted_tokens)
            batches.add_metric([variant], *_batch_histogram(reading.step_batch_sizes))
        yield preemptions
        yield restarts
        yield steps
        yield padding
        yield late
        yield drafts
        yield accepted
        yield batches
        yield from self._of_info()

    def _of_info(self) -> Iterator[Metric]:
        """The series that are read from /info; empty before the engines are open."""
        described = InfoMetricFamily("ottava", "What is served", labels=["variant"])
        divergence = GaugeMetricFamily(
            "ottava_self_check_kl_nats", "Mean KL divergence from the baseline on fixed prompts", labels=["variant"]
        )
        ranks = _rank_families()
        with suppress(NotReady):
            info = self._info()
            for rank in info.ranks:
                _add_rank(ranks, rank)
            self._describe(described, info)
            for variant, own in info.variants.items():
                if own.self_check_kl is not None:
                    divergence.add_metric([variant], own.self_check_kl)
        yield described
        yield divergence
        yield from ranks.values()

    def _describe(self, family: InfoMetricFamily, info: HostInfo) -> None:
        """One series per variant, labelled only with constant texts of /info, as a changed label makes a new series."""
        texts = {"model": info.model, "family": info.family, "device": info.device}
        for variant, engine in self._engines.items():
            own = {"variant": variant, "dtype": engine.dtype, "max_model_len": str(engine.max_model_len)}
            family.add_metric([variant], {**texts, **own})


def _rank_families() -> dict[str, GaugeMetricFamily]:
    texts = {
        "up": ("1 while the rank's process runs, else 0", ["rank"]),
        "free_bytes": ("Free memory of the rank's GPU at the last start, self-check or reload", ["rank"]),
        "weight_bytes": ("Memory of the rank's part of the weights", ["variant", "rank"]),
        "kv_cache_bytes": ("Memory of the rank's part of the KV cache", ["variant", "rank"]),
    }
    return {name: GaugeMetricFamily(f"ottava_rank_{name}", text, labels=own) for name, (text, own) in texts.items()}


def _add_rank(families: Mapping[str, GaugeMetricFamily], rank: RankInfo) -> None:
    families["up"].add_metric([str(rank.rank)], float(is_running(rank.pid)))
    if rank.free_bytes is not None:
        families["free_bytes"].add_metric([str(rank.rank)], rank.free_bytes)
    for name, sizes in (("weight_bytes", rank.weight_bytes), ("kv_cache_bytes", rank.kv_cache_bytes)):
        for variant, num_bytes in sizes.items():
            families[name].add_metric([variant, str(rank.rank)], num_bytes)


_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("num_requests_running", "Requests in the batch", lambda stats: stats.num_running),
    ("num_requests_waiting", "Requests in the queue", lambda stats: stats.num_waiting),
    ("kv_cache_usage_ratio", "Blocks in use / blocks", lambda stats: stats.kv_cache_usage_ratio),
    ("weight_bytes", "Memory of the weights", lambda stats: stats.weight_bytes),
    ("kv_cache_bytes", "Memory of the KV cache", lambda stats: stats.kv_cache_bytes),
)


def _batch_histogram(counts: Sequence[int]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets and sum of a histogram, from counts[n] steps of n requests."""
    cumulative = list(accumulate(counts))
    total = cumulative[-1] if cumulative else 0
    buckets = [(str(float(le)), float(cumulative[le] if le < len(counts) else total)) for le in BATCH_BUCKETS]
    return [*buckets, ("+Inf", float(total))], float(sum(size * count for size, count in enumerate(counts)))
