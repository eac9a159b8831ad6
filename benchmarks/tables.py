"""The result of `benchmarks.kernels` as text: one line per case, the contenders side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.goals import GOAL_SHAPE, Goal, cutlass

Row = dict[str, Any]

TORCHS_AND_PEERS = ("fp16", "int_mm", "torchao", "gemlite")


def table(rows: list[Row], goals: Iterable[Goal], device: str) -> Iterator[str]:
    """Every line of the tables, those of the goals last."""
    yield from _linears([row for row in rows if row["what"] == "linear"], device)
    yield from _ops([row for row in rows if row["what"] == "op"])
    yield from _pairs([row for row in rows if row["what"] == "gated"], "apart", ("fused",))
    yield from _pairs([row for row in rows if row["what"] == "attention"], "fp16 kv", ("int8 kv", "sdpa flash"))
    yield from _pairs([row for row in rows if row["what"] == "chain"], "fp16", ("w8a8", "w8a8 int8 kv"))
    yield from _absences(rows)
    yield f"{'goal: worst of the run':<58}{'measured':>10}{'target':>10}  verdict"
    for goal in goals:
        measured = (
            "" if goal.measured is None else f"{goal.measured:.3g}" if goal.measured < 100 else f"{goal.measured:.0f}"
        )
        sign = ">=" if goal.is_at_least else "<="
        yield f"{goal.text:<58}{measured:>10}{sign:>4}{goal.target:>6g}  {goal.verdict} {goal.where}".rstrip()


def _linears(rows: list[Row], device: str) -> Iterator[str]:
    if not rows:
        return
    cutlass_rows = cutlass(device)
    yield "microseconds; torchao's and gemlite's include the quantization of the activations, and so does"
    yield "cutlass, which is vLLM's GEMM and the quantization kernel before it, of another run"
    titles = ("w8a8", "p20", "p80", *TORCHS_AND_PEERS, "cutlass")
    for (shape,), group in _grouped_rows(rows, ("shape",)):
        yield f"{shape:<13}" + "".join(f"{title:>9}" for title in titles) + "  fp16/  TOPS  GB/s  roof"
        for (layer, tokens), case in _grouped(group, ("layer", "tokens")):
            ours = case["w8a8"]
            peer = cutlass_rows.get((layer, tokens)) if shape == GOAL_SHAPE else None
            total = "" if peer is None else f"{peer['gemm_us'] + peer['quant_us']:.1f}"
            cells = [_us(ours, 9), _us(ours, 9, "us_p20"), _us(ours, 9, "us_p80")]
            cells += [_us(case.get(name), 9) for name in TORCHS_AND_PEERS]
            cells += [f"{total:>9}", _number(ours, "speedup", "7.2f"), _number(ours, "tops", "6.0f")]
            cells += [_number(ours, "gb_per_s", "6.0f"), _number(ours, "roof_share", "6.2f")]
            yield f"{layer:<8}{tokens:>5}{''.join(cells)}"


def _ops(rows: list[Row]) -> Iterator[str]:
    if not rows:
        return
    yield f"{'op':<16}{'T':>6}{'us':>9}{'p20':>9}{'p80':>9}{'GB/s':>7}{'of copy':>9}"
    for row in rows:
        yield (
            f"{row['op']:<16}{row['tokens']:>6}{_us(row, 9)}{_us(row, 9, 'us_p20')}{_us(row, 9, 'us_p80')}"
            f"{_number(row, 'gb_per_s', '7.0f')}{_number(row, 'copy_share', '9.2f')}"
        )


def _pairs(rows: list[Row], first: str, others: tuple[str, ...]) -> Iterator[str]:
    """A line per case: time and rates of the first; of each other its time, and the first's time over it."""
    if not rows:
        return
    title = "".join(f"{name:>14}{'ratio':>7}" for name in others)
    yield f"{rows[0]['what']:<24}{first + ' us':>12}{'GB/s':>7}{'of copy':>9}{'TFLOP/s':>9}{title}"
    for (op, tokens, batch, context), case in _grouped(rows, ("op", "tokens", "batch", "context")):
        base = case.get(first, {})
        name = f"{op} {tokens or batch} x {context}" if op == "decode" or batch else f"{op} {tokens}"
        cells = [f"{_us(case.get(other), 14)}{_number(case.get(other, {}), 'speedup', '7.2f')}" for other in others]
        yield (
            f"{name:<24}{_us(base, 12)}{_number(base, 'gb_per_s', '7.0f')}{_number(base, 'copy_share', '9.2f')}"
            f"{_number(base, 'tops', '9.0f')}{''.join(cells)}"
        )


def _absences(rows: list[Row]) -> Iterator[str]:
    """What has no time, once per reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for kind in ("wrong", "absent"):
            if kind in row:
                place = f"{row.get('layer') or row.get('op')} {row.get('tokens') or row.get('batch')}"
                found.setdefault((row["variant"], f"{kind}: {row[kind]}"), []).append(place)
    for (variant, reason), places in found.items():
        yield f"{variant} {reason} ({places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''})"


def _grouped(rows: Iterable[Row], names: tuple[str, ...]) -> Iterator[tuple[tuple[Any, ...], dict[str, Row]]]:
    """Rows by the values of these fields, each group by variant."""
    for values, group in _grouped_rows(rows, names):
        yield values, {row["variant"]: row for row in group}


def _grouped_rows(rows: Iterable[Row], names: tuple[str, ...]) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    yield from groups.items()


def _us(row: Row | None, width: int, name: str = "us_p50") -> str:
    if row is None or name not in row:
        return f"{'wrong' if row and 'wrong' in row else '-':>{width}}"
    return f"{row[name]:>{width}.{2 if row[name] < 10 else 1}f}"


def _number(row: Row, name: str, form: str) -> str:
    width = int(form.partition(".")[0])
    return f"{row[name]:{form}}" if name in row else " " * width
