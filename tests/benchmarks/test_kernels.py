"""The kernel benchmark: what it counts, how it judges, and that it times nothing that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from benchmarks import kernels as benchmark
from benchmarks.chain import layer_work
from benchmarks.goals import CLIFFS, GOAL_SHAPE, Goal, beside_cutlass, cliffs, cutlass, goal_rows, judge
from benchmarks.linears import Linear, check_product
from benchmarks.ops import check_codes, op_bytes
from benchmarks.peers import Peer
from benchmarks.shapes import SHAPES, linear_sizes
from benchmarks.tables import table
from benchmarks.timing import Absent, Call, Roofs, Unsupported, Work, WrongResult, measure, result_row, take_turns
from kernels import Quantized
from service.models.config import ModelConfig

H100 = "NVIDIA H100 80GB HBM3"
ROOFS = Roofs(copy_gb_per_s=3000.0, int8_tops=1979.0)


def linear_row(layer: str, tokens: int, us: float, variant: str = "w8a8", **fields: Any) -> dict[str, Any]:
    row = {"what": "linear", "shape": GOAL_SHAPE, "layer": layer, "tokens": tokens, "variant": variant}
    return row | {"us_p20": us, "us_p50": us, "us_p80": us} | fields


def attention_row(op: str, batch: int, context: int, variant: str, **values: float) -> dict[str, Any]:
    named = {"what": "attention", "shape": GOAL_SHAPE, "op": op, "batch": batch, "context": context}
    return named | {"variant": variant, "us_p50": 9.0} | values


def goal(goals: Sequence[Goal], text: str) -> Goal:
    return next(goal for goal in goals if goal.text.startswith(text))


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> dict[str, Any]:
    """The program over the tiny shapes, on this CPU; its result."""
    argv = ["kernels.py", "--shapes", "tiny", "--peers", "none", "--commit", "test", "--out", str(out), *words]
    monkeypatch.setattr("sys.argv", argv)
    try:
        benchmark.main()
    finally:
        result: dict[str, Any] = json.loads(next(out.glob("*.json")).read_text(encoding="utf-8"))
    return result


# What is counted


def test_the_linears_are_those_of_the_models() -> None:
    assert linear_sizes(SHAPES["llama-3.1-8b"]) == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    }
    assert linear_sizes(SHAPES["qwen2.5-7b"])["qkv"] == (3584 + 2 * 512, 3584)
    assert linear_sizes(SHAPES["llama-2-13b"])["gate_up"] == (27648, 5120)
    assert linear_sizes(SHAPES["opt-6.7b"]) == {
        "qkv": (12288, 4096),
        "o": (4096, 4096),
        "fc1": (16384, 4096),
        "fc2": (4096, 16384),
    }


def test_a_linear_moves_its_operands_once() -> None:
    linear = Linear("any", "any", n=30, k=20)
    assert linear.work("w8a8", 7) == Work(30 * 20 + 7 * 20 + 4 * 7 + 4 * 30 + 2 * 7 * 30, 2.0 * 7 * 30 * 20, True)
    assert linear.work("fp16", 7) == Work(2 * (30 * 20 + 7 * 20 + 7 * 30), 2.0 * 7 * 30 * 20, False)
    assert linear.work("int_mm", 7).num_bytes == 30 * 20 + 7 * 20 + 4 * 7 * 30
    # They take float16 activations and quantize them inside.
    assert linear.work("gemlite", 7).num_bytes == 30 * 20 + 2 * 7 * 20 + 2 * 7 * 30 + 4 * 30


def test_an_op_moves_its_rows_once() -> None:
    config = ModelConfig.of(SHAPES["llama-3.1-8b"], 64)
    sizes = op_bytes(config, 3)
    assert sizes["quantize_rows"] == 3 * (2 * 4096 + 4096 + 4)
    assert sizes["rms_norm"] == 3 * (3 * 2 * 4096 + 4096 + 4) + 2 * 4096
    assert sizes["silu_mul"] == 3 * (2 * 28672 + 14336 + 4)
    assert sizes["rope_and_cache"] == 3 * (2 * 2 * 6144 + 4 * 128 + 8)


def test_a_layer_of_llama_has_218_million_weights() -> None:
    config = ModelConfig.of(SHAPES["llama-3.1-8b"], 64)
    assert layer_work(config, 1, 0, "w8a8").num_bytes == 218_103_808
    assert layer_work(config, 1, 512, "fp16").num_bytes == 2 * 218_103_808 + 512 * 4096


def test_the_floor_is_the_larger_of_bytes_and_operations() -> None:
    assert ROOFS.floor_s(Work(3e9, 1.0, is_int8=True)) == pytest.approx(1e-3)
    assert ROOFS.floor_s(Work(1.0, 1.979e12, is_int8=True)) == pytest.approx(1e-3)
    assert ROOFS.floor_s(Work(1.0, 1.979e12)) == pytest.approx(2e-3)
    assert Roofs(3000.0, None).floor_s(Work(3e9, 1e15)) == pytest.approx(1e-3)


def test_a_row_carries_quantiles_and_rates() -> None:
    row = result_row({"op": "any"}, [1e-6, 2e-6, 3e-6], Work(3e6, 1.979e9, is_int8=True), ROOFS)
    assert (row["us_p20"], row["us_p50"], row["us_p80"]) == pytest.approx((1.0, 2.0, 3.0))
    assert row["gb_per_s"] == pytest.approx(1500.0)
    assert row["copy_share"] == pytest.approx(0.5)
    assert row["tops"] == pytest.approx(989.5)
    assert row["roof_share"] == pytest.approx(0.5)


# How it times


class FakeRun:
    def __init__(self, name: str, told: list[str], sample_s: float) -> None:
        self.num_calls, self.name, self.told, self.sample_s = 2, name, told, sample_s

    def sample(self) -> float:
        self.told.append(self.name)
        return self.sample_s


def test_contenders_take_turns() -> None:
    told: list[str] = []
    times = take_turns({"a": FakeRun("a", told, 1e-3), "b": FakeRun("b", told, 1e-4)})
    assert told == ["a", "b"] * (len(told) // 2)
    assert len(times["a"]) == len(times["b"]) == 15  # 30 ms of the slower one's 2 ms


def test_what_cannot_run_is_named_and_the_rest_is_timed() -> None:
    def fails(error: Exception) -> list[Call]:
        raise error

    contenders: dict[str, Callable[[], Sequence[Call]]] = {
        "fine": lambda: [lambda: None],
        "wrong": partial(fails, WrongResult("row 3 differs")),
        "broken": partial(fails, RuntimeError("no such kernel\nand a long trace")),
    }
    times = measure(contenders, floor_s=1e-3)
    assert isinstance(times["fine"], list)
    assert times["wrong"] == Absent("WrongResult: row 3 differs", is_wrong=True)
    assert times["broken"] == Absent("RuntimeError: no such kernel")
    assert "us_p50" not in result_row({}, times["wrong"], Work(1.0), ROOFS)


# What it refuses


@pytest.mark.parametrize(("row", "column"), [(0, 0), (4, 7), (2, 3)])
def test_one_wrong_element_is_found(row: int, column: int) -> None:
    x_q = kernels.quantize_rows(torch.randn(5, 32))
    weight_q = torch.randint(-127, 128, (8, 32), dtype=torch.int8)
    scale = torch.rand(8) / 127
    y = kernels.int8_linear(x_q, weight_q, scale)
    assert isinstance(y, torch.Tensor)
    check_product(y, x_q, weight_q, scale)
    # Upwards by more than 1 %: y * 1.01 + 0.01 would be y itself at -1.
    for wrong in (y[row, column] + 0.01 * y[row, column].abs() + 0.01, torch.nan):
        spoiled = y.clone()
        spoiled[row, column] = wrong
        with pytest.raises(WrongResult, match=f"1 elements, first row {row}, column {column}"):
            check_product(spoiled, x_q, weight_q, scale)


def test_codes_may_differ_by_one_at_ties_only() -> None:
    want = kernels.quantize_rows(torch.randn(2, 4096))
    check_codes(want, want, [0, 1])
    far = Quantized(want.codes.clone(), want.scale)
    far.codes[0, 0] = -far.codes[0, 0].clamp(2, 127)
    far.codes[1, 5] += 2 if want.codes[1, 5] < 0 else -2
    with pytest.raises(WrongResult, match="apart"):
        check_codes(far, want, [0, 1])
    with pytest.raises(WrongResult, match="of the codes differ"):
        check_codes(Quantized(want.codes - want.codes.sign(), want.scale), want, [0, 1])
    with pytest.raises(WrongResult, match="scale"):
        check_codes(Quantized(want.codes, want.scale * 1.001), want, [0, 1])


def test_a_wrong_kernel_is_not_timed_and_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = kernels.int8_linear

    def off_by_a_column(x: Quantized, weight_q: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return right(x, weight_q.roll(1, 0), *rest, **named)

    monkeypatch.setattr(kernels, "int8_linear", off_by_a_column)
    with pytest.raises(SystemExit, match="wrong result"):
        run(monkeypatch, tmp_path, "--only", "linear", "--tokens", "3")
    (written,) = tmp_path.glob("*.json")
    rows = [row for row in json.loads(written.read_text())["rows"] if row["what"] == "linear"]
    ours = [row for row in rows if row["variant"] == "w8a8"]
    assert len(ours) == 4
    assert all("wrong" in row and "us_p50" not in row and "speedup" not in row for row in ours)
    assert all("us_p50" in row for row in rows if row["variant"] == "fp16")


# How it judges


def test_a_cliff_is_a_step_where_a_tile_ends() -> None:
    rows = [linear_row("o", 16, 10.0), linear_row("o", 17, 12.0), linear_row("o", 18, 99.0), linear_row("qkv", 32, 1.0)]
    assert [(row["tokens"], row["cliff"]) for row in cliffs(rows)] == [(17, 1.2)]
    assert all(after == before + 1 for before, after in CLIFFS)
    found = goal(judge(rows, H100), "step from M")
    assert (found.measured, found.where, found.verdict) == (1.2, "o 17", "missed")


def test_a_goal_is_judged_by_its_worst_place() -> None:
    rows = [
        linear_row("gate_up", 1, 40.0, speedup=1.9, copy_share=0.95),
        linear_row("gate_up", 32, 42.0, speedup=1.86, copy_share=0.90),
        linear_row("o", 16, 8.0, speedup=2.5, copy_share=0.70),
        linear_row("down", 2048, 180.0, speedup=1.99, tops=1360.0),
        linear_row("qkv", 256, 15.0, shape="qwen2.5-7b", speedup=0.97),
        {"what": "op", "op": "quantize_rows", "tokens": 2048, "variant": "w8a8", "us_p50": 9.0, "copy_share": 0.1},
        {"what": "op", "op": "rms_norm", "tokens": 2048, "variant": "w8a8", "us_p50": 9.0, "copy_share": 0.86},
        {"what": "chain", "op": "decode", "tokens": 16, "variant": "w8a8", "us_p50": 9.0, "speedup": 1.8},
        {"what": "chain", "op": "decode", "tokens": 64, "variant": "w8a8", "us_p50": 9.0, "speedup": 1.6},
        attention_row("prefill", 16, 2048, "sdpa flash", speedup=0.8),
        attention_row("prefill", 1, 8192, "sdpa flash", speedup=1.25),
        attention_row("decode", 32, 512, "fp16 kv", copy_share=0.3),
        attention_row("decode", 32, 8192, "fp16 kv", copy_share=0.9),
        attention_row("decode", 32, 8192, "int8 kv", speedup=1.59),
    ]
    goals = judge(rows, H100)
    verdicts = {goal.text: (goal.verdict, goal.where) for goal in goals}
    assert verdicts["fp16/int8, M <= 32"] == ("met", "gate_up 32")
    assert verdicts["fp16/int8, 64 <= M <= 512"] == ("not measured", "")
    assert verdicts["fp16/int8, M >= 1024"] == ("missed", "down 2048")
    assert verdicts["share of copy rate, gate_up and down, M <= 32"] == ("met", "gate_up 32")
    assert verdicts["share of copy rate, qkv and o, M <= 32"] == ("missed", "o 16")
    assert verdicts["TOPS, gate_up and down, M >= 1024"] == ("met", "down 2048")
    assert verdicts["fp16/int8 anywhere, every shape and M"] == ("missed", "qwen2.5-7b qkv 256")
    assert goal(goals, "share of copy rate, fused ops").verdict == "met"
    assert goal(goals, "us, fused ops").verdict == "not measured"
    assert goal(goals, "decoder layer, fp16/int8, decode").measured == 1.6
    prefill = goal(goals, "prefill attention")
    assert (prefill.measured, prefill.where, prefill.verdict) == (0.8, "prefill 1 x 8192", "missed")
    assert goal(goals, "share of copy rate, decode attention").where == "decode 32 x 8192"
    assert goal(goals, "fp16 KV / int8 KV").verdict == "missed"
    assert all(row["what"] == "goal" and row["verdict"] for row in goal_rows(goals))


def test_cutlass_stands_beside_the_same_gpu_alone() -> None:
    assert len(cutlass(H100)) == 40
    assert cutlass("NVIDIA A100") == {}
    (row,) = beside_cutlass([linear_row("o", 8192, 113.45, speedup=4.0)], H100)
    assert row["cutlass_us"] == pytest.approx(191.5 + 35.4)
    assert row["cutlass_time"] == pytest.approx(2.0)
    assert row["cutlass_ratio"] == pytest.approx(4.0 * 226.9 / 455.6)
    assert beside_cutlass([linear_row("o", 8192, 113.45)], "NVIDIA A100") == []


def test_only_a_failure_of_ours_fails_the_command() -> None:
    assert not benchmark.has_failed([{"variant": "gemlite", "absent": "not here"}, {"variant": "w8a8", "us_p50": 1.0}])
    assert benchmark.has_failed([{"variant": "gemlite", "wrong": "row 1"}])
    assert benchmark.has_failed([{"variant": "w8a8", "absent": "out of shared memory"}])


# What it shows


def test_the_table_has_a_line_per_case() -> None:
    rows = [
        linear_row("o", 16, 8.5, speedup=1.9, tops=63.0, gb_per_s=1990.0, roof_share=0.66),
        linear_row("o", 16, 16.15, "fp16"),
        linear_row("o", 16, 0.0, "gemlite") | {"absent": "not here"},
        {"what": "linear", "shape": GOAL_SHAPE, "layer": "o", "tokens": 32, "variant": "w8a8", "wrong": "row 1"},
    ]
    del rows[2]["us_p50"]
    lines = list(table(rows, judge(rows, H100), H100))
    (line,) = [line for line in lines if line.startswith("o          16")]
    assert line.split() == ["o", "16", *["8.50"] * 3, "16.1", "-", "-", "-", "11.0", "1.90", "63", "1990", "0.66"]
    assert "gemlite absent: not here (o 16)" in lines
    assert "w8a8 wrong: row 1 (o 32)" in lines
    assert sum(line.endswith("not measured") for line in lines) > 5


def test_the_whole_program_runs_and_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(monkeypatch, tmp_path, "--tokens", "1,16,17")
    assert "smoke test" in result["run"]["timed by"]
    assert result["run"]["left out for time"] == []
    rows = result["rows"]
    assert {row["what"] for row in rows} == {"linear", "op", "gated", "attention", "chain", "goal"}
    assert {row["tokens"] for row in rows if row["what"] == "linear"} == {1, 16, 17}
    assert all(row["us_p20"] <= row["us_p50"] <= row["us_p80"] for row in rows if "us_p50" in row)
    assert not [row for row in rows if "wrong" in row]
    assert "smoke test" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    draw(result, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_a_result_of_llama_is_drawn_beside_cutlass(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    rows = [linear_row("o", tokens, 9.0, speedup=1.8, tops=60.0, roof_share=0.6) for tokens in (1, 16)]
    rows += [linear_row("o", tokens, 16.0, "fp16", tops=30.0) for tokens in (1, 16)]
    rows += [
        {"what": "chain", "shape": GOAL_SHAPE, "op": "decode", "tokens": 1, "variant": variant, "us_p50": us}
        for variant, us in (("fp16", 190.0), ("w8a8", 100.0))
    ]
    made = {"device": H100, "torch": "2.11.0", "triton": "3.6.0", "commit": "test", "timed by": "CUDA graphs"}
    fixture = json.dumps({"run": made | {"copy_gb_per_s": 3000.0}, "rows": rows})
    draw(json.loads(fixture), tmp_path / "llama.png")
    assert (tmp_path / "llama.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_is_not_here_or_too_slow_says_so() -> None:
    weights, x = [torch.randn(8, 16)], torch.randn(3, 16)
    with pytest.raises(Unsupported, match="not installed"):
        Peer(lambda _: [], "not installed").calls(weights, x)
    peer = Peer(lambda weights: [partial(torch.nn.functional.linear, weight=weight) for weight in weights], None)
    assert len(peer.calls(weights, x)) == 1
    wrong = Peer(lambda weights: [partial(torch.nn.functional.linear, weight=-weight) for weight in weights], None)
    with pytest.raises(WrongResult, match="off the float product"):
        wrong.calls(weights, x)
    peer.spent_s = 1e9
    with pytest.raises(Unsupported, match="left out"):
        peer.calls(weights, x)


def test_what_the_budget_leaves_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, tmp_path, "--budget-s", "0")
    assert "tiny chain" in result["run"]["left out for time"]
    assert {row["what"] for row in result["rows"]} == {"goal"}


def test_an_unknown_shape_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["kernels.py", "--shapes", "llama"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "llama: choose from llama-3.1-8b" in capsys.readouterr().err
