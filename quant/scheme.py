"""What is quantized and how: five knobs, whose named settings are the methods of the literature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

WeightScale = Literal["float", "tensor", "channel"]
ActivationScale = Literal["float", "static", "tensor", "token"]
KVStorage = Literal["float", "int8"]

_WEIGHTS = {
    "float": "float weights",
    "tensor": "int8 weights with one scale per matrix",
    "channel": "int8 weights with one scale per output channel",
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


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the Linears of a decoder, and its keys and values, are quantized.

    A scale must not vary along the summed index k, or the product leaves the integer GEMM; hence scales per row of
    the activation (token), per row of the weight (channel), or per tensor. A key's scale leaves q k^T the same way, and
    a value's multiplies its probability; both are found as the token is written, so int8 keys and values need no
    calibration and add nothing to the weights.

    Args:
        name: what it is called in tables and on the command line.
        weight: "float", "tensor" (one scale per matrix) or "channel" (one per output channel).
        activation: "float", "static" (one calibrated scale per tensor), "tensor" (one per tensor and step) or
            "token" (one per row and step).
        smoothing: alpha in 0..1 of SmoothQuant's migration, or None for no smoothing.
        outliers: threshold of a mixed-precision decomposition; None, as it is not served yet.
        kv: the KV cache: "float", or "int8" (one scale per token and head).

    Raises:
        ValueError: a knob is set to a value that is not served, weights and activations are not both float or both
            int8, or a float scheme is smoothed or has int8 keys and values.

    Source: SmoothQuant (arXiv 2211.10438), table 2; the condition on k from its section 3.
    """

    name: str
    weight: WeightScale
    activation: ActivationScale
    smoothing: float | None = None
    outliers: float | None = None
    kv: KVStorage = "float"

    def __post_init__(self) -> None:
        _require("weight", self.weight, _WEIGHTS)
        _require("activation", self.activation, _ACTIVATIONS)
        _require("kv", self.kv, _KV)
        if (self.weight == "float") != (self.activation == "float"):
            raise ValueError(
                f"weight {self.weight!r} with activation {self.activation!r} is not served: the integer GEMM needs "
                "both in int8; set both to float, or neither"
            )
        if self.kv == "int8" and not self.is_int8:
            raise ValueError("kv = 'int8' in a float scheme is not served: the baseline stays float; leave it 'float'")
        if self.smoothing is not None:
            self._check_smoothing(self.smoothing)
        if self.outliers is not None:
            raise ValueError(f"outliers = {self.outliers!r} is not served yet; leave it None")

    def _check_smoothing(self, alpha: float) -> None:
        # bool is an int to Python, and True would pass for alpha 1.
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0.0 <= alpha <= 1.0:
            raise ValueError(f"smoothing = {alpha!r} is not served; give alpha as a number from 0 to 1, or None")
        if not self.is_int8:
            raise ValueError(f"smoothing = {alpha!r} changes nothing in a float scheme; leave it None")

    @classmethod
    def preset(cls, name: str, alpha: float | None = None) -> Scheme:
        """The preset of that name, its smoothing alpha replaced where one is given.

        Raises:
            ValueError: no preset has that name, alpha is outside 0..1, or the preset does not smooth.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown scheme {name!r}; choose one of {', '.join(PRESETS)}")
        scheme = PRESETS[name]
        if alpha is None:
            return scheme
        if scheme.smoothing is None:
            smoothed = ", ".join(key for key, value in PRESETS.items() if value.smoothing is not None)
            raise ValueError(
                f"scheme {name!r} does not smooth, so alpha = {alpha!r} has no use; choose from {smoothed}"
            )
        return replace(scheme, smoothing=alpha)

    def with_alpha(self, alpha: float | None) -> Scheme:
        """The same scheme with another alpha, where one is given and the scheme smooths.

        Raises:
            ValueError: alpha is outside 0..1.
        """
        return self if alpha is None or self.smoothing is None else replace(self, smoothing=alpha)

    def with_kv(self, kv: KVStorage | None) -> Scheme:
        """The same scheme with another storage of keys and values, where one is given and the scheme is int8."""
        return self if kv is None or not self.is_int8 else replace(self, kv=kv)

    @property
    def is_int8(self) -> bool:
        return self.weight != "float"

    @property
    def label(self) -> str:
        """The name, and what a preset of that name does not have: for rows of a table."""
        return f"{self.name}, int8 KV" if self.kv == "int8" else self.name

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing takes activation ranges: for static scales, and for smoothing."""
        return self.activation == "static" or self.smoothing is not None

    def describe(self) -> str:
        """One sentence for tables, logs and /info."""
        parts = f"{_WEIGHTS[self.weight]}, {_ACTIVATIONS[self.activation]}"
        smoothed = (
            "" if self.smoothing is None else f", outliers smoothed into the weights with alpha {self.smoothing:g}"
        )
        keys = "" if self.kv == "float" else f", {_KV[self.kv]}"
        return f"{parts}{smoothed}{keys}."


def _require(knob: str, value: object, served: dict[str, str]) -> None:
    if not isinstance(value, str) or value not in served:
        raise ValueError(f"{knob} = {value!r} is not served; choose one of {', '.join(served)}")


PRESETS: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp16", weight="float", activation="float"),
        Scheme("rtn", weight="tensor", activation="static"),
        Scheme("w8a8", weight="channel", activation="token", smoothing=0.5),
        Scheme("smoothquant-o1", weight="tensor", activation="token", smoothing=0.5),
        Scheme("smoothquant-o2", weight="tensor", activation="tensor", smoothing=0.5),
        Scheme("smoothquant-o3", weight="tensor", activation="static", smoothing=0.5),
    )
}
