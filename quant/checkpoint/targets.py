"""Which Linears of a checkpoint are int8 and how each is stored: targets and exceptions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quant.linear import InputKind

# Names of a Linear's classes in PyTorch, with which a class-name target is compared.
_LINEAR_CLASSES = ("Linear", "Module")


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """How one group of Linears is stored.

    weight: one scale per "tensor", per output "channel", or per output channel and "group" of group_size inputs.
    activation: the kind of its input's scale.
    has_zero_point: whether the input's codes are asymmetric; only with a static activation.
    """

    weight: Literal["tensor", "channel", "group"]
    activation: InputKind
    group_size: int | None = None
    has_zero_point: bool = False

    @property
    def name(self) -> str:
        """A name for a checkpoint without notes: its files do not say how the codes were found."""
        groups = f" of {self.group_size}" if self.weight == "group" else ""
        return f"int8 {self.weight}{groups}/{self.activation}{' asymmetric' if self.has_zero_point else ''}"


@dataclass(frozen=True, slots=True)
class Quantization:
    """The quantization of a checkpoint: targets (name, `re:` pattern or class) -> format, and targets to ignore."""

    targets: Mapping[str, LinearFormat]
    ignore: tuple[str, ...]

    @property
    def formats(self) -> tuple[LinearFormat, ...]:
        """The distinct formats, in the order of the groups."""
        return tuple(dict.fromkeys(self.targets.values()))

    def format_of(self, name: str) -> LinearFormat | None:
        """How the Linear of that module name is stored; None for float.

        The most specific target decides: the exact name, then a pattern (in alphabetical order, as in
        compressed-tensors), then a class.
        """
        if any(_matches(name, entry) for entry in self.ignore):
            return None
        is_pattern = sorted(target for target in self.targets if target.startswith("re:"))
        for target in (name, *is_pattern, *_LINEAR_CLASSES):
            if target in self.targets and _matches(name, target):
                return self.targets[target]
        return None


def _matches(name: str, entry: str) -> bool:
    """Whether a Linear's module name matches one entry of the targets or of the list to ignore."""
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), name) is not None
    return entry == name or entry in _LINEAR_CLASSES
