"""What is quantized and how: a few knobs, and presets of them after the methods of the literature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

from quant.errors import InvalidScheme

WeightScale = Literal["float", "tensor", "channel", "group"]
ActivationScale = Literal["float", "static", "tensor", "token"]
Smoothing = float | Literal["search"]
KVStorage = Literal["float", "int8"]
HeadStorage = Literal["float", "int8"]
Rounding = Literal["nearest", "gptq"]

MIN_GROUP_SIZE = 32
"""Depth of one int8 matrix instruction: a smaller group would not use all of it."""

MAX_SINK_TOKENS = 16
"""Longest sink: so many more positions are set aside for a text."""

_WEIGHTS = {
    "float": "float weights",
    "tensor": "int8 weights with one scale per matrix",
    "channel": "int8 weights with one scale per output channel",
    "group": "int8 weights with one scale per output channel and group of {group_size} inputs",
}
_ACTIVATIONS = {
    "float": "float activations",
    "static": "int8 activations with one calibrated scale per tensor",
    "tensor": "int8 activations with one scale per tensor, found as it runs",
    "token": "int8 activations with one scale per token, found as it runs",
}
_KV = {
    "float": "float keys and values",
    "int8": "int8 keys and values with one scale per token and head",
}
_HEAD = {
    "float": "a float head",
    "int8": "an int8 head with one scale per token of the vocabulary and one per row",
}
_ROUNDING = {
    "nearest": "weights rounded to nearest",
    "gptq": "each weight's rounding error made good in the weights after it (GPTQ)",
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the Linears of a decoder, and its keys and values, are quantized.

    A scale must not vary along the summed index k, or the product is no integer GEMM; hence scales per row of the
    activation (token), per row of the weight (channel), or per tensor. A group of k may have its own scale because it
    is a product of its own, summed in float. A key's scale multiplies q k^T as a row's does, a value's its probability;
    both are found when the token is written, so int8 keys and values need no calibration and no weights.

    Args:
        name: its name in tables and on the command line.
        weight: "float", "tensor" (one scale per matrix), "channel" (one per output channel) or "group" (one per output
            channel and group of inputs).
        activation: "float", "static" (one calibrated scale per tensor), "tensor" (one per tensor and step) or
            "token" (one per row and step).
        smoothing: alpha in 0..1 of SmoothQuant's migration, "search" for the best alpha of each group on calibration
            data, or None for no smoothing.
        outliers: LLM.int8()'s threshold: input columns with a larger magnitude are multiplied in float; None for none.
        kv: the KV cache: "float", or "int8" (one scale per token and head).
        head: the product with the vocabulary: "float", or "int8" (weights with one scale per output, rounded to nearest
            when they are loaded, activations with one per row).
        rounding: of weights, "nearest" or "gptq".
        sink: tokens that every text begins with, for which the float model's keys and values stand in; see
            `quant.checkpoint.sink`.
        is_rotated: whether the residual stream and the values are rotated first; see `quant.convert.rotate`.
        has_token_down: whether the input of each MLP's last Linear has a scale per token, though activation is
            "static": its tokens differ by a hundred times wherever they stand, so no range fits them all.
        group_size: inputs that share a scale, a power of two from 32, with weight "group"; None otherwise.
        is_distilled: whether each layer's weights are trained towards the float layer's output before they are rounded.

    Raises:
        InvalidScheme: a knob is set to a value that is not served, weights and activations are not both float or both
            int8, a float scheme sets a knob of int8, or two knobs contradict each other; the message says which.

    Source: SmoothQuant (arXiv 2211.10438), table 2, and its section 3 for the condition on k; ZeroQuant
        (arXiv 2206.01861); LLM.int8() (arXiv 2208.07339); GPTQ (arXiv 2210.17323).
    """

    name: str
    weight: WeightScale
    activation: ActivationScale
    _: KW_ONLY
    smoothing: Smoothing | None = None
    outliers: float | None = None
    kv: KVStorage = "float"
    head: HeadStorage = "float"
    rounding: Rounding = "nearest"
    group_size: int | None = None
    is_distilled: bool = False
    sink: tuple[int, ...] = ()
    is_rotated: bool = False
    has_token_down: bool = False

    def __post_init__(self) -> None:
        _require("weight", self.weight, _WEIGHTS)
        _require("activation", self.activation, _ACTIVATIONS)
        _require("kv", self.kv, _KV)
        _require("head", self.head, _HEAD)
        _require("rounding", self.rounding, _ROUNDING)
        if (self.weight == "float") != (self.activation == "float"):
            raise InvalidScheme(
                f"weight {self.weight!r} with activation {self.activation!r} is not served: the integer GEMM needs "
                "both in int8; set both to float, or neither"
            )
        if not self.is_int8:
            self._refuse_int8_knobs()
        wrong = next((token for token in self.sink if type(token) is not int or token < 0), None)
        if wrong is not None:
            raise InvalidScheme(f"sink = {list(self.sink)!r}: {wrong!r} is no token id; give numbers from 0")
        if len(self.sink) > MAX_SINK_TOKENS:
            raise InvalidScheme(f"sink has {len(self.sink)} tokens, and the limit is {MAX_SINK_TOKENS}; give fewer")
        if self.has_token_down and self.activation != "static":
            raise InvalidScheme(
                f"has_token_down with activation {self.activation!r} changes nothing: 'static' alone takes it; leave "
                "it False"
            )
        self._check_smoothing()
        self._check_group_size()
        self._check_outliers()
        if self.is_distilled and self.rounding != "nearest":
            raise InvalidScheme(
                f"is_distilled with rounding {self.rounding!r} is not served: the student learns under rounding to "
                "nearest; leave rounding 'nearest', or is_distilled False"
            )

    def _refuse_int8_knobs(self) -> None:
        for part, storage in (("kv", self.kv), ("head", self.head)):
            if storage == "int8":
                raise InvalidScheme(
                    f"{part} = 'int8' in a float scheme is not served: the baseline stays float; leave it 'float'"
                )
        knobs = {
            "smoothing": (self.smoothing, None),
            "outliers": (self.outliers, None),
            "rounding": (self.rounding, "nearest"),
            "is_distilled": (self.is_distilled, False),
            "sink": (self.sink, ()),
            "is_rotated": (self.is_rotated, False),
        }
        for knob, (value, unset) in knobs.items():
            if value != unset:
                raise InvalidScheme(f"{knob} = {value!r} changes nothing in a float scheme; leave it {unset!r}")

    def _check_smoothing(self) -> None:
        alpha = self.smoothing
        if alpha is not None and alpha != "search" and not _is_number(alpha, 0.0, 1.0):
            raise InvalidScheme(
                f"smoothing = {alpha!r} is not served; give alpha as a number from 0 to 1, 'search', or None"
            )

    def _check_group_size(self) -> None:
        size = self.group_size
        if (self.weight == "group") != (size is not None):
            raise InvalidScheme(
                f"weight {self.weight!r} with group_size = {size!r}: weight 'group' takes a group size, no other does"
            )
        if size is None:
            return
        if not isinstance(size, int) or isinstance(size, bool) or size < MIN_GROUP_SIZE or size & (size - 1):
            raise InvalidScheme(
                f"group_size = {size!r} is not served; give a power of two from {MIN_GROUP_SIZE}, 128 for instance"
            )

    def _check_outliers(self) -> None:
        if self.outliers is None:
            return
        if not _is_number(self.outliers, 0.0, math.inf) or not 0 < self.outliers < math.inf:
            raise InvalidScheme(
                f"outliers = {self.outliers!r} is not served; give a threshold above 0, 6.0 for instance"
            )
        refusals = {
            "activation": (self.activation == "token", "which columns are outliers is found with the tokens' scales"),
            "weight": (self.weight != "group", "an outlier column would leave its group"),
            "smoothing": (self.smoothing is None, "it changes the magnitudes that the threshold is compared with"),
            "is_distilled": (not self.is_distilled, "the student learns with every column in int8"),
        }
        for knob, (is_served, reason) in refusals.items():
            if not is_served:
                raise InvalidScheme(
                    f"outliers = {self.outliers!r} with {knob} = {getattr(self, knob)!r} is not served: {reason}; "
                    f"change {knob}, or leave outliers None"
                )

    @classmethod
    def preset(cls, name: str, alpha: float | None = None) -> Scheme:
        """The preset of that name, with this alpha if one is given.

        Raises:
            InvalidScheme: no preset has that name, alpha is outside 0..1, or the preset does not smooth.
        """
        if name not in PRESETS:
            raise InvalidScheme(f"unknown scheme {name!r}; choose one of {', '.join(PRESETS)}")
        scheme = PRESETS[name]
        if alpha is None:
            return scheme
        if scheme.smoothing is None:
            smoothed = ", ".join(key for key, value in PRESETS.items() if value.smoothing is not None)
            raise InvalidScheme(
                f"scheme {name!r} does not smooth, so alpha = {alpha!r} has no use; choose from {smoothed}"
            )
        return replace(scheme, smoothing=alpha)

    def with_alpha(self, alpha: float | None) -> Scheme:
        """The same scheme with this alpha, if one is given and the scheme smooths.

        Raises:
            InvalidScheme: alpha is outside 0..1.
        """
        return self if alpha is None or self.smoothing is None else replace(self, smoothing=alpha)

    def with_kv(self, kv: KVStorage | None) -> Scheme:
        """The same scheme with another storage of keys and values, if one is given and the scheme is int8."""
        return self if kv is None or not self.is_int8 else replace(self, kv=kv)

    def with_head(self, head: HeadStorage) -> Scheme:
        """The same scheme with another storage of the head, if the scheme is int8."""
        return replace(self, head=head) if self.is_int8 else self

    def with_sink(self, token_ids: Sequence[int]) -> Scheme:
        """The same scheme with these tokens as its sink, if the scheme is int8.

        Raises:
            InvalidScheme: one of them is no token id.
        """
        return replace(self, sink=tuple(token_ids)) if self.is_int8 else self

    def with_rotation(self, is_rotated: bool) -> Scheme:
        """The same scheme with or without rotation, if the scheme is int8."""
        return replace(self, is_rotated=is_rotated) if self.is_int8 else self

    def of_down(self) -> Scheme:
        """What the last Linears of MLPs are quantized by: this scheme, or its like with scales per token."""
        return replace(self, activation="token", has_token_down=False) if self.has_token_down else self

    def with_rounding(self, rounding: Rounding | None) -> Scheme:
        """The same scheme with another rounding of weights, if one is given and the scheme is int8.

        Raises:
            InvalidScheme: the scheme is distilled, which needs rounding to nearest.
        """
        return self if rounding is None or not self.is_int8 else replace(self, rounding=rounding)

    def fitted(self, widths: Iterable[int]) -> Scheme:
        """The same scheme with the largest group size, halved as often as needed, that divides every width K.

        Raises:
            InvalidScheme: not even groups of 32 divide every width.
        """
        if self.group_size is None:
            return self
        common = math.gcd(self.group_size, *widths)
        if common < MIN_GROUP_SIZE:
            raise InvalidScheme(
                f"groups of {self.group_size} inputs, halved down to {MIN_GROUP_SIZE}, do not divide every width in "
                f"{sorted(set(widths))}; choose a scheme with weights per channel"
            )
        return replace(self, group_size=common)

    @property
    def is_int8(self) -> bool:
        return self.weight != "float"

    @property
    def label(self) -> str:
        """The name and what differs from the preset of that name, for rows of a table."""
        preset = PRESETS.get(self.name, self)
        extras = []
        if self.smoothing != preset.smoothing:
            extras.append("not smoothed" if self.smoothing is None else f"alpha {_alpha_text(self.smoothing)}")
        if self.rounding != preset.rounding:
            extras.append(self.rounding)
        if preset.has_token_down and self.activation == "static" and not self.has_token_down:
            extras.append("static everywhere")
        if self.is_rotated:
            extras.append("rotated")
        if self.sink:
            extras.append("sink")
        if self.kv == "int8":
            extras.append("int8 KV")
        if self.head == "int8":
            extras.append("int8 head")
        return ", ".join([self.name, *extras])

    @property
    def shares_activation_scales(self) -> bool:
        """Whether tokens share a scale, so that the largest values of one are the scale of all."""
        return self.activation in ("static", "tensor")

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing needs calibration data: for static scales, smoothing, GPTQ's rounding or distillation."""
        is_data_driven = self.rounding == "gptq" or self.is_distilled
        return self.activation == "static" or self.smoothing is not None or is_data_driven

    @property
    def elsewhere(self) -> str | None:
        """What readers of compressed-tensors other than transformers make of its checkpoint; None if they load it."""
        if self.activation == "tensor":
            return "vLLM has no loader for activations with one scale per step"
        if self.weight == "group":
            return "vLLM has no loader for int8 weights with scales per group"
        if self.sink and self.activation == "static":
            return "others compute the first token of a text in int8, for which its scales are too narrow"
        if self.outliers is not None:
            return "others serve it as rtn-token: the format has no place for columns in float"
        return None

    def describe(self) -> str:
        """One sentence for tables, logs and /info."""
        parts = [_WEIGHTS[self.weight].format(group_size=self.group_size), _ACTIVATIONS[self.activation]]
        if self.has_token_down:
            parts.append("one per token at the input of each MLP's last Linear")
        if self.is_rotated:
            parts.append("the residual stream and values rotated")
        if self.smoothing is not None:
            parts.append(f"outliers smoothed into the weights with alpha {_alpha_text(self.smoothing)}")
        if self.outliers is not None:
            parts.append(f"input columns beyond {self.outliers:g} multiplied in float")
        if self.is_distilled:
            parts.append("each layer distilled from its float original")
        if self.rounding != "nearest":
            parts.append(_ROUNDING[self.rounding])
        if self.sink:
            parts.append("the first tokens of every text in float")
        if self.kv != "float":
            parts.append(_KV[self.kv])
        if self.head != "float":
            parts.append(_HEAD[self.head])
        return ", ".join(parts) + "."


def _require(knob: str, value: object, served: dict[str, str]) -> None:
    if not isinstance(value, str) or value not in served:
        raise InvalidScheme(f"{knob} = {value!r} is not served; choose one of {', '.join(served)}")


def _is_number(value: object, low: float, high: float) -> bool:
    # In Python bool is an int, so True would count as 1.
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _alpha_text(alpha: Smoothing) -> str:
    return "searched per group" if alpha == "search" else f"{alpha:g}"


PRESETS: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp16", weight="float", activation="float"),
        Scheme("rtn", weight="tensor", activation="static"),
        Scheme("rtn-dynamic", weight="tensor", activation="tensor"),
        Scheme("rtn-token", weight="channel", activation="token"),
        Scheme("w8a8", weight="channel", activation="token", smoothing="search"),
        Scheme("w8a8-static", weight="channel", activation="static", smoothing="search", has_token_down=True),
        Scheme("smoothquant-o1", weight="tensor", activation="token", smoothing="search"),
        Scheme("smoothquant-o2", weight="tensor", activation="tensor", smoothing="search"),
        Scheme("smoothquant-o3", weight="tensor", activation="static", smoothing="search"),
        Scheme("zeroquant", weight="group", activation="token", group_size=128),
        Scheme("zeroquant-lkd", weight="group", activation="token", group_size=128, is_distilled=True),
        Scheme("llm-int8", weight="channel", activation="token", outliers=6.0),
    )
}
