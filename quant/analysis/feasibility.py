"""Whether a scheme written by hand is practical: whether one integer GEMM can compute its product.

Source: "How Quantization Works: From a Matrix Multiplication Perspective" (2024), sections on the basic methods and on
hardware; SmoothQuant (arXiv 2211.10438), section 3; ZeroQuant (arXiv 2206.01861), group-wise quantization.
"""

from __future__ import annotations

from dataclasses import dataclass

from quant.errors import InvalidScheme

ALIASES = {
    "weight": {"row": "channel"},
    "activation": {"row": "token", "channel": "input-channel", "static": "tensor"},
}
"""Synonyms: a row of x is a token, a row of w an output channel, a channel of x an input channel."""

WORDS = {
    "weight": ("float", "tensor", "channel", "group", "input-channel", "element"),
    "activation": ("float", "tensor", "token", "group", "input-channel", "element"),
}

_FACTORS = {
    ("weight", "tensor"): "b",
    ("weight", "channel"): "b_n",
    ("activation", "tensor"): "a",
    ("activation", "token"): "a_t",
}
_INSIDE = {
    ("weight", "input-channel"): ("s_k", "sum_k x_tk (s_k w_nk)"),
    ("weight", "element"): ("s_nk", "sum_k x_tk (s_nk w_nk)"),
    ("activation", "input-channel"): ("s_k", "sum_k (s_k x_tk) w_nk"),
    ("activation", "element"): ("s_tk", "sum_k (s_tk x_tk) w_nk"),
}
_REMEDIES = {
    "weight": "Scale weights per tensor, channel or group; a factor per input channel can be folded into the "
    "activation before it is quantized (SmoothQuant).",
    "activation": "Scale activations per tensor, token or group; a factor per input channel can be folded into the "
    "weights before they are quantized (SmoothQuant).",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a scheme is practical, and why, in one or two sentences."""

    is_practical: bool
    reason: str


def explain(weight: str, activation: str) -> Verdict:
    """Say whether y_tn = sum_k x_tk w_nk stays one integer GEMM when x and w have scales of this granularity.

    With codes x_tk, w_nk: a scale that does not depend on k can be taken out of the sum,
    y_tn = a_t b_n sum_k x_tk w_nk. One that varies with k cannot. Groups along k give one sum per group,
    y_tn = sum_j a_tj b_nj (sum_(k in group j) x_tk w_nk).

    Args:
        weight: float, tensor, channel (or row), group, input-channel or element.
        activation: float, tensor (or static), token (or row), group, input-channel (or channel) or element.

    Raises:
        InvalidScheme: a word is none of these.
    """
    words = {"weight": _word("weight", weight), "activation": _word("activation", activation)}
    for side, word in words.items():
        if (side, word) in _INSIDE:
            return _refuse_inside(side, word)
    num_floats = [*words.values()].count("float")
    if num_floats == 2:
        return Verdict(True, "float weights and activations: the baseline's product, with nothing to gain.")
    if num_floats == 1:
        return _refuse_mixed(words)
    if "group" in words.values():
        return _accept_groups(words)
    scales = [_FACTORS[item] for item in words.items()]
    equation = f"y_tn = {' '.join(reversed(scales))} sum_k x_tk w_nk"
    return Verdict(
        True,
        f"practical: {equation}: no scale varies with k, so one int8 GEMM does the product and its epilogue scales.",
    )


def parse_scheme(text: str) -> dict[str, str]:
    """The two knobs of a text such as weight=channel,activation=token, by name.

    Raises:
        InvalidScheme: it is not of this form.
    """
    pairs = [part.strip().partition("=") for part in text.split(",")]
    knobs = {name.strip(): value.strip() for name, _, value in pairs}
    if set(knobs) != set(WORDS) or len(pairs) != 2:
        raise InvalidScheme(f"scheme {text!r} is not of the form weight=channel,activation=token")
    return knobs


def _word(side: str, text: str) -> str:
    word = ALIASES[side].get(text, text)
    if word not in WORDS[side]:
        raise InvalidScheme(f"{side} = {text!r} is no granularity; choose one of {', '.join(WORDS[side])}")
    return word


def _refuse_inside(side: str, word: str) -> Verdict:
    scale, equation = _INSIDE[side, word]
    return Verdict(
        False,
        f"{side}={word} is not practical: in y_tn = {equation} the scale {scale} varies with the summed index k and "
        f"does not leave the sum, so no single int8 GEMM gives y. {_REMEDIES[side]}",
    )


def _refuse_mixed(words: dict[str, str]) -> Verdict:
    return Verdict(
        False,
        f"weight={words['weight']},activation={words['activation']} is not practical here: tensor cores multiply int8 "
        "by int8 or fp16 by fp16, never one by the other, so the codes become floats before the product: fewer bytes, "
        "no integer GEMM. Quantize both.",
    )


def _accept_groups(words: dict[str, str]) -> Verdict:
    scales = " ".join(
        f"{letter}_{index}j" if word == "group" else _FACTORS[side, word]
        for letter, index, side, word in (
            ("a", "t", "activation", words["activation"]),
            ("b", "n", "weight", words["weight"]),
        )
    )
    return Verdict(
        True,
        f"practical with a group-wise kernel: y_tn = sum_j {scales} (sum_(k in group j) x_tk w_nk): within a group of "
        "g columns no scale varies with k; K/g int32 partial sums, each scaled in float, take the place of one.",
    )
