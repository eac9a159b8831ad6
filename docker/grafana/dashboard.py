"""Writes the dashboard, `dashboards/ottava.json`, with Grafana's own types. Run it with `make dashboard`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from grafana_foundation_sdk.builders import common as options
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DataSourceRef,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

OUT = Path(__file__).with_name("dashboards") / "ottava.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="$datasource")
CHOSEN = 'instance=~"$instance", variant=~"$variant"'
INSTANCE = 'instance=~"$instance"'
OR_UNKNOWN = 'instance=~"$instance", variant=~"$variant|none"'
NOT_IDENTICAL = f'{CHOSEN}, le="0.99"'
RATE, COMPARED = "[$__rate_interval]", "[10m]"
"""Comparisons are rare: a window of a few scrapes would often hold none."""

COLORS = (
    ("/w8a8/", "green"),
    ("/fp16/", "blue"),
    ("/^(stop|length)$/", "green"),
    ("/^(error|timeout)$/", "red"),
    ("/^(abort|rejected)$/", "orange"),
)
"""Of lines, by their names."""

STAT_HEIGHT, PANEL_HEIGHT = 4, 7
TTFT_LIMIT_S, ITL_LIMIT_S, LATE_RATIO, FAILED_RATIO, KV_RATIO = 0.5, 0.05, 0.01, 0.05, 0.95
"""Limits of the alerts, in ../prometheus/rules."""


@dataclass(frozen=True)
class Query:
    """A query and the name of its lines."""

    expr: str
    legend: str
    has_exemplars: bool = False


@dataclass(frozen=True)
class Panel:
    """A panel.

    text: what it shows, under its i.
    unit: Grafana's name of it.
    width: of the 24 columns.
    limit: drawn as a dashed line.
    colors: (from, color) of a stat's value; empty for lines.
    """

    title: str
    text: str
    unit: str
    queries: tuple[Query, ...]
    width: int
    limit: float | None = None
    top: float | None = None
    decimals: int | None = None
    is_stacked: bool = False
    colors: tuple[tuple[float | None, str], ...] = field(default=())

    @property
    def is_stat(self) -> bool:
        return bool(self.colors)


def quantile(q: float, series: str, by: str, where: str = CHOSEN, window: str = RATE) -> str:
    """A quantile of a histogram, for each value of `by`."""
    grouped = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, sum by ({grouped}) (rate({series}_bucket{{{where}}}{window})))"


def rate(series: str, by: str, where: str = CHOSEN, window: str = RATE) -> str:
    """A counter's increase per second, for each value of `by`."""
    return f"sum by ({by}) (rate({series}{{{where}}}{window}))"


def mean(series: str, by: str, window: str = RATE) -> str:
    """The mean of a histogram, for each value of `by`."""
    return f"{rate(f'{series}_sum', by, window=window)} / {rate(f'{series}_count', by, window=window)}"


def refusals(by: str, matching: str = "") -> Query:
    """Refused requests per second by a label with many values: those above 0, else a line `none` at 0."""
    counted = f"{rate('ottava_refused_requests_total', by, INSTANCE + matching)} > 0"
    return Query(f'({counted}) or on() label_replace(vector(0), "{by}", "none", "", "")', f"{{{{{by}}}}}")


def quantiles(series: str, *qs: float) -> tuple[Query, ...]:
    """Quantiles of a latency by variant, with the traces of slow requests."""
    return tuple(
        Query(quantile(q, series, "variant"), f"{{{{variant}}}} p{100 * q:g}", has_exemplars=q == max(qs)) for q in qs
    )


def median_speedup(measure: str) -> Query:
    """The median over the whole time shown."""
    where = f'{CHOSEN}, measure="{measure}"'
    return Query(quantile(0.5, "ottava_speedup_ratio", "", where, "[$__range]"), measure)


GAIN = ((None, "red"), (1.0, "green"))
AGREEMENT, SPEEDUP, DELTA = "ottava_agreement_ratio", "ottava_speedup_ratio", "ottava_logprob_delta_nats"
TPOT = "ottava_request_time_per_output_token_seconds"
STEPS, LATE_STEPS = "ottava_steps_total", "ottava_late_steps_total"
DRAFTS, RIGHT_DRAFTS = "ottava_speculative_draft_tokens_total", "ottava_speculative_accepted_tokens_total"

COMPARISON = (
    Panel(
        "Speed-up per token",
        "Median of TPOT on fp16 / TPOT here, same request, over the time shown.",
        "suffix:x", (median_speedup("tpot"),), 4, decimals=2, colors=GAIN,
    ),
    Panel(
        "Speed-up of the first token",
        "Median of TTFT on fp16 / TTFT here, same request, over the time shown.",
        "suffix:x", (median_speedup("ttft"),), 4, decimals=2, colors=GAIN,
    ),
    Panel(
        "Agreement",
        "Tokens equal to the baseline's, mean over the comparisons of the time shown.",
        "percentunit",
        (
            Query(
                f"sum(increase({AGREEMENT}_sum{{{CHOSEN}}}[$__range]))"
                f" / sum(increase({AGREEMENT}_count{{{CHOSEN}}}[$__range]))",
                "agreement",
            ),
        ),
        4, decimals=1, colors=((None, "text"),),
    ),
    Panel(
        "KL divergence of the self-check",
        "From the baseline, mean over the fixed prompts of the last start or reload. Above 2 a variant is refused.",
        "suffix: nats",
        (Query(f"max by (variant) (ottava_self_check_kl_nats{{{CHOSEN}}})", "{{variant}}"),),
        4, decimals=4, colors=((None, "green"), (0.1, "orange"), (1.0, "red")),
    ),
    Panel(
        "Comparisons",
        "Requests with `compare` and replays of shadow mode in the time shown.",
        "short", (Query(f"sum(increase({AGREEMENT}_count{{{CHOSEN}}}[$__range]))", "comparisons"),),
        4, decimals=0, colors=((None, "text"),),
    ),
    Panel(
        "Alerts firing",
        "docs/monitoring.md says what to do at each.",
        "short", (Query('count(ALERTS{alertname=~"Ottava.*", alertstate="firing"}) or vector(0)', "alerts"),),
        4, decimals=0, colors=((None, "green"), (1.0, "red")),
    ),
    Panel(
        "Speed-up over fp16, median",
        "Of comparisons that had the device to themselves, over ten minutes. Below the line INT8 is slower.",
        "suffix:x", (Query(quantile(0.5, SPEEDUP, "measure", window=COMPARED), "{{measure}}"),), 8, limit=1.0,
    ),
    Panel(
        "Speed-up per token, spread",
        "The middle 80 % of comparisons, over ten minutes.",
        "suffix:x",
        tuple(
            Query(quantile(q, SPEEDUP, "", f'{CHOSEN}, measure="tpot"', COMPARED), f"p{100 * q:g}")
            for q in (0.1, 0.5, 0.9)
        ),
        8, limit=1.0,
    ),
    Panel(
        "Time per token, median",
        "TPOT of all requests, compared or not: the variants answer different requests at different load.",
        "s", (Query(quantile(0.5, TPOT, "variant"), "{{variant}}"),), 8,
    ),
    Panel(
        "Agreement with fp16",
        "Mean share of equal tokens, and share of answers that are equal (or all but one token in a hundred).",
        "percentunit",
        (
            Query(mean(AGREEMENT, "how", COMPARED), "mean, {{how}}"),
            Query(
                f"1 - {rate(f'{AGREEMENT}_bucket', 'how', NOT_IDENTICAL, COMPARED)}"
                f" / {rate(f'{AGREEMENT}_count', 'how', window=COMPARED)}",
                "identical, {{how}}",
            ),
        ),
        8, top=1.0,
    ),
    Panel(
        "Distance of log-probabilities",
        "Mean over an answer of |log-probability - the baseline's| while texts agree: drift that no token shows yet.",
        "suffix: nats",
        tuple(Query(quantile(q, DELTA, "how", window=COMPARED), f"{{{{how}}}} p{100 * q:g}") for q in (0.5, 0.9)),
        8,
    ),
    Panel(
        "Comparisons per minute",
        "And what became of the requests that shadow mode drew.",
        "short",
        (
            Query(f"60 * {rate(f'{AGREEMENT}_count', 'how')}", "{{how}}"),
            Query(f"60 * {rate('ottava_shadow_total', 'outcome')}", "shadow: {{outcome}}"),
        ),
        8,
    ),
)  # fmt: skip

REQUESTS = (
    Panel(
        "Requests by outcome",
        "Runs that ended, a second. Rejected ones count no fault of the server: bad requests, full queues, limits.",
        "reqps",
        (Query(rate("ottava_requests_total", "outcome", OR_UNKNOWN), "{{outcome}}"),),
        8, is_stacked=True,
    ),
    Panel(
        "Failed requests",
        "Errors and timeouts of all runs that were not refused, over five minutes.",
        "percentunit",
        (Query('job_variant:ottava_failed_requests:ratio_rate5m{variant=~"$variant"}', "{{variant}}"),),
        8, limit=FAILED_RATIO,
    ),
    Panel(
        "Tokens",
        "Per second: prompt tokens of runs that got a first token, and tokens sent.",
        "suffix: tok/s",
        (
            Query(rate("ottava_generation_tokens_total", "variant"), "{{variant}} generated"),
            Query(rate("ottava_prompt_tokens_total", "variant"), "{{variant}} prompt"),
        ),
        8,
    ),
    Panel(
        "First token",
        "TTFT: first token sent - request received. 99 % are to be within the line.",
        "s", quantiles("ottava_time_to_first_token_seconds", 0.5, 0.99), 8, limit=TTFT_LIMIT_S,
    ),
    Panel(
        "Between tokens",
        "ITL: gaps between tokens sent. 99 % are to be within the line.",
        "s", quantiles("ottava_inter_token_latency_seconds", 0.5, 0.99), 8, limit=ITL_LIMIT_S,
    ),
    Panel(
        "Whole answer",
        "E2E: last token sent - request received.",
        "s", quantiles("ottava_e2e_request_latency_seconds", 0.5, 0.99), 8,
    ),
    Panel(
        "Late, of all",
        "Share of first tokens and of gaps that missed their limit in the last hour. The line: what 30 days may have.",
        "percentunit",
        (Query('job_variant:ottava_slo_misses:ratio_rate1h{variant=~"$variant"}', "{{variant}} {{slo}}"),),
        8, limit=LATE_RATIO,
    ),
    Panel(
        "Queue and prefill time",
        "The two parts of a first token's time, 90th percentile.",
        "s",
        (
            Query(quantile(0.9, "ottava_request_queue_time_seconds", "variant"), "{{variant}} queue"),
            Query(quantile(0.9, "ottava_request_prefill_time_seconds", "variant"), "{{variant}} prefill"),
        ),
        8,
    ),
    Panel(
        "Lengths",
        "Mean tokens of prompts and answers.",
        "short",
        (
            Query(mean("ottava_request_prompt_tokens", "variant"), "{{variant}} prompt"),
            Query(mean("ottava_request_generation_tokens", "variant"), "{{variant}} generated"),
        ),
        8,
    ),
    Panel(
        "Decode time",
        "The rest of an answer: last token - first token.",
        "s", quantiles("ottava_request_decode_time_seconds", 0.5, 0.99), 8,
    ),
    Panel(
        "Refused, by reason",
        "Requests a second by the code of the error, as docs/api.md lists them: limits, keys, bad requests.",
        "reqps", (refusals("reason"),), 8,
    ),
    Panel(
        "Bad requests, by field",
        "Requests a second answered 400, 404 or 422, by the field at fault; body: not readable, unknown: of no route.",
        "reqps", (refusals("field", ', field!="none"'),), 8,
    ),
)  # fmt: skip

ENGINE = (
    Panel(
        "KV cache in use",
        "Blocks in use / blocks. Above the line for minutes, requests wait or are preempted.",
        "percentunit",
        (Query(f"max by (variant) (ottava_kv_cache_usage_ratio{{{CHOSEN}}})", "{{variant}}"),),
        6, limit=KV_RATIO, top=1.05,
    ),
    Panel(
        "Requests running and waiting",
        "In the batch, and in the queue.",
        "short",
        (
            Query(f"sum by (variant) (ottava_num_requests_running{{{CHOSEN}}})", "{{variant}} running"),
            Query(f"sum by (variant) (ottava_num_requests_waiting{{{CHOSEN}}})", "{{variant}} waiting"),
        ),
        6,
    ),
    Panel(
        "Step batch size",
        "Requests per step.",
        "short",
        (
            Query(mean("ottava_step_batch_size", "variant"), "{{variant}} mean"),
            Query(quantile(0.9, "ottava_step_batch_size", "variant"), "{{variant}} p90"),
        ),
        6,
    ),
    Panel(
        "Steps",
        "Per second, by launch: as one CUDA graph, or kernel by kernel (plain), as all are on a CPU.",
        "suffix:/s", (Query(rate(STEPS, "variant, kind"), "{{variant}} {{kind}}"),), 6,
    ),
    Panel(
        "Preemptions",
        "Requests per second that lost their blocks and are computed again.",
        "suffix:/s", (Query(rate("ottava_preemptions_total", "variant"), "{{variant}}"),), 6,
    ),
    Panel(
        "Prompts found in the cache",
        "Share of the prompts' tokens whose keys and values were there already.",
        "percentunit",
        (
            Query(
                f"{rate('ottava_prefix_cache_hit_tokens_total', 'variant')} "
                f"/ {rate('ottava_prompt_tokens_total', 'variant')}",
                "{{variant}}",
            ),
        ),
        6, top=1.05,
    ),
    Panel(
        "Restarts and reloads",
        "Restarts of the engine after a fault, and reloads of the checkpoint.",
        "short",
        (
            Query(
                f"max by (instance) (increase(ottava_engine_restarts_total{{{CHOSEN}}}{RATE}))",
                "restart, {{instance}}",
            ),
            Query(
                f"sum by (outcome) (increase(ottava_reloads_total{{{INSTANCE}}}{RATE}))",
                "reload, {{outcome}}",
            ),
        ),
        6,
    ),
    Panel(
        "Ready",
        "1 if the variant takes requests, on all instances.",
        "short", (Query(f"min by (variant) (ottava_ready{{{CHOSEN}}})", "{{variant}}"),), 6, top=1.05,
    ),
    Panel(
        "Memory of the model",
        "Weights and KV caches, of all instances.",
        "bytes",
        (
            Query(f"sum by (variant) (ottava_weight_bytes{{{CHOSEN}}})", "{{variant}} weights"),
            Query(f"sum by (variant) (ottava_kv_cache_bytes{{{CHOSEN}}})", "{{variant}} KV"),
        ),
        6, is_stacked=True,
    ),
    Panel(
        "Free memory of a GPU",
        "At the last start, self-check or reload; with several ranks of each rank, the least of all instances.",
        "bytes", (Query(f"min by (rank) (ottava_rank_free_bytes{{{INSTANCE}}})", "rank {{rank}}"),), 6,
    ),
    Panel(
        "Ranks that run",
        "1 while the process of a rank runs, on all instances. One that ends takes its engine with it.",
        "short", (Query(f"min by (rank) (ottava_rank_up{{{INSTANCE}}})", "rank {{rank}}"),), 6, top=1.05,
    ),
    Panel(
        "Draft tokens",
        "Per second, with `--speculate ngram`: tokens that steps have checked, and those of them that were right.",
        "suffix: tok/s",
        (
            Query(rate(DRAFTS, "variant"), "{{variant}} checked"),
            Query(rate(RIGHT_DRAFTS, "variant"), "{{variant}} right"),
        ),
        6,
    ),
    Panel(
        "Drafts that were right",
        "Of those checked. A draft that is wrong costs its row of a step.",
        "percentunit", (Query(f"{rate(RIGHT_DRAFTS, 'variant')} / {rate(DRAFTS, 'variant')}", "{{variant}}"),),
        6, top=1.05,
    ),
    Panel(
        "Padding",
        "Rows per second that only filled a step up to the size of its CUDA graph; none on a CPU.",
        "suffix:/s", (Query(rate("ottava_step_padding_tokens_total", "variant"), "{{variant}}"),), 6,
    ),
    Panel(
        "Late steps",
        "Share of the steps not launched before the end of the one before: a GPU may have waited for its host.",
        "percentunit", (Query(f"{rate(LATE_STEPS, 'variant')} / {rate(STEPS, 'variant')}", "{{variant}}"),),
        6, top=1.05,
    ),
)  # fmt: skip


def both(expr: str) -> tuple[Query, ...]:
    """A query of the web's process and of the engine's; {} stands for the begin of the series' name."""
    return (Query(expr.format("process"), "web"), Query(expr.format("ottava_engine_process"), "engine"))


OURS = f'{{{{job="ottava", {INSTANCE}}}}}'
PROCESS = (
    Panel("CPU", "Cores in use.", "suffix: cores", both(f"sum(rate({{}}_cpu_seconds_total{OURS}{RATE}))"), 6),
    Panel("Resident memory", "Of all instances.", "bytes", both(f"sum({{}}_resident_memory_bytes{OURS})"), 6),
    Panel("Open files", "A connection is one. The most of an instance.", "short", both(f"max({{}}_open_fds{OURS})"), 6),
    Panel("Up for", "Of the youngest process.", "s", both(f"min(time() - {{}}_start_time_seconds{OURS})"), 6),
)

ROWS = (
    ("INT8 against FP16, on the same requests", COMPARISON),
    ("Requests: rate, errors, duration", REQUESTS),
    ("Engine", ENGINE),
    ("Processes", PROCESS),
)


def dashboard() -> Dashboard:
    """The whole dashboard."""
    made = (
        build.Dashboard("ottava")
        .uid("ottava")
        .description("INT8 W8A8 beside its FP16 baseline. Written by docker/grafana/dashboard.py; do not edit.")
        .tags(["ottava"])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(variable("instance", "Instance", "label_values(ottava_ready, instance)"))
        .with_variable(variable("variant", "Variant", 'label_values(ottava_ready{instance=~"$instance"}, variant)'))
    )
    number = 0
    for title, panels in ROWS:
        number += 1
        made.with_row(build.Row(title).id(number))
        for panel in panels:
            number += 1
            made.with_panel((stat_of(panel) if panel.is_stat else lines_of(panel)).id(number))
    return made.build()


def variable(name: str, label: str, query: str) -> build.QueryVariable:
    """A variable of which several values may be chosen; all at first."""
    return (
        build.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def stat_of(panel: Panel) -> stat.Panel:
    """One number."""
    made = (
        stat.Panel()
        .title(panel.title)
        .description(panel.text)
        .datasource(SOURCE)
        .height(STAT_HEIGHT)
        .span(panel.width)
        .unit(panel.unit)
        .thresholds(steps(panel.colors))
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.NONE)
        .reduce_options(options.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    if panel.decimals is not None:
        made.decimals(panel.decimals)
    for target in targets(panel.queries):
        made.with_target(target)
    return made


def lines_of(panel: Panel) -> timeseries.Panel:
    """Lines over time, of each variant in a color of its own."""
    made = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.text)
        .datasource(SOURCE)
        .height(PANEL_HEIGHT)
        .span(panel.width)
        .unit(panel.unit)
        .min(0)
        # A line of zeros would lie on top of a stack in its own color.
        .line_width(0 if panel.is_stacked else 1)
        .fill_opacity(60 if panel.is_stacked else 8)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            options.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
        .tooltip(options.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
    )
    for pattern, color in COLORS:
        made.override_by_regexp(pattern, [shades(color)])
    if panel.is_stacked:
        made.stacking(options.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if panel.top is not None:
        made.max(panel.top)
    if panel.limit is not None:
        made.thresholds(steps(((None, "transparent"), (panel.limit, "red"))))
        made.thresholds_style(options.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED))
    for target in targets(panel.queries):
        made.with_target(target)
    return made


def targets(queries: Iterable[Query]) -> Iterable[prometheus.Dataquery]:
    """The queries of a panel, lettered."""
    for place, query in enumerate(queries):
        made = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id("ABCDEFGH"[place]).range()
        yield made.exemplar(True) if query.has_exemplars else made


def steps(colors: Iterable[tuple[float | None, str]]) -> build.ThresholdsConfig:
    """Colors of a value, each from a number on."""
    thresholds = [Threshold(value=start, color=color) for start, color in colors]
    return build.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(thresholds)


def shades(color: str) -> DynamicConfigValue:
    """Lines in shades of a color."""
    return DynamicConfigValue(id_val="color", value={"mode": "shades", "fixedColor": color})


def main() -> None:
    """Write or print the dashboard."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="to the terminal, and not into the file")
    text = JSONEncoder(sort_keys=True, indent=2).encode(dashboard()) + "\n"
    if parser.parse_args().print:
        sys.stdout.write(text)
    else:
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
