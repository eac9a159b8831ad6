from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import sympy

from benchmarks.shapes import SHAPES as BENCHMARK_SHAPES
from benchmarks.shapes import linear_sizes
from quant.analysis.feasibility import Verdict, explain, parse_scheme
from quant.analysis.gpus import GPUS, Gpu
from quant.analysis.roofline import (
    FLOWS,
    SHAPES,
    Flow,
    ModelShape,
    StepShape,
    Work,
    all_reduce_work,
    attention_work,
    crossover_tokens,
    dataflow_linear,
    elementwise_work,
    fp16_linear,
    gather_work,
    int8_linear,
    linear_work,
    predict,
    step_parts,
)
from quant.errors import InvalidScheme, UnknownBandwidth

TINY = ModelShape("tiny", 3, 8, 12, 4, 2, 2, 32)
H100 = GPUS["h100"]
T, N, K = sympy.symbols("T N K", positive=True)

PRINTED_FP16 = "1 / (1/N + 1/C_i + 1/C_o)"
PRINTED_INT8 = "(1 + 2/C_o + 4/C_i) / (2/N + 1/C_i + 2/C_o + 2/(N*C_i) + 2/(C_i*C_o))"
"""Arithmetic intensities as the article prints them, in its letters: N tokens, C_i in, C_o out."""


def printed(formula: str) -> sympy.Expr:
    return sympy.sympify(formula, locals={"N": T, "C_i": K, "C_o": N})


def intensity(work: Work) -> sympy.Expr:
    return sympy.simplify(sympy.nsimplify(work.normalized_operations) / work.num_bytes)


def is_zero(expression: sympy.Expr) -> bool:
    return bool(sympy.simplify(expression) == 0)


def test_the_closed_forms_are_the_rows_of_the_article_s_table() -> None:
    """Total operations and I/O of its two columns, its N, C_i, C_o being T, K, N, int8 counted as half."""
    fp16, int8, dataflow = (function(T, N, K) for function in (fp16_linear, int8_linear, dataflow_linear))
    assert is_zero(fp16.normalized_operations - 2 * T * N * K)
    assert is_zero(fp16.num_bytes - 2 * (T * K + K * N + T * N))
    assert is_zero(sympy.nsimplify(int8.normalized_operations) - (T * N * K + 2 * T * K + 4 * T * N))
    assert is_zero(int8.num_bytes - (2 * T * K + K * N + 2 * T * N + 2 * (T + N)))
    assert is_zero(dataflow.num_bytes - (T * K + K * N + T * N + 2 * (T + N)))


def test_the_fp16_intensity_is_as_printed() -> None:
    assert is_zero(intensity(fp16_linear(T, N, K)) - printed(PRINTED_FP16))


def test_the_printed_int8_intensity_exchanges_two_coefficients() -> None:
    derived = intensity(int8_linear(T, N, K))
    assert not is_zero(derived - printed(PRINTED_INT8))
    exchanged = PRINTED_INT8.replace("2/N + 1/C_i + ", "1/N + 2/C_i + ")
    assert is_zero(derived - printed(exchanged))


def test_they_are_the_coefficients_of_1_over_t_and_1_over_k_and_no_others() -> None:
    """Both denominators, expanded in 1/T, 1/N and 1/K over the same numerator."""
    u, v, w = sympy.symbols("u v w")
    numerator = 1 + 2 / N + 4 / K
    derived, shown = (
        sympy.Poly(sympy.expand(sympy.simplify(numerator / form).subs({T: 1 / u, N: 1 / v, K: 1 / w})), u, v, w)
        for form in (intensity(int8_linear(T, N, K)), printed(PRINTED_INT8))
    )
    differing = [term for term in (u, v, w, u * w, v * w) if derived.coeff_monomial(term) != shown.coeff_monomial(term)]
    assert differing == [u, w]
    assert [derived.coeff_monomial(term) for term in (u, w)] == [1, 2]
    assert [shown.coeff_monomial(term) for term in (u, w)] == [2, 1]


def test_what_the_exchange_hides_decode_loses_no_intensity() -> None:
    """For one token of a large Linear INT8 with FP16 I/O keeps the intensity of FP16; the print has it halved."""
    large = {T: 1, N: 4096, K: 4096}
    fp16 = intensity(fp16_linear(T, N, K)).subs(large)
    assert float(intensity(int8_linear(T, N, K)).subs(large) / fp16) == pytest.approx(1, abs=0.01)
    assert float(printed(PRINTED_INT8).subs(large) / fp16) == pytest.approx(0.5, abs=0.01)


def counted(flow: str, t: int, n: int, k: int) -> Work:
    """The same Linear walked through element by element: each multiply-add is 2 operations, each multiplication too."""
    between = 1 if flow == "dataflow" else 2
    fp16 = int8 = num_bytes = 0
    for _ in product(range(t), range(k)):
        num_bytes += between
        fp16 += 2 if flow == "int8" else 0
    for _ in product(range(n), range(k)):
        num_bytes += 2 if flow == "fp16" else 1
    for _ in product(range(t), range(n)):
        num_bytes += between
        fp16 += {"fp16": 0, "int8": 2 + 2, "dataflow": 2 + 2 + 2}[flow]
        for _ in range(k):
            fp16, int8 = (fp16 + 2, int8) if flow == "fp16" else (fp16, int8 + 2)
    scales = 0 if flow == "fp16" else sum(2 for _ in range(t)) + sum(2 for _ in range(n))
    return Work(fp16, int8, num_bytes + scales)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 5), (4, 2, 7), (5, 6, 3)], ids=str)
def test_a_linear_s_work_is_what_counting_gives(flow: Flow, size: tuple[int, int, int]) -> None:
    assert linear_work(flow, *size) == counted(flow, *size)


@pytest.mark.parametrize(("context", "is_prefill"), [(6, False), (4, True), (100, True)])
def test_attention_s_work_is_what_counting_gives(context: int, is_prefill: bool) -> None:
    step = StepShape(8, context, is_prefill)
    operations = slots = 0
    if is_prefill:
        length = min(context, 8)
        for _ in range(8 // length):
            slots += length
            # Two products over the keys up to each row, each a multiply-add per element of every head.
            operations += sum(2 * 2 * 4 * 2 for row in range(length) for _ in range(row + 1))
    else:
        slots = sum(context + 1 for _ in range(8))
        operations = 2 * 2 * 4 * 2 * slots
    for flow in FLOWS:
        out = 8 * 8 * (1 if flow == "dataflow" else 2)
        work = attention_work(flow, TINY, step)
        assert (work.operations, work.num_bytes) == (operations, slots * 2 * 2 * 2 * 2 + 8 * 8 * 2 + out)


def test_elementwise_bytes_are_what_counting_gives() -> None:
    sizes: tuple[tuple[Flow, int], ...] = ("fp16", 2), ("int8", 2), ("dataflow", 1)
    for flow, e in sizes:
        norm = 8 * (e + 2 + 2 + e)  # y and residual in, residual and normed out
        rope = (4 + 2 * 2) * 2 * (e + 2)
        gate = 12 * (e + e + e)
        assert elementwise_work(flow, TINY, 5) == Work(0, 0, 5 * (2 * norm + rope + gate))


def test_one_token_gains_what_the_weights_shrink_by() -> None:
    for flow in ("int8", "dataflow"):
        for size in (1 << 10, 1 << 14, 1 << 18):
            gain = linear_work("fp16", 1, size, size).time_s(H100) / linear_work(flow, 1, size, size).time_s(H100)
            assert 2 - 8 / size < gain <= 2
            assert linear_work(flow, 1, size, size).bound(H100) == "memory"


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_many_tokens_gain_the_ratio_of_the_rates(gpu: Gpu) -> None:
    """T without end: 2NK / fp16 over 2NK / int8 + (2K + 4N) / fp16, and N and K without end: int8 / fp16."""
    t, n, k = 1 << 30, 4096, 11008
    gain = fp16_linear(t, n, k).time_s(gpu) / int8_linear(t, n, k).time_s(gpu)
    ratio = gpu.int8_per_s / gpu.fp16_per_s
    assert gain == pytest.approx(1 / (1 / ratio + 1 / n + 2 / k), rel=1e-9)
    large = [function(t, 1 << 24, 1 << 24).time_s(gpu) for function in (fp16_linear, int8_linear, dataflow_linear)]
    assert [large[0] / time for time in large[1:]] == pytest.approx([ratio, ratio], rel=1e-5)


@pytest.mark.parametrize("flow", FLOWS)
def test_the_bound_turns_at_the_crossover(flow: Flow) -> None:
    turn = crossover_tokens(flow, 4096, 14336, H100)
    assert linear_work(flow, int(turn), 4096, 14336).bound(H100) == "memory"
    assert linear_work(flow, int(turn) + 1, 4096, 14336).bound(H100) == "compute"


def test_a_linear_too_narrow_for_the_ridge_never_turns() -> None:
    assert crossover_tokens("fp16", 64, 64, H100) == float("inf")
    assert linear_work("fp16", 1 << 40, 64, 64).bound(H100) == "memory"


def test_one_step_of_llama_3_1_8b_takes_what_its_bytes_take() -> None:
    """7.50e9 weights of the layers and head, 2 bytes each, or 1 byte in the layers, at the measured copy rate."""
    gpu = H100.with_bandwidth("measured")
    rows = {row.flow: row for row in predict(SHAPES["llama-3.1-8b"], StepShape(1, 1, False), gpu) if row.part == "step"}
    head, layers = 128256 * 4096, 32 * (6144 * 4096 + 4096 * 4096 + 3 * 4096 * 14336)
    assert rows["fp16"].time_s == pytest.approx(2 * (layers + head) / 3.02e12, rel=2e-3)
    assert rows["dataflow"].time_s == pytest.approx((layers + 2 * head) / 3.02e12, rel=2e-3)
    assert rows["dataflow"].speedup == rows["fp16"].time_s / rows["dataflow"].time_s


def test_the_step_is_the_sum_of_its_parts() -> None:
    step = StepShape(16, 4, True)
    rows = predict(TINY, step, H100)
    assert [row.part for row in rows[::3]] == [
        "qkv",
        "o",
        "gate_up",
        "down",
        "attention",
        "elementwise",
        "head",
        "step",
    ]
    for flow in FLOWS:
        mine = [row for row in rows if row.flow == flow]
        assert mine[-1].time_s == pytest.approx(sum(row.count * row.time_s for row in mine[:-1]))
        for name in ("operations", "num_bytes"):
            total = sum(part.count * getattr(part.work, name) for part in step_parts(flow, TINY, step))
            assert getattr(mine[-1].work, name) == pytest.approx(total)
    head = next(row for row in rows if row.part == "head")
    assert head.work == fp16_linear(4, 32, 8), "one row a prompt"


@pytest.mark.parametrize("name", sorted(SHAPES.keys() & BENCHMARK_SHAPES.keys()))
def test_known_shapes_are_those_that_the_benchmarks_run(name: str) -> None:
    config, shape = BENCHMARK_SHAPES[name], SHAPES[name]
    assert shape.linears() == linear_sizes(config)
    assert (shape.num_layers, shape.vocab_size) == (config.num_hidden_layers, config.vocab_size)


def test_the_memory_roof_can_be_chosen() -> None:
    assert H100.with_bandwidth("data-sheet") is H100
    assert H100.with_bandwidth("measured").bytes_per_s == 3.02e12
    assert H100.with_bandwidth("2.5") == dataclasses.replace(H100, bytes_per_s=2.5e12)
    with pytest.raises(UnknownBandwidth, match="no copy rate was measured for l4; give one in TB/s"):
        GPUS["l4"].with_bandwidth("measured")
    for choice in ("fast", "0", "-1", "nan", "inf"):
        with pytest.raises(UnknownBandwidth, match=f"bandwidth '{choice}' is not known; give data-sheet"):
            H100.with_bandwidth(choice)


def test_every_gpu_s_roofs_are_in_order() -> None:
    for gpu in GPUS.values():
        assert isinstance(gpu, Gpu)
        assert gpu.bytes_per_s < gpu.fp16_per_s < gpu.int8_per_s


@pytest.mark.parametrize("num_gpus", [2, 3, 4])
def test_a_sum_s_link_bytes_are_what_sending_shares_around_receives(num_gpus: int) -> None:
    """In a ring: each GPU receives every share but its own as it is summed, then as it is spread."""
    tokens, width = 3, 12
    received = [0] * num_gpus
    for _ in range(2):
        for gpu, share in product(range(num_gpus), repeat=2):
            if share != gpu:
                received[gpu] += 2 * tokens * width // num_gpus
    work = all_reduce_work(num_gpus, tokens, width)
    assert received == [work.link_bytes] * num_gpus
    assert work.num_bytes == 2 * 2 * tokens * width
    assert gather_work(num_gpus, tokens, width).link_bytes == (num_gpus - 1) * 2 * tokens * width


def test_parts_of_several_gpus_add_up_to_the_whole() -> None:
    """Weights and products; activations that every GPU has whole, such as a norm's, are counted on each."""
    step = StepShape(5, 6, False)
    for flow in FLOWS:
        whole = {part.name: part for part in step_parts(flow, TINY, step)}
        split = {part.name: part for part in step_parts(flow, TINY, step, 2)}
        assert set(split) - set(whole) == {"all_reduce", "gather"}
        assert split["all_reduce"].count == 2 * TINY.num_layers + 1
        for name in ("qkv", "o", "gate_up", "down", "head"):
            (n, k), (own_n, own_k) = whole[name].size or (0, 0), split[name].size or (0, 0)
            assert n * k == 2 * own_n * own_k
        assert split["attention"].work.fp16_operations * 2 == whole["attention"].work.fp16_operations
    with pytest.raises(ValueError, match="4 GPUs do not divide 2"):
        TINY.part(4)


@pytest.mark.parametrize(("link_per_s", "bound"), [(1.0, "link"), (1e15, "memory")])
def test_a_sum_is_bound_by_the_slower_of_link_and_memory(link_per_s: float, bound: str) -> None:
    gpu = dataclasses.replace(H100, link_bytes_per_s=link_per_s)
    assert all_reduce_work(2, 8, 64).bound(gpu) == bound
    rows = predict(TINY, StepShape(4, 4, False), gpu, 2)
    total = rows[-1]
    assert total.bound == bound
    own = [row for row in rows if row.flow == "dataflow" and row.part != "step"]
    assert total.time_s == pytest.approx(sum(row.count * row.time_s for row in own))


def test_an_activation_scale_per_input_channel_is_refused_with_the_algebra() -> None:
    assert explain("channel", "input-channel") == Verdict(
        False,
        "activation=input-channel is not practical: in y_tn = sum_k (s_k x_tk) w_nk the scale s_k varies with the "
        "summed index k and does not leave the sum, so no single int8 GEMM gives y. Scale activations per tensor, "
        "token or group; a factor per input channel can be folded into the weights before they are quantized "
        "(SmoothQuant).",
    )
    assert explain("channel", "channel") == explain("channel", "input-channel"), "a channel of x is one of the input"


@pytest.mark.parametrize(
    ("weight", "activation", "said"),
    [
        ("input-channel", "token", "y_tn = sum_k x_tk (s_k w_nk) the scale s_k varies with the summed index k"),
        ("element", "token", "the scale s_nk varies with the summed index k"),
        ("tensor", "element", "the scale s_tk varies with the summed index k"),
        ("group", "input-channel", "does not leave the sum"),
        ("channel", "float", "never one by the other"),
        ("float", "token", "never one by the other"),
    ],
)
def test_what_is_not_practical(weight: str, activation: str, said: str) -> None:
    verdict = explain(weight, activation)
    assert not verdict.is_practical
    assert said in verdict.reason


@pytest.mark.parametrize(
    ("weight", "activation", "said"),
    [
        ("tensor", "tensor", "y_tn = a b sum_k x_tk w_nk"),
        ("channel", "token", "y_tn = a_t b_n sum_k x_tk w_nk"),
        ("row", "row", "y_tn = a_t b_n sum_k"),
        ("tensor", "static", "y_tn = a b sum_k"),
        ("group", "token", "y_tn = sum_j a_t b_nj (sum_(k in group j) x_tk w_nk)"),
        ("group", "group", "y_tn = sum_j a_tj b_nj"),
        ("channel", "group", "K/g int32 partial sums"),
        ("float", "float", "nothing to gain"),
    ],
)
def test_what_is_practical_and_how(weight: str, activation: str, said: str) -> None:
    verdict = explain(weight, activation)
    assert verdict.is_practical
    assert said in verdict.reason


@pytest.mark.parametrize(("weight", "activation"), [("token", "token"), ("channel", "head"), ("", "token")])
def test_a_word_that_is_no_granularity(weight: str, activation: str) -> None:
    with pytest.raises(InvalidScheme, match="is no granularity; choose one of float, tensor"):
        explain(weight, activation)


def test_a_scheme_is_parsed() -> None:
    wanted = {"weight": "channel", "activation": "token"}
    assert parse_scheme("weight=channel,activation=token") == wanted
    assert parse_scheme(" activation = token , weight = channel") == wanted
    for text in ("", "weight=channel", "weight=a,activation=b,weight=c", "w=a,activation=b"):
        with pytest.raises(InvalidScheme, match="is not of the form weight=channel,activation=token"):
            parse_scheme(text)
