from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quant.convert.smoothquant import (
    MAX_S,
    MIN_S,
    Balance,
    Channels,
    SmoothGroup,
    Strength,
    Threshold,
    balance,
    divide,
    group_migration,
    migration,
)
from quant.errors import Unquantizable
from tests.support.modules import in_float32
from tests.support.tiny_llama import Tiny

magnitudes = st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=8)
alphas = st.floats(0, 1)
shares = st.floats(2**-10, 1)
strengths = st.one_of(alphas, st.builds(Threshold, shares), st.builds(Balance, shares))


def even(absmax: Sequence[float] | Tensor) -> Channels:
    """Channels whose every value is as large as the largest."""
    values = torch.as_tensor(absmax, dtype=torch.float32)
    return Channels(values, values)


def fold(
    state: dict[str, Tensor],
    groups: Sequence[SmoothGroup],
    absmax: Mapping[str, Tensor],
    strength: Strength,
    norm_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Smooth every group in place; what the sinks read then."""
    read = {sink: even(values) for sink, values in absmax.items()}
    for group in groups:
        s = divide(state, group, group_migration(state, group, read, strength), norm_dtype)
        read |= {sink: read[sink].over(s) for sink in group.sinks}
    return {sink: channels.absmax for sink, channels in read.items()}


@given(x=magnitudes, strength=strengths, data=st.data())
def test_migration_is_finite_positive_and_leaves_dead_channels(
    x: list[float], strength: Strength, data: st.DataObject
) -> None:
    w = data.draw(st.lists(st.floats(0, 1e4, width=32), min_size=len(x), max_size=len(x)))
    s = migration(even(x), even(w), strength)
    assert s.dtype == torch.float32
    assert bool(((s >= MIN_S * 0.999) & (s <= MAX_S * 1.001)).all())
    for k in range(len(x)):
        if x[k] == 0 or w[k] == 0:
            assert s[k] == 1


@given(x=st.floats(1e-2, 1e3), w=st.floats(1e-2, 1e3), alpha=alphas)
def test_migration_is_the_equation(x: float, w: float, alpha: float) -> None:
    s = migration(even([x]), even([w]), alpha).item()
    assert s == pytest.approx(x**alpha / w ** (1 - alpha), rel=1e-5)


@given(x=st.floats(1e-2, 1e3), w=st.floats(1e-2, 1e3))
def test_half_way_both_sides_are_equally_hard(x: float, w: float) -> None:
    s = migration(even([x]), even([w]), 0.5).item()
    assert x / s == pytest.approx(w * s, rel=1e-4)


@given(x=st.floats(1e-2, 1e3), w=st.floats(1e-2, 1e3), low=alphas, high=alphas)
def test_more_alpha_never_leaves_more_in_the_activation(x: float, w: float, low: float, high: float) -> None:
    low, high = sorted((low, high))
    s_low, s_high = (migration(even([x]), even([w]), alpha).item() for alpha in (low, high))
    # d log s / d alpha = log x + log w
    assert (s_high >= s_low * 0.9999) if x * w >= 1 else (s_high <= s_low * 1.0001)


def test_a_threshold_divides_what_is_above_it_and_nothing_else() -> None:
    s = migration(even([100.0, 10.0, 1.0]), even([1.0, 1.0, 1.0]), Threshold(0.05))
    assert s.tolist() == pytest.approx([20.0, 2.0, 1.0])


@given(seed=st.integers(0, 1000), share=shares)
def test_a_balance_is_the_minimum_that_it_says_it_is(seed: int, share: float) -> None:
    """No s within the two ranges has a smaller error; only channels above the share reach beyond the activation's."""
    generator = torch.Generator().manual_seed(seed)
    rows, weight = (torch.randn(9, 6, generator=generator).double().pow(3) for _ in range(2))
    x, w = Channels.of(rows), Channels.of(weight)
    product = (x.absmax * w.absmax).amax() * share
    s = balance(x, w, share)
    assert s.log().mean().item() == pytest.approx(0, abs=1e-9)
    fits = x.absmax * w.absmax <= product
    ours = s * (product / (w.absmax * s).amax())  # the activation's range at 1
    assert bool((x.absmax / ours <= 1 + 1e-9)[fits].all())
    low, high = x.absmax, product / w.absmax

    def error(trial: Tensor) -> Tensor:
        return w.rms.square() * trial.square() + (product / trial).square() * x.rms.square()

    for point in torch.linspace(0, 1, 33, dtype=torch.float64):
        other = low * (high / low).pow(point)
        assert bool((error(ours) <= error(other) * (1 + 1e-6))[fits].all())


@pytest.mark.parametrize(
    ("x", "w", "alpha", "message"),
    [
        ([1.0], [1.0], 1.1, "alpha = 1.1"),
        ([1.0], [1.0, 2.0], 0.5, r"must both be \[K\]"),
        ([1.0], [1.0], Threshold(0.0), "threshold 0: the share is outside"),
        ([1.0], [1.0], Balance(1.5), "balance 1.5: the share is outside"),
    ],
)
def test_migration_refuses(x: list[float], w: list[float], alpha: Strength, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        migration(even(x), even(w), alpha)


@pytest.mark.parametrize(
    ("x", "w", "name"), [([float("nan")], [1.0], "x"), ([1.0], [float("inf")], "w"), ([-1.0], [1.0], "x")]
)
def test_migration_refuses_a_range_that_is_none(x: list[float], w: list[float], name: str) -> None:
    with pytest.raises(Unquantizable, match=f"absmax of {name} holds"):
        migration(even(x), even(w), 0.5)


def _rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def _norm_block(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    y = nn.functional.layer_norm(x, (8,), state["norm.weight"], state["norm.bias"])
    return torch.cat([y @ state["a.weight"].T, y @ state["b.weight"].T], dim=-1)


@given(strength=strengths, seed=st.integers(0, 1000))
def test_norm_to_linears_keeps_the_function(strength: Strength, seed: int) -> None:
    state = {
        "norm.weight": _rand(8, seed=seed) * 10,
        "norm.bias": _rand(8, seed=seed + 1),
        "a.weight": _rand(5, 8, seed=seed + 2),
        "b.weight": _rand(3, 8, seed=seed + 3),
    }
    x = _rand(16, 8, seed=seed + 4)
    before = _norm_block(x, state)
    original = {name: tensor.clone() for name, tensor in state.items()}
    given_tensors = dict(state)
    absmax = dict.fromkeys(
        ("a", "b"), nn.functional.layer_norm(x, (8,), state["norm.weight"], state["norm.bias"]).abs().amax(0)
    )
    smoothed = fold(state, [SmoothGroup("norm", ("a", "b"))], absmax, strength)
    torch.testing.assert_close(_norm_block(x, state), before, rtol=1e-4, atol=1e-4)
    after = nn.functional.layer_norm(x, (8,), state["norm.weight"], state["norm.bias"]).abs().amax(0)
    torch.testing.assert_close(smoothed["a"], after, rtol=1e-4, atol=1e-5)
    assert smoothed["b"].equal(smoothed["a"])
    assert all(torch.equal(given_tensors[name], original[name]) for name in original)  # the dict changes, no tensor


def _gated(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    return (nn.functional.silu(x @ state["gate.weight"].T) * (x @ state["up.weight"].T + state["up.bias"])) @ state[
        "down.weight"
    ].T


@given(strength=strengths, seed=st.integers(0, 1000))
def test_up_to_down_keeps_the_function(strength: Strength, seed: int) -> None:
    state = {
        "gate.weight": _rand(12, 8, seed=seed),
        "up.weight": _rand(12, 8, seed=seed + 1),
        "up.bias": _rand(12, seed=seed + 2),
        "down.weight": _rand(8, 12, seed=seed + 3),
    }
    x = _rand(16, 8, seed=seed + 4)
    before = _gated(x, state)
    hidden = nn.functional.silu(x @ state["gate.weight"].T) * (x @ state["up.weight"].T + state["up.bias"])
    fold(state, [SmoothGroup("up", ("down",))], {"down": hidden.abs().amax(0)}, strength)
    torch.testing.assert_close(_gated(x, state), before, rtol=1e-4, atol=1e-4)


@given(alpha=alphas, seed=st.integers(0, 1000), num_copies=st.integers(1, 3))
def test_v_to_o_keeps_the_function_of_grouped_queries(alpha: float, seed: int, num_copies: int) -> None:
    """Attention mixes tokens, not channels: each of 2 value heads of 4 channels is read by num_copies query heads."""
    width = 8 * num_copies
    state = {
        "v.weight": _rand(8, 6, seed=seed),
        "v.bias": _rand(8, seed=seed + 1),
        "o.weight": _rand(5, width, seed=seed + 2),
    }
    x, mix = _rand(10, 6, seed=seed + 3), _rand(10, 10, seed=seed + 4).softmax(-1)

    def read() -> torch.Tensor:
        heads = (mix @ (x @ state["v.weight"].T + state["v.bias"])).view(10, 2, 1, 4)
        return heads.expand(-1, -1, num_copies, -1).reshape(10, width)

    before, absmax = read() @ state["o.weight"].T, read().abs().amax(0)
    smoothed = fold(state, [SmoothGroup("v", ("o",), num_copies, 4)], {"o": absmax}, alpha)
    torch.testing.assert_close(read() @ state["o.weight"].T, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(smoothed["o"], read().abs().amax(0), rtol=1e-4, atol=1e-5)


@given(alpha=alphas, seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_norm_with_an_offset_keeps_the_function(alpha: float, seed: int, dtype: torch.dtype) -> None:
    # As a checkpoint of that dtype holds it: a weight that rounds to -1 and is left alone would change by rounding.
    state = {"norm.weight": _rand(8, seed=seed).to(dtype).float(), "a.weight": _rand(5, 8, seed=seed + 1)}
    x = _rand(16, 8, seed=seed + 2)
    before = (x * (state["norm.weight"] + 1)) @ state["a.weight"].T
    absmax = (x * (state["norm.weight"] + 1)).abs().amax(0)
    fold(state, [SmoothGroup("norm", ("a",), offset=1.0)], {"a": absmax}, alpha, dtype)
    stored = state["norm.weight"].to(dtype).float()
    torch.testing.assert_close((x * (stored + 1)) @ state["a.weight"].T, before, rtol=1e-4, atol=1e-4)


def test_a_norm_rounded_to_bfloat16_is_compensated_in_its_sinks() -> None:
    state = {"norm.weight": _rand(64, seed=0), "a.weight": _rand(5, 64, seed=1)}
    x = _rand(4, 64, seed=2)
    before = (x * state["norm.weight"]) @ state["a.weight"].T
    fold(state, [SmoothGroup("norm", ("a",))], {"a": _rand(64, seed=3).abs()}, 0.5, torch.bfloat16)
    stored = state["norm.weight"].bfloat16().float()
    torch.testing.assert_close((x * stored) @ state["a.weight"].T, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(stored, state["norm.weight"])


def test_zero_norm_weights_and_dead_columns_stay() -> None:
    state = {"norm.weight": torch.tensor([0.0, 2.0, 3.0]), "a.weight": torch.tensor([[1.0, 0.0, 4.0]])}
    smoothed = fold(state, [SmoothGroup("norm", ("a",))], {"a": torch.tensor([0.0, 5.0, 36.0])}, 0.5)
    assert state["norm.weight"].tolist() == pytest.approx([0.0, 2.0, 1.0])
    assert state["a.weight"].tolist() == [pytest.approx([1.0, 0.0, 12.0])]
    assert smoothed["a"].tolist() == pytest.approx([0.0, 5.0, 12.0])


def test_smoothing_leaves_the_whole_model_unchanged(tiny: Tiny) -> None:
    model = tiny.model.double()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        before = model(ids).logits
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.float() for name, tensor in original.items()}
    absmax = {sink: torch.rand(state[f"{sink}.weight"].shape[1]) + 0.1 for g in tiny.groups for sink in g.sinks}
    fold(state, tiny.groups, absmax, 0.5)
    assert not torch.equal(state["model.layers.0.input_layernorm.weight"].double(), original["model.norm.weight"])
    model.load_state_dict(state)
    with torch.inference_mode():
        after = model(ids).logits
    model.load_state_dict(original)
    in_float32(model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("group", "absmax", "message"),
    [
        (SmoothGroup("norm", ("gone",)), {"gone": torch.ones(3)}, "no tensor gone.weight"),
        (SmoothGroup("gone", ("a",)), {"a": torch.ones(3)}, "no tensor gone.weight"),
        (SmoothGroup("norm", ("a",)), {}, "no activation range for a"),
        (SmoothGroup("norm", ()), {}, "no activation range for any sink"),
        (SmoothGroup("short", ("a",)), {"a": torch.ones(3)}, "writes 2 channels, the sinks read 3"),
    ],
)
def test_fold_refuses_what_does_not_fit(group: SmoothGroup, absmax: dict[str, Tensor], message: str) -> None:
    state = {"norm.weight": torch.ones(3), "short.weight": torch.ones(2), "a.weight": torch.ones(1, 3)}
    with pytest.raises(ValueError, match=message):
        fold(state, [group], absmax, 0.5)
