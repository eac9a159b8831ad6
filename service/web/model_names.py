"""The valid values of `model` in OpenAI's routes, and the system fingerprint of each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from hashlib import sha256

from service.engine.api import HostInfo
from service.errors import UnknownModel

MAX_SHOWN = 80


class ModelNames:
    """Maps names to variants: NAME is the first variant; NAME:VARIANT and VARIANT are that variant.

    Args:
        variants: names of the variants, the default one first.
        info: returns what is served; NAME is its `model`. It raises NotReady before start-up is done, and then so do
            all methods that need it.
    """

    def __init__(self, variants: Iterable[str], info: Callable[[], HostInfo]) -> None:
        self.created = int(time.time())
        """Unix seconds."""
        self._variants = tuple(variants)
        self._info = info
        self._fingerprints: dict[str, str] = {}

    @property
    def name(self) -> str:
        return self._info().model

    def variant_of(self, name: str | None) -> str:
        """The variant of a name; the first one for None.

        Raises:
            UnknownModel: it is not one of the names.
        """
        if name is None or name == self.name:
            return self._variants[0]
        variant = name.removeprefix(f"{self.name}:")
        if variant in self._variants:
            return variant
        known = ", ".join(self.listed())
        raise UnknownModel(f"`model` is {name[:MAX_SHOWN]!r}, which is not served here; use one of: {known}", "model")

    def full_name(self, variant: str) -> str:
        return f"{self.name}:{variant}"

    def listed(self) -> dict[str, str]:
        """Name -> variant, as listed by GET /v1/models; without the bare variants, which are short forms."""
        return {self.name: self._variants[0], **{self.full_name(variant): variant for variant in self._variants}}

    def fingerprint(self, variant: str) -> str:
        """A hash of model, variant, checkpoint, device and versions. Cached until `refresh`."""
        if variant not in self._fingerprints:
            info = self._info()
            own = info.variants.get(variant)
            facts = [self.name, variant, None if own is None else asdict(own), info.device, dict(info.versions)]
            digest = sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
            self._fingerprints[variant] = f"fp_{digest[:12]}"
        return self._fingerprints[variant]

    def refresh(self) -> None:
        """Drop the cached fingerprints after a reload."""
        self._fingerprints.clear()
