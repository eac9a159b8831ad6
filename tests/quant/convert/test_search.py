from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant.convert.distill import Student, distill
from quant.convert.gptq import round_gptq
from quant.convert.inputs import Inputs
from quant.convert.rounding import ScaleRule, Strategy, dequantize, quantize_weight, static_scale
from quant.convert.search import (
    ALPHAS,
    BALANCES,
    RANGE_SHARES,
    THRESHOLDS,
    Ranges,
    best_ranges,
    product,
    round_nearest,
    smooth_layer,
)
from quant.convert.smoothquant import Channels, SmoothGroup, divide, group_migration
from quant.errors import Unquantizable
from quant.linear import InputCodes, Int8Linear
from quant.scheme import PRESETS, Scheme, Smoothing

GROUP = SmoothGroup("norm", ("a", "b"))


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(rows: torch.Tensor) -> Inputs:
    channels = Channels.of(rows)
    return Inputs(channels, channels, rows, rows.T @ rows)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-static", "smoothquant-o1", "smoothquant-o2", "smoothquant-o3"])
def test_the_search_finds_what_trying_every_strength_on_the_served_linear_finds(name: str) -> None:
    scheme = PRESETS[name]
    rows = noise(64, 32, seed=0)
    rows[:, 5] *= 40
    state = {"norm.weight": torch.ones(32), "a.weight": noise(16, 32, seed=1), "b.weight": noise(8, 32, seed=2)}
    errors = {}
    for strength in (None, *ALPHAS, *THRESHOLDS, *BALANCES):
        trial, s = dict(state), torch.ones(32)
        if strength is not None:
            read = {sink: Channels.of(rows) for sink in GROUP.sinks}
            s = divide(trial, GROUP, group_migration(trial, GROUP, read, strength))
        errors[strength] = sum(
            (served(trial[f"{sink}.weight"], rows / s, scheme) - rows @ state[f"{sink}.weight"].T).square().sum().item()
            for sink in GROUP.sinks
        )
    best = min(errors, key=errors.__getitem__)
    inputs = {sink: inputs_of(rows) for sink in GROUP.sinks}
    choice = smooth_layer(state, [GROUP], inputs, scheme_of=lambda _: scheme, dtype=torch.float32)["norm"]
    assert choice.strength == best
    assert choice.strength is not None
    torch.testing.assert_close(inputs["a"].rows * state["norm.weight"].reciprocal(), rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", ["search", 0.5])
@pytest.mark.parametrize("name", ["w8a8", "smoothquant-o3"])
def test_a_group_that_no_token_reached_is_left_as_it_is(name: str, smoothing: Smoothing) -> None:
    """As of an expert that the router chose for no token of the calibration."""
    state = {"up.weight": noise(32, 16, seed=0), "down.weight": noise(8, 32, seed=1)}
    before = dict(state)
    scheme = replace(PRESETS[name], smoothing=smoothing)
    choices = smooth_layer(
        state, [SmoothGroup("up", ("down",), gate="gate")], {}, scheme_of=lambda _: scheme, dtype=torch.float32
    )
    assert choices["up"].note is None
    assert choices["up"].split is None
    assert all(state[key] is before[key] for key in before)


def served(weight: torch.Tensor, rows: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    assert scheme.weight != "float"
    assert scheme.activation != "float"
    codes, scale = quantize_weight(weight, ScaleRule(scheme.weight, torch.float32))
    input_scale = static_scale(rows.abs().amax().reshape(1), torch.float32) if scheme.activation == "static" else None
    input_codes = InputCodes(scheme.activation, input_scale)
    linear = Int8Linear(codes, scale.reshape(-1), input_codes=input_codes, out_dtype=torch.float32)
    return linear(rows)


def test_a_fixed_alpha_is_taken_as_given() -> None:
    rows = noise(64, 32, seed=0)
    state = {"norm.weight": torch.ones(32), "a.weight": noise(16, 32, seed=1), "b.weight": noise(8, 32, seed=2)}
    inputs = {sink: inputs_of(rows) for sink in GROUP.sinks}
    choices = smooth_layer(
        state, [GROUP], inputs, scheme_of=lambda _: PRESETS["w8a8"].with_alpha(0.3), dtype=torch.float32
    )
    assert choices["norm"].strength == 0.3


def test_ranges_are_clipped_where_it_helps_and_nowhere_else() -> None:
    rows = noise(512, 64, seed=0)
    rows[0, 0] = 60.0  # one rare value that costs all others their precision
    weight = noise(16, 64, seed=1)
    inputs = inputs_of(rows)
    assert best_ranges({"a": weight}, {"a": inputs}, PRESETS["w8a8"], torch.float32) == {"a": (1.0, 1.0)}
    weight_range, input_range = best_ranges({"a": weight}, {"a": inputs}, PRESETS["w8a8-static"], torch.float32)["a"]
    assert weight_range == 1.0
    assert input_range in RANGE_SHARES


@pytest.mark.parametrize("name", ["w8a8-static", "smoothquant-o3"])
def test_readers_of_one_activation_share_the_range_that_is_best_for_them_together(name: str) -> None:
    """Alone they would choose different ones: one reads the rare large values, the other the many small ones."""
    rows = noise(512, 64, seed=0)
    rows[::16, 0] *= 30
    loud, soft = noise(16, 64, seed=1), noise(16, 64, seed=2)
    loud[:, 1:] *= 0.01
    soft[:, 0] = 0
    weights, inputs, scheme = {"loud": loud, "soft": soft}, inputs_of(rows), PRESETS[name]
    alone = {each: best_ranges({each: weights[each]}, {each: inputs}, scheme, torch.float32)[each] for each in weights}
    assert alone["loud"].input > alone["soft"].input
    both = best_ranges(weights, dict.fromkeys(weights, inputs), scheme, torch.float32)
    assert both["loud"].input == both["soft"].input

    def error(share: float) -> float:
        ranges = {each: Ranges(both[each].weight, share) for each in weights}
        int8 = {
            each: round_nearest(weights[each], inputs.fitted.absmax, scheme, torch.float32, ranges[each])
            for each in weights
        }
        return sum(
            float((product(int8[each], rows, scheme) - rows @ weights[each].T).square().sum()) for each in weights
        )

    assert error(both["loud"].input) == min(error(share) for share in RANGE_SHARES)


@pytest.mark.parametrize("strategy", ["channel", "tensor", "group"])
@pytest.mark.parametrize("seed", range(5))
def test_gptq_is_never_worse_than_nearest_by_its_own_measure(strategy: Strategy, seed: int) -> None:
    rows = noise(256, 64, seed=seed) @ noise(64, 64, seed=seed + 100)
    weight = noise(24, 64, seed=seed + 200)
    size = 32 if strategy == "group" else None

    def error(codes: torch.Tensor, scale: torch.Tensor) -> float:
        return (rows @ (dequantize(codes, scale) - weight).T).square().sum().item()

    codes, scale = round_gptq(weight, rows.T @ rows, ScaleRule(strategy, torch.float32, size))
    nearest = quantize_weight(weight, ScaleRule(strategy, torch.float32, size))
    assert error(codes, scale) < error(*nearest)
    assert torch.equal(scale, nearest[1])
    assert codes.abs().max() <= 127


def test_gptq_refuses_a_gram_matrix_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"gram \[3, 3\] must be \[4, 4\]"):
        round_gptq(torch.ones(2, 4), torch.ones(3, 3), ScaleRule("channel", torch.float32))
    with pytest.raises(Unquantizable, match="not finite in float32"):
        round_gptq(torch.ones(2, 4), torch.full((4, 4), float("inf")), ScaleRule("channel", torch.float32))


def test_distillation_lowers_the_layer_s_error_the_same_way_twice() -> None:
    """A layer of one Linear whose input has two channels that weights can take over from one another."""
    scheme = replace(PRESETS["zeroquant-lkd"], group_size=32)
    rows = noise(1, 64, 8, seed=0) @ noise(8, 64, seed=1)
    weight = noise(16, 64, seed=2)
    targets = [rows @ weight.T]
    students = [Student(weight, None, scheme=scheme, scale_dtype=torch.float32) for _ in range(2)]
    losses = [distill([student], student, [rows], targets) for student in students]
    assert losses[0] == losses[1]
    assert losses[0][1] < losses[0][0]
    assert torch.equal(students[0].weight, students[1].weight)
    assert not torch.equal(students[0].weight, weight)
