"""What the kernels should reach on an H100, line by line, judged from the rows of one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CUTLASS = Path(__file__).parent / "cutlass_h100.json"
"""vLLM's int8 CUTLASS GEMM and its quantization kernel, measured on the same GPU model in another run."""

GOAL_SHAPE = "llama-3.1-8b"
CLIFFS = ((16, 17), (32, 33), (64, 65), (128, 129), (256, 257))
MAX_CLIFF = 1.15
FUSED_OPS = ("rms_norm", "silu_mul", "rope_and_cache")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """One line: the worst place measured against the target; measured is None where the run has no such row."""

    text: str
    target: float
    is_at_least: bool
    measured: float | None
    where: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        is_met = self.measured >= self.target if self.is_at_least else self.measured <= self.target
        return "met" if is_met else "missed"


def judge(rows: Iterable[Row], device: str) -> list[Goal]:
    """Every goal, with what this run on this device measured for it."""
    rows = [row for row in rows if "us_p50" in row]
    linears = [row for row in rows if row["what"] == "linear" and row["variant"] == "w8a8"]
    main = [row for row in linears if row["shape"] == GOAL_SHAPE]
    beside = beside_cutlass(main, device)
    few, middle = _between(main, 1, 32), _between(main, 64, 512)
    many = _between(main, 1024, 8192)
    wide, narrow = ("gate_up", "down"), ("qkv", "o")
    ops = [row for row in rows if row["what"] == "op" and row["op"] in FUSED_OPS]
    attention = [row for row in rows if row["what"] == "attention"]
    flash = [row for row in attention if row["variant"] == "sdpa flash"]
    decode = [
        row for row in attention if (row["op"], row["variant"]) == ("decode", "fp16 kv") and row["context"] >= 2048
    ]
    int8_kv = [row for row in attention if (row["variant"], row["batch"], row["context"]) == ("int8 kv", 32, 8192)]
    chain = [row for row in rows if row["what"] == "chain" and row["variant"] == "w8a8"]
    return [
        _least("fp16/int8, M <= 32", 1.85, few, "speedup"),
        _least("fp16/int8, 64 <= M <= 512", 1.85, middle, "speedup"),
        _least("fp16/int8, M >= 1024", 2.0, many, "speedup"),
        _least("share of copy rate, gate_up and down, M <= 32", 0.88, _of(few, wide), "copy_share"),
        _least("share of copy rate, qkv and o, M <= 32", 0.78, _of(few, narrow), "copy_share"),
        _least("TOPS, gate_up and down, M >= 1024", 1350.0, _of(many, wide), "tops"),
        _least("CUTLASS + quantization / ours, time (another run)", 1.0, beside, "cutlass_time"),
        _least("fp16/ours over fp16/CUTLASS + quantization (another run)", 1.0, beside, "cutlass_ratio"),
        _least("fp16/int8 anywhere, every shape and M", 1.0, linears, "speedup"),
        _most("step from M to M + 1, every shape", MAX_CLIFF, cliffs(linears), "cliff"),
        _least("share of copy rate, fused ops, T >= 2048", 0.85, _between(ops, 2048, 8192), "copy_share"),
        _most("us, fused ops, T <= 16", 2.5, _between(ops, 1, 16), "us_p50"),
        _least(
            "prefill attention: torch's flash SDPA / ours, time", 0.9, [_inverted(row) for row in flash], "of_flash"
        ),
        _least("share of copy rate, decode attention, context >= 2048", 0.8, decode, "copy_share"),
        _least("fp16 KV / int8 KV, decode attention, 32 x 8192", 1.6, int8_kv, "speedup"),
        _least("decoder layer, fp16/int8, decode", 1.7, [row for row in chain if row["op"] == "decode"], "speedup"),
        _least("decoder layer, fp16/int8, prefill", 1.7, [row for row in chain if row["op"] == "prefill"], "speedup"),
    ]


def _inverted(row: Row) -> Row:
    """A row of a peer whose speedup is over it, as time of the peer over ours."""
    return row | {"of_flash": 1 / row["speedup"]} if "speedup" in row else row


def goal_rows(goals: Iterable[Goal]) -> list[Row]:
    """The goals as rows of the result."""
    return [{"what": "goal"} | asdict(goal) | {"verdict": goal.verdict} for goal in goals]


def cliffs(rows: Iterable[Row]) -> list[Row]:
    """cliff = time at M + 1 over time at M, at the sizes where a tile ends and the sweep has both."""
    times = {(row["shape"], row["layer"], row["tokens"]): row for row in rows}
    steps = [
        (times[shape, layer, before], times.get((shape, layer, after)))
        for shape, layer, tokens in times
        for before, after in CLIFFS
        if tokens == before
    ]
    return [after | {"cliff": after["us_p50"] / before["us_p50"]} for before, after in steps if after is not None]


def beside_cutlass(rows: Iterable[Row], device: str) -> list[Row]:
    """Rows of Llama-3.1-8B with CUTLASS's time, quantization included, over ours, and the same of both runs' ratios."""
    peers = cutlass(device)
    found = []
    for row in rows:
        peer = peers.get((row["layer"], row["tokens"]))
        if peer is None or row["shape"] != GOAL_SHAPE:
            continue
        total_us = peer["gemm_us"] + peer["quant_us"]
        beside: Row = {"cutlass_us": total_us, "cutlass_time": total_us / row["us_p50"]}
        if "speedup" in row:
            beside["cutlass_ratio"] = row["speedup"] / (peer["fp16_us"] / total_us)
        found.append(row | beside)
    return found


def cutlass(device: str) -> dict[tuple[str, int], dict[str, float]]:
    """(layer, M) -> fp16_us, gemm_us, quant_us of the other run; nothing for another GPU model."""
    found = json.loads(CUTLASS.read_text(encoding="utf-8"))
    rows = found["rows"] if device == found["device"] else []
    return {(row["layer"], row["tokens"]): row for row in rows}


def _least(text: str, target: float, rows: Iterable[Row], name: str) -> Goal:
    return _worst(text, target, rows, name, min)


def _most(text: str, target: float, rows: Iterable[Row], name: str) -> Goal:
    return _worst(text, target, rows, name, max)


def _worst(text: str, target: float, rows: Iterable[Row], name: str, pick: Callable[..., Row]) -> Goal:
    known = [row for row in rows if name in row]
    if not known:
        return Goal(text, target, pick is min, None)
    worst = pick(known, key=lambda row: row[name])
    return Goal(text, target, pick is min, worst[name], " ".join(_place(worst)))


def _place(row: Row) -> Iterator[str]:
    if row.get("shape") != GOAL_SHAPE:
        yield str(row.get("shape"))
    yield str(row.get("layer") or row.get("op"))
    yield str(row["tokens"]) if "tokens" in row else f"{row['batch']} x {row['context']}"


def _between(rows: Iterable[Row], first: int, last: int) -> list[Row]:
    return [row for row in rows if first <= row["tokens"] <= last]


def _of(rows: Iterable[Row], layers: tuple[str, ...]) -> list[Row]:
    return [row for row in rows if row["layer"] in layers]
