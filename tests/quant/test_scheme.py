from __future__ import annotations

import dataclasses

import pytest

from quant.scheme import PRESETS, Scheme


@pytest.mark.parametrize(
    ("name", "weight", "activation", "smoothing"),
    [
        ("fp16", "float", "float", None),
        ("rtn", "tensor", "static", None),
        ("w8a8", "channel", "token", 0.5),
        ("smoothquant-o1", "tensor", "token", 0.5),
        ("smoothquant-o2", "tensor", "tensor", 0.5),
        ("smoothquant-o3", "tensor", "static", 0.5),
    ],
)
def test_presets_are_the_methods_of_the_paper(name, weight, activation, smoothing):
    scheme = Scheme.preset(name)
    assert (scheme.name, scheme.weight, scheme.activation, scheme.smoothing) == (name, weight, activation, smoothing)
    assert scheme.is_int8 == (name != "fp16")
    assert scheme.needs_calibration == (name != "fp16")
    assert scheme.describe().endswith(".")


def test_descriptions_differ():
    both = [scheme.with_kv(kv) for scheme in PRESETS.values() if scheme.is_int8 for kv in ("float", "int8")]
    assert len({scheme.describe() for scheme in both}) == len({scheme.label for scheme in both}) == len(both)


def test_keys_and_values_are_float_unless_asked_for():
    assert {scheme.kv for scheme in PRESETS.values()} == {"float"}
    scheme = Scheme.preset("w8a8").with_kv("int8")
    assert scheme == dataclasses.replace(PRESETS["w8a8"], kv="int8")
    assert scheme.describe().endswith(", int8 keys and values with one scale per token and head.")
    assert (scheme.label, PRESETS["w8a8"].label) == ("w8a8, int8 KV", "w8a8")
    assert scheme.with_kv(None) == scheme
    assert scheme.with_kv("float") == PRESETS["w8a8"]
    assert Scheme.preset("fp16").with_kv("int8") == PRESETS["fp16"]


def test_alpha_replaces_the_preset_s():
    assert Scheme.preset("w8a8", alpha=0.75) == dataclasses.replace(PRESETS["w8a8"], smoothing=0.75)
    assert "0.75" in Scheme.preset("w8a8", alpha=0.75).describe()
    assert PRESETS["w8a8"].smoothing == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme.preset("int4"), "unknown scheme 'int4'; choose one of fp16, rtn, w8a8"),
        (lambda: Scheme.preset("rtn", alpha=0.5), "'rtn' does not smooth"),
        (lambda: Scheme.preset("w8a8", alpha=1.5), "smoothing = 1.5"),
        (lambda: Scheme.preset("w8a8", alpha=float("nan")), "smoothing = nan"),
        (lambda: Scheme("x", "group", "token"), "weight = 'group' is not served; choose one of float, tensor, channel"),
        (lambda: Scheme("x", "channel", "group"), "activation = 'group' is not served"),
        (lambda: Scheme("x", "channel", "token", "searched"), "smoothing = 'searched' is not served; give alpha"),
        (lambda: Scheme("x", "channel", "token", True), "smoothing = True"),
        (lambda: Scheme("x", "channel", "token", None, 6.0), "outliers = 6.0 is not served yet"),
        (lambda: Scheme("x", "channel", "float"), "both in int8"),
        (lambda: Scheme("x", "float", "token"), "both in int8"),
        (lambda: Scheme("x", "float", "float", 0.5), "changes nothing in a float scheme"),
        (lambda: Scheme("x", None, "token"), "weight = None"),
        (lambda: Scheme("x", "channel", "token", kv="int4"), "kv = 'int4' is not served; choose one of float, int8"),
        (lambda: Scheme("x", "float", "float", kv="int8"), "the baseline stays float"),
    ],
)
def test_a_value_that_is_not_served_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(")):
        make()


def test_a_scheme_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scheme.preset("w8a8").weight = "tensor"
