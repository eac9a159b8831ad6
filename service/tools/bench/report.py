"""A result as JSON, with the keys of `vllm bench serve`, and as a table."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from quant import __version__
from service.settings import BASELINE
from service.tools.bench.arrivals import Concurrency, Rate
from service.tools.bench.bench import Point, Result
from service.tools.bench.measure import Distribution, Phase, Summary, ratio, summarize
from service.tools.bench.record import Counted

BACKENDS = {"completions": "openai", "chat": "openai-chat", "generate": "ottava"}
"""As vllm names them; the last is ours."""
TIMES = ("ttft", "tpot", "itl", "e2el")


def document(result: Result, command: str, *, label: str | None = None, is_detailed: bool = False) -> dict[str, Any]:
    """One object in the shape of `vllm bench serve` for one load of one name; else {"points": those, "ottava": ...}."""
    run = _run(result, command)
    rows = [_row(result, point, name, label, is_detailed) for point in result.points for name in result.names]
    if len(rows) == 1:
        rows[0]["ottava"] = run | rows[0]["ottava"]
        return rows[0]
    compared = [{"load": str(point.load), "ratios": ratios(result, point)} for point in result.points]
    return {"points": rows, "ottava": run | {"compared": compared}}


def baseline_of(names: Sequence[str]) -> str:
    """fp16 if it is one of them, else the last."""
    return BASELINE if BASELINE in names else names[-1]


def ratios(result: Result, point: Point) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each other name, how much better than the baseline: name -> measure -> ratio, and that of each round.

    Above 1 is better in every measure: times of the baseline over its own, rates of its own over the baseline's.
    """
    baseline, slos = baseline_of(result.names), result.bench.slos
    theirs = point.phases[baseline]
    found = {}
    for name, ours in point.phases.items():
        if name != baseline:
            rounds = [_better([one], [other], slos) for one, other in zip(ours, theirs, strict=True)]
            whole = _better(ours, theirs, slos)
            found[name] = {
                measure: {"ratio": value, "rounds": [each[measure] for each in rounds]}
                for measure, value in whole.items()
            }
    return found


def tables(result: Result) -> Iterator[Table | str]:
    """What the terminal shows at the end."""
    if len(result.points) * len(result.names) == 1:
        yield _distributions(result.summary(result.points[0], result.names[0]), result)
    else:
        yield _rows(result)
    if len(result.names) > 1:
        yield _compared(result)
    yield from _notes(result)


def _run(result: Result, command: str) -> dict[str, Any]:
    bench = result.bench
    return {
        "version": __version__,
        "command": command,
        "client": {"python": platform.python_version(), "cores": os.cpu_count(), "load": list(os.getloadavg())},
        "server": dict(result.info),
        "url": bench.target.url,
        "route": bench.route,
        "inputs": result.material,
        "notes": list(result.notes),
        "slos_ms": dict(bench.slos),
        "rounds": bench.rounds,
        "seed": bench.seed,
        "timeout_s": bench.timeout_s,
        "max_lateness_ms": bench.max_lateness_ms,
    }


def _row(result: Result, point: Point, name: str, label: str | None, is_detailed: bool) -> dict[str, Any]:
    summary, load, route = result.summary(point, name), point.load, result.bench.route
    throughputs = {
        "request_throughput": summary.per_s(summary.completed),
        "request_goodput": None if summary.good is None else summary.per_s(summary.good),
        "output_throughput": summary.per_s(summary.output_tokens),
        "total_token_throughput": summary.per_s(summary.input_tokens + summary.output_tokens),
    }
    row: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": BACKENDS[route],
        "backend": BACKENDS[route],
        "label": label,
        "model_id": name or result.info.get("model"),
        "tokenizer_id": None,
        "num_prompts": summary.sent,
        "request_rate": load.rate if isinstance(load, Rate) else "inf",
        "burstiness": load.burstiness if isinstance(load, Rate) else 1.0,
        "max_concurrency": load.streams if isinstance(load, Concurrency) else None,
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.sent - summary.completed,
        "total_input_tokens": summary.input_tokens,
        "total_output_tokens": summary.output_tokens,
        **throughputs,
        "max_output_tokens_per_s": summary.max_output_tokens_per_s,
        "max_concurrent_requests": summary.max_concurrent,
    }
    for time in TIMES:
        row |= _keys(time, getattr(summary, time))
    if is_detailed:
        row |= _details(point.phases[name])
    return row | {"ottava": _own(result, point, name, summary)}


def _keys(time: str, found: Distribution | None) -> dict[str, float | None]:
    """mean_ttft_ms and its kin; null where nothing was measured, which vllm writes as 0."""
    values = (None,) * 6 if found is None else (found.mean, found.p50, found.std, found.p50, found.p90, found.p99)
    return {f"{word}_{time}_ms": value for word, value in zip(_WORDS, values, strict=True)}


_WORDS = ("mean", "median", "std", "p50", "p90", "p99")


def _own(result: Result, point: Point, name: str, summary: Summary) -> dict[str, Any]:
    why = result.why_invalid(point, name)
    return {
        "name": name,
        "load": str(point.load),
        "valid": why is None,
        "why_invalid": why,
        "why_saturated": result.why_saturated(point, name),
        "from_schedule": {**_keys("ttft", summary.scheduled_ttft), **_keys("e2el", summary.scheduled_e2el)},
        "lateness_ms": _spread(summary.lateness),
        "loop_lag_ms": _spread(summary.lag),
        "generator_cpu_share": summary.cpu_share,
        "errors": dict(summary.errors),
        "error_details": dict(summary.details),
        "tokens_counted_by": list(summary.counted),
        "tokens_per_event": summary.tokens_per_event,
        "itl_between": "tokens" if list(summary.counted) == [Counted.IDS] else "events",
        "good_requests": summary.good,
        "cached_input_tokens": summary.cached_tokens,
    }


def _spread(found: Distribution | None) -> dict[str, float] | None:
    return None if found is None else {"p50": found.p50, "p99": found.p99, "max": found.max}


def _details(phases: Sequence[Phase]) -> dict[str, list[Any]]:
    """One entry per request, as `vllm bench serve --save-detailed` writes them; text is not kept."""
    records = [record for phase in phases for record in phase.records]
    start_s = min((record.sent_s for record in records), default=0.0)
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [record.ttft_s if record.token_s else None for record in records],
        "itls": [record.gaps_s for record in records],
        "latencies": [record.e2e_s if record.token_s else None for record in records],
        "start_times": [record.sent_s - start_s for record in records],
        "queue_times": [record.sent_s - record.scheduled_s for record in records],
        "errors": [f"{record.error}: {record.detail}" if record.error else "" for record in records],
    }


def _better(ours: Sequence[Phase], theirs: Sequence[Phase], slos: Mapping[str, float]) -> dict[str, float | None]:
    mine, base = summarize(ours, slos), summarize(theirs, slos)
    found: dict[str, float | None] = {}
    for time in TIMES:
        one, other = getattr(mine, time), getattr(base, time)
        for word in ("p50", "p99"):
            found[f"{time}_{word}"] = ratio(_of(other, word), _of(one, word))
    found["request_throughput"] = ratio(mine.per_s(mine.completed), base.per_s(base.completed))
    found["output_throughput"] = ratio(mine.per_s(mine.output_tokens), base.per_s(base.output_tokens))
    if mine.good is not None and base.good is not None:
        found["request_goodput"] = ratio(mine.per_s(mine.good), base.per_s(base.good))
    return found


def _of(found: Distribution | None, word: str) -> float | None:
    return None if found is None else float(getattr(found, word))


def _distributions(summary: Summary, result: Result) -> Table:
    table = Table("ms", "mean", "std", "p50", "p90", "p99", "max", title=_title(result))
    for time, found in [
        ("TTFT", summary.ttft),
        ("TPOT", summary.tpot),
        ("ITL", summary.itl),
        ("E2E", summary.e2el),
        ("TTFT from schedule", summary.scheduled_ttft),
        ("E2E from schedule", summary.scheduled_e2el),
        ("sent late by", summary.lateness),
    ]:
        if found is not None:
            cells = (found.mean, found.std, found.p50, found.p90, found.p99, found.max)
            table.add_row(time, *(f"{cell:.1f}" for cell in cells))
    return table


def _rows(result: Result) -> Table:
    table = Table(title=_title(result))
    for heading in ("load", "name", "answered", "req/s", "tokens/s", *(["good/s"] if result.bench.slos else [])):
        table.add_column(heading, justify="left" if heading in ("load", "name") else "right")
    for heading in ("TTFT p50", "p99", "TPOT p50", "p99", "ITL p99", "E2E p50", "p99", "late p99"):
        table.add_column(heading, justify="right")
    for point in result.points:
        for name in result.names:
            table.add_row(*_cells(result, point, name))
    return table


def _cells(result: Result, point: Point, name: str) -> Iterator[str]:
    summary = result.summary(point, name)
    mark = "!" if result.why_invalid(point, name) else ""
    mark += "*" if result.why_saturated(point, name) else ""
    yield str(point.load) + mark
    yield name
    yield f"{summary.completed}/{summary.sent}"
    yield f"{summary.per_s(summary.completed):.2f}"
    yield f"{summary.per_s(summary.output_tokens):.1f}"
    if result.bench.slos:
        yield f"{summary.per_s(summary.good or 0):.2f}"
    for found, word in (
        (summary.ttft, "p50"),
        (summary.ttft, "p99"),
        (summary.tpot, "p50"),
        (summary.tpot, "p99"),
        (summary.itl, "p99"),
        (summary.e2el, "p50"),
        (summary.e2el, "p99"),
        (summary.lateness, "p99"),
    ):
        value = _of(found, word)
        yield "-" if value is None else f"{value:.1f}"


def _title(result: Result) -> str:
    return f"{result.bench.target.url} · {result.bench.route} · {result.material} · times in ms"


def _compared(result: Result) -> Table:
    baseline = baseline_of(result.names)
    found = [(str(point.load), name, row) for point in result.points for name, row in ratios(result, point).items()]
    measures = [*found[0][2]]
    table = Table("load", "name", *(measure.replace("_", " ") for measure in measures))
    table.title = f"how many times better than {baseline}; in brackets the rounds' lowest and highest"
    for load, name, row in found:
        table.add_row(load, name, *(_ratio(row[measure]) for measure in measures))
    return table


def _ratio(found: Mapping[str, Any]) -> str:
    if found["ratio"] is None:
        return "-"
    rounds = [each for each in found["rounds"] if each is not None]
    spread = f" ({min(rounds):.2f}-{max(rounds):.2f})" if len(rounds) > 1 else ""
    return f"{found['ratio']:.2f}{spread}"


def _notes(result: Result) -> Iterator[str]:
    summaries = [(point, name, result.summary(point, name)) for point in result.points for name in result.names]
    yield from result.notes
    counted = sorted({word for _, _, summary in summaries for word in summary.counted})
    shares = [summary.tokens_per_event for _, _, summary in summaries if summary.tokens_per_event is not None]
    between = "tokens" if counted == [Counted.IDS] else f"events, of {max(shares, default=1.0):.2f} tokens at most"
    yield f"tokens counted by {' and '.join(counted)}; ITL between {between}"
    if len(summaries) == 1:
        yield from _throughput(summaries[0][2])
    cpu = max(summary.cpu_share for _, _, summary in summaries)
    yield f"the generator took {100 * cpu:.0f} % of a core at most"
    for point, name, summary in summaries:
        where = " · ".join([str(point.load), *([name] if name else [])])
        if summary.cached_tokens:
            share = 100 * summary.cached_tokens / summary.input_tokens
            yield (
                f"{where}: {share:.0f} % of the prompts' tokens were in the server's prefix cache; the same --seed "
                "sends the same prompts again"
            )
        for kind, number in summary.errors.items():
            yield f"{where}: {number} x {kind}: {summary.details[kind]}"
        if (why := result.why_saturated(point, name)) is not None:
            yield f"* saturated, {where}: {why}"
        if (why := result.why_invalid(point, name)) is not None:
            yield f"! INVALID, {where}: {why}; give the generator a core of its own, or lower the load"


def _throughput(summary: Summary) -> Iterator[str]:
    good = "" if summary.good is None else f", {summary.good} within the SLOs ({summary.per_s(summary.good):.2f}/s)"
    yield f"{summary.completed} of {summary.sent} requests answered in {summary.duration_s:.1f} s{good}"
    yield (
        f"{summary.per_s(summary.completed):.2f} requests/s, "
        f"{summary.per_s(summary.output_tokens):.1f} output tokens/s, "
        f"{summary.per_s(summary.input_tokens + summary.output_tokens):.1f} tokens/s in all, "
        f"{summary.max_concurrent} requests in flight at most"
    )
