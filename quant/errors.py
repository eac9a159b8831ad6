"""Every error of quant that a user can cause, as one tree. A wrong argument of our own code is a ValueError instead.

QuantError
 + CheckpointError     a checkpoint folder that cannot be read or is not served
 + InvalidScheme       an unknown name, a knob out of its range, or knobs that contradict each other
 + UnlikeLinears       Linears that are computed as one product, but quantized in different ways
 + Unquantizable       a model, or a tensor of it, that has no int8 form
 + NotFinite           a model whose logits are NaN or infinite
 + TextTooShort        a text with fewer tokens than the windows take
 + InvalidQuestions    multiple choice that cannot be read or asked
 + UnknownBandwidth    a memory roof that is neither known nor a number
"""

from __future__ import annotations


class QuantError(Exception):
    """Root of the tree; each message is one line with what was found and the remedy."""


class CheckpointError(QuantError):
    """A checkpoint folder cannot be read or is not served; the message names the file or tensor."""


class InvalidScheme(QuantError):
    """A scheme is not known, or not served as it was asked for."""


class UnlikeLinears(QuantError):
    """Linears are to be fused that are quantized in different ways."""


class Unquantizable(QuantError):
    """A model has no decoder layers, or a tensor has no int8 form."""


class NotFinite(QuantError):
    """A model's logits are NaN or infinite."""


class TextTooShort(QuantError):
    """A text has fewer tokens than the windows of it take."""


class InvalidQuestions(QuantError):
    """A file of questions cannot be read, or a question cannot be asked."""


class UnknownBandwidth(QuantError):
    """A GPU's bandwidth was asked for by an unknown word, or was never measured."""
