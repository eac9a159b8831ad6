"""Outlier channels in several copies: the function, the error that falls, and what is written down of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from quant.checkpoint.notes import NOTES_NAME
from quant.convert.inputs import Inputs
from quant.convert.search import ALPHAS, BALANCES, THRESHOLDS, smooth_layer
from quant.convert.smoothquant import Channels, SmoothGroup
from quant.convert.split import Split
from quant.scheme import PRESETS, Scheme
from service.store.calibration import Calibration, text_windows
from service.store.quantized import quantize_model
from tests.support.layer_errors import CPU, errors
from tests.support.tiny_models import change_tensors, save_tiny_model

GROUP = SmoothGroup("up", ("down",), gate="gate")
WIDTH, HIDDEN = 384, 32


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp_state(has_biases: bool = False) -> dict[str, torch.Tensor]:
    state = {
        "gate.weight": noise(WIDTH, HIDDEN, seed=1),
        "up.weight": noise(WIDTH, HIDDEN, seed=2),
        "down.weight": noise(16, WIDTH, seed=3),
    }
    if has_biases:
        state |= {"gate.bias": noise(WIDTH, seed=4), "up.bias": noise(WIDTH, seed=5), "down.bias": noise(16, seed=6)}
    return state


def inner(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    gate, up = (nn.functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias")) for name in ("gate", "up"))
    return nn.functional.silu(gate) * up


def outputs(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(inner(state, x), state["down.weight"], state.get("down.bias"))


def channels(*absmax: float) -> Channels:
    return Channels(torch.tensor(absmax), torch.tensor(absmax))


def test_places_of_the_quietest_go_to_the_loudest() -> None:
    x, w = channels(1, 100, 2, 3, 0.1, 0.2, 40), channels(1, 1, 1, 1, 1, 1, 1)
    split = Split.of(x, w, 3)
    # 4, 5 and 0 matter least; 100, 50 and 40 are the largest when each of them is given away.
    assert split.origins.tolist() == [6, 1, 2, 3, 1, 1, 6]
    assert split.copies.tolist() == [2, 3, 1, 1, 3, 3, 2]
    assert x.at(split.origins).over(split.copies).absmax.tolist() == pytest.approx(
        [20, 100 / 3, 2, 3, 100 / 3, 100 / 3, 20]
    )


def test_what_is_noted_tells_all_of_it() -> None:
    split = Split.of(Channels.of(noise(50, WIDTH, seed=0)), Channels.of(noise(16, WIDTH, seed=1)), 9)
    assert len(split.moved) == 9
    assert torch.equal(Split.read(json.loads(json.dumps(split.moved)), WIDTH).origins, split.origins)


@given(seed=st.integers(0, 500), num_places=st.integers(0, 40), has_biases=st.booleans())
def test_where_the_given_channels_are_dead_the_function_is_the_same(
    seed: int, num_places: int, has_biases: bool
) -> None:
    state = mlp_state(has_biases)
    generator = torch.Generator().manual_seed(seed)
    dead = torch.randperm(WIDTH, generator=generator)[:num_places]
    state["down.weight"][:, dead] = 0
    x = torch.randn(20, HIDDEN, generator=generator)
    split = Split.of(Channels.of(inner(state, x)), Channels.of(state["down.weight"]), num_places)
    assert set(split.moved) == {str(place) for place in dead.tolist()}
    changed = dict(state)
    split.apply(changed, GROUP)
    torch.testing.assert_close(inner(changed, x), inner(state, x)[:, split.origins] / split.copies)
    # Both sums round in float32, each term a few times.
    rounding = 2.0**-21 * (inner(state, x).abs() @ state["down.weight"].abs().T + 1)
    assert bool(((outputs(changed, x) - outputs(state, x)).abs() <= rounding).all())
    assert {name: tensor.shape for name, tensor in changed.items()} == {n: t.shape for n, t in state.items()}


def test_inputs_are_split_as_the_op_before_will_write_them() -> None:
    rows = noise(64, WIDTH, seed=0)
    whole = Inputs(Channels.of(rows), Channels.of(rows[:32]), rows, rows.T @ rows)
    split = Split.of(whole.channels, Channels.of(noise(16, WIDTH, seed=1)), 12)
    found, wanted = whole.split(split), rows[:, split.origins] / split.copies
    torch.testing.assert_close(found.rows, wanted)
    torch.testing.assert_close(found.channels.absmax, Channels.of(wanted).absmax)
    torch.testing.assert_close(found.fitted.rms, Channels.of(wanted[:32]).rms)
    torch.testing.assert_close(found.gram, wanted.T @ wanted)


def smoothed(scheme: Scheme, has_outlier: bool) -> tuple[float, float, dict[str, torch.Tensor]]:
    """The error that the search reports with and without splitting, and the changed tensors."""
    state = mlp_state()
    state["down.weight"][:, 10:60] *= 1e-4  # channels that hardly matter
    if has_outlier:
        state["up.weight"][3] *= 60
        state["down.weight"][:, 3] *= 2
    x = noise(256, HIDDEN, seed=7)
    rows = inner(state, x)
    found = []
    for gate in ("gate", None):
        changed = dict(state)
        inputs = {
            "up": Inputs(Channels.of(x), Channels.of(x), x, None),
            "down": Inputs(Channels.of(rows), Channels.of(rows), rows, None),
        }
        choice = smooth_layer(
            changed, [SmoothGroup("up", ("down",), gate=gate)], inputs, scheme_of=lambda _: scheme, dtype=torch.float32
        )["up"]
        assert choice.strength in (None, *ALPHAS, *THRESHOLDS, *BALANCES)
        assert gate is not None or choice.split is None
        found.append((choice, changed))
        # What the Linear will read is what the changed layer before it writes.
        torch.testing.assert_close(inputs["down"].rows, inner(changed, x), rtol=1e-3, atol=1e-4)
    (split, changed), (whole, _) = found
    return split.error, whole.error, changed


@pytest.mark.parametrize("name", ["smoothquant-o1", "smoothquant-o2", "smoothquant-o3"])
def test_an_outlier_that_spoils_a_shared_scale_is_split(name: str) -> None:
    split, whole, changed = smoothed(PRESETS[name], has_outlier=True)
    assert split < 0.5 * whole
    # Copies are alike, and stand where 10..59 stood.
    copies = [k for k in range(10, 60) if torch.equal(changed["gate.weight"][k], changed["gate.weight"][3])]
    assert len(copies) >= 1


def test_nothing_is_split_where_it_does_not_help() -> None:
    split, whole, _ = smoothed(PRESETS["w8a8"], has_outlier=False)
    assert split == whole


def test_an_alpha_by_hand_splits_nothing() -> None:
    state = mlp_state()
    x = noise(64, HIDDEN, seed=7)
    rows = inner(state, x)
    rows[:, 3] *= 300
    inputs = {"down": Inputs(Channels.of(rows), Channels.of(rows), rows, None)}
    scheme = PRESETS["smoothquant-o3"].with_alpha(0.5)
    assert smooth_layer(state, [GROUP], inputs, scheme_of=lambda _: scheme, dtype=torch.float32)["up"].split is None


def test_a_checkpoint_notes_its_splits_and_its_layers_are_compared_around_them(tmp_path: Path) -> None:
    """The tiny model with an outlier channel and channels that do nothing, so that something is split."""
    scheme = replace(PRESETS["w8a8-static"], has_token_down=False)
    source = save_tiny_model(tmp_path / "float", "llama")

    changes = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("up_proj.weight"):
            changes[name] = tensor.clone()
            changes[name][3] *= 40
        if name.endswith("down_proj.weight"):
            changes[name] = tensor.clone()
            changes[name][:, 3] *= 2
            changes[name][:, 5:40] *= 1e-3
    change_tensors(source, changes)
    int8, text = tmp_path / "int8", tmp_path / "text"
    text.write_text("to be or not to be, that is the question " * 20)
    # Compared on what it was calibrated on: a range that fits no other text would hide a channel in the wrong place.
    quantize_model(source, int8, scheme, Calibration(text, num_windows=4, window_len=40), CPU)
    windows = text_windows(source, text, 4, 40)
    splits = json.loads((int8 / NOTES_NAME).read_text())["splits"]
    assert splits
    for up, moved in splits.items():
        gate = load_file(int8 / "model.safetensors")[up.replace("up_proj", "gate_proj") + ".weight"]
        assert all(torch.equal(gate[int(place)], gate[origin]) for place, origin in moved.items())
    assert all(row.error < 0.1 for row in errors(source, int8, scheme, windows))
