from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from quant.errors import InvalidScheme
from quant.scheme import PRESETS, ActivationScale, Scheme, WeightScale


@pytest.mark.parametrize(
    ("name", "weight", "activation", "knobs"),
    [
        ("fp16", "float", "float", {}),
        ("rtn", "tensor", "static", {}),
        ("rtn-dynamic", "tensor", "tensor", {}),
        ("rtn-token", "channel", "token", {}),
        ("w8a8", "channel", "token", {"smoothing": "search"}),
        ("w8a8-static", "channel", "static", {"smoothing": "search", "has_token_down": True}),
        ("smoothquant-o1", "tensor", "token", {"smoothing": "search"}),
        ("smoothquant-o2", "tensor", "tensor", {"smoothing": "search"}),
        ("smoothquant-o3", "tensor", "static", {"smoothing": "search"}),
        ("zeroquant", "group", "token", {"group_size": 128}),
        ("zeroquant-lkd", "group", "token", {"group_size": 128, "is_distilled": True}),
        ("llm-int8", "channel", "token", {"outliers": 6.0}),
    ],
)
def test_presets_are_the_methods_of_the_papers(
    name: str, weight: WeightScale, activation: ActivationScale, knobs: dict[str, Any]
) -> None:
    scheme = Scheme.preset(name)
    assert scheme == Scheme(name, weight, activation, **knobs)
    assert scheme.is_int8 == (name != "fp16")
    assert scheme.needs_calibration == (activation == "static" or "smoothing" in knobs or "is_distilled" in knobs)
    assert scheme.describe().endswith(".")


def test_every_preset_is_listed_above() -> None:
    assert len(PRESETS) == 12


def test_a_group_size_is_halved_until_it_divides_every_width() -> None:
    scheme = Scheme.preset("zeroquant")
    assert scheme.fitted([256, 1536]) == scheme
    assert scheme.fitted([576, 1536]).group_size == 64
    assert Scheme.preset("w8a8").fitted([7]) == Scheme.preset("w8a8")
    with pytest.raises(InvalidScheme, match=r"halved down to 32, do not divide every width in \[48, 256\]"):
        scheme.fitted([256, 48])


def test_labels_say_what_differs_from_the_preset() -> None:
    assert Scheme.preset("w8a8", alpha=0.5).label == "w8a8, alpha 0.5"
    assert dataclasses.replace(PRESETS["w8a8"], smoothing=None).label == "w8a8, not smoothed"
    assert PRESETS["w8a8"].with_rounding("gptq").with_kv("int8").label == "w8a8, gptq, int8 KV"
    assert PRESETS["fp16"].with_rounding("gptq") == PRESETS["fp16"]
    assert PRESETS["rtn-token"].with_rounding("gptq").needs_calibration


def test_descriptions_differ() -> None:
    both = [scheme.with_kv(kv) for scheme in PRESETS.values() if scheme.is_int8 for kv in ("float", "int8")]
    assert len({scheme.describe() for scheme in both}) == len({scheme.label for scheme in both}) == len(both)


def test_keys_and_values_are_float_unless_asked_for() -> None:
    assert {scheme.kv for scheme in PRESETS.values()} == {"float"}
    scheme = Scheme.preset("w8a8").with_kv("int8")
    assert scheme == dataclasses.replace(PRESETS["w8a8"], kv="int8")
    assert scheme.describe().endswith(", int8 keys and values with one scale per token and head.")
    assert (scheme.label, PRESETS["w8a8"].label) == ("w8a8, int8 KV", "w8a8")
    assert scheme.with_kv(None) == scheme
    assert scheme.with_kv("float") == PRESETS["w8a8"]
    assert Scheme.preset("fp16").with_kv("int8") == PRESETS["fp16"]


def test_the_head_is_float_unless_asked_for() -> None:
    assert {scheme.head for scheme in PRESETS.values()} == {"float"}
    scheme = PRESETS["w8a8"].with_head("int8")
    assert scheme == dataclasses.replace(PRESETS["w8a8"], head="int8")
    assert (scheme.label, scheme.with_kv("int8").label) == ("w8a8, int8 head", "w8a8, int8 KV, int8 head")
    assert "an int8 head" in scheme.describe()
    assert PRESETS["fp16"].with_head("int8") == PRESETS["fp16"]
    with pytest.raises(InvalidScheme, match="head = 'int8' in a float scheme"):
        dataclasses.replace(PRESETS["fp16"], head="int8")


def test_alpha_replaces_the_preset_s() -> None:
    assert Scheme.preset("w8a8", alpha=0.75) == dataclasses.replace(PRESETS["w8a8"], smoothing=0.75)
    assert "0.75" in Scheme.preset("w8a8", alpha=0.75).describe()
    assert PRESETS["w8a8"].smoothing == "search"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme.preset("int4"), "unknown scheme 'int4'; choose one of fp16, rtn, rtn-dynamic"),
        (lambda: Scheme.preset("rtn", alpha=0.5), "'rtn' does not smooth"),
        (lambda: Scheme.preset("w8a8", alpha=1.5), "smoothing = 1.5"),
        (lambda: Scheme.preset("w8a8", alpha=float("nan")), "smoothing = nan"),
        (lambda: Scheme("x", "block", "token"), "weight = 'block' is not served; choose one of float, tensor, channel"),  # type: ignore[arg-type]
        (lambda: Scheme("x", "group", "token"), "weight 'group' takes a group size, no other does"),
        (lambda: Scheme("x", "channel", "token", group_size=128), "weight 'channel' with group_size = 128"),
        (lambda: Scheme("x", "group", "token", group_size=100), "group_size = 100 is not served; give a power of two"),
        (lambda: Scheme("x", "group", "token", group_size=16), "group_size = 16 is not served"),
        (lambda: Scheme("x", "group", "token", group_size=128.0), "group_size = 128.0 is not served"),  # type: ignore[arg-type]
        (lambda: Scheme("x", "channel", "token", rounding="up"), "rounding = 'up' is not served"),  # type: ignore[arg-type]
        (lambda: Scheme("x", "channel", "static", outliers=6.0), "outliers = 6.0 with activation = 'static'"),
        (
            lambda: Scheme("x", "channel", "token", smoothing=0.5, outliers=6.0),
            "outliers = 6.0 with smoothing = 0.5 is not served",
        ),
        (lambda: Scheme("x", "group", "token", outliers=6.0, group_size=64), "would leave its group"),
        (lambda: Scheme("x", "channel", "token", outliers=6.0, is_distilled=True), "every column in int8"),
        (lambda: Scheme("x", "channel", "token", outliers=0.0), "outliers = 0.0 is not served; give a threshold"),
        (lambda: Scheme("x", "channel", "token", outliers=float("inf")), "outliers = inf is not served"),
        (lambda: Scheme("x", "channel", "token", is_distilled=True, rounding="gptq"), "the student learns under"),
        (lambda: Scheme("x", "float", "float", outliers=6.0), "outliers = 6.0 changes nothing in a float scheme"),
        (lambda: Scheme("x", "float", "float", rounding="gptq"), "rounding = 'gptq' changes nothing"),
        (lambda: Scheme("x", "float", "float", is_distilled=True), "is_distilled = True changes nothing"),
        (lambda: Scheme("x", "channel", "group"), "activation = 'group' is not served"),  # type: ignore[arg-type]
        (
            lambda: Scheme("x", "channel", "token", smoothing="searched"),  # type: ignore[arg-type]
            "smoothing = 'searched' is not served; give alpha",
        ),
        (lambda: Scheme("x", "channel", "token", smoothing=True), "smoothing = True"),
        (lambda: Scheme("x", "channel", "float"), "both in int8"),
        (lambda: Scheme("x", "float", "token"), "both in int8"),
        (lambda: Scheme("x", "float", "float", smoothing=0.5), "changes nothing in a float scheme"),
        (lambda: Scheme("x", None, "token"), "weight = None"),  # type: ignore[arg-type]
        (lambda: Scheme("x", "channel", "token", kv="int4"), "kv = 'int4' is not served; choose one of float, int8"),  # type: ignore[arg-type]
        (lambda: Scheme("x", "float", "float", kv="int8"), "the baseline stays float"),
        (lambda: PRESETS["w8a8"].with_sink([1, -2]), "sink = [1, -2]: -2 is no token id".replace("[", r"\[")),
        (lambda: PRESETS["w8a8"].with_sink(range(17)), "sink has 17 tokens, and the limit is 16"),
        (lambda: Scheme("x", "float", "float", sink=(1,)), "changes nothing in a float scheme"),
        (lambda: Scheme("x", "channel", "token", has_token_down=True), "'static' alone takes it"),
        (lambda: Scheme("x", "float", "float", is_rotated=True), "is_rotated = True changes nothing in a float scheme"),
    ],
)
def test_a_value_that_is_not_served_is_refused_by_name(make: Callable[[], Scheme], message: str) -> None:
    with pytest.raises(InvalidScheme, match="(?s)" + message.replace("(", r"\(")):
        make()


def test_a_scheme_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scheme.preset("w8a8").weight = "tensor"  # type: ignore[misc]


def test_only_static_ranges_are_too_narrow_for_readers_without_the_sink() -> None:
    told = {name for name, scheme in PRESETS.items() if "first token" in (scheme.with_sink([1]).elsewhere or "")}
    assert told == {"rtn", "w8a8-static", "smoothquant-o3"}
