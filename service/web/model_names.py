"""The names that `model` may be in OpenAI's routes, and the fingerprint of what answers to them."""

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
    """NAME is the first variant of the model that is served, NAME:VARIANT and VARIANT are the one they name.

    Args:
        variants: the first answers to NAME.
        info: what is served; NAME is its `model`. Raises NotReady before that is known, as all that needs it does.
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
        """The variant that a name stands for; of None, the first.

        Raises:
            UnknownModel: it is none of the names.
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
        """Name -> variant of those that GET /v1/models lists; the bare variants are left out as short forms."""
        return {self.name: self._variants[0], **{self.full_name(variant): variant for variant in self._variants}}

    def fingerprint(self, variant: str) -> str:
        """Equal as long as model, checkpoint, device and versions are; read from `info` once, see `refresh`."""
        if variant not in self._fingerprints:
            info = self._info()
            own = info.variants.get(variant)
            facts = [self.name, variant, None if own is None else asdict(own), info.device, dict(info.versions)]
            digest = sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
            self._fingerprints[variant] = f"fp_{digest[:12]}"
        return self._fingerprints[variant]

    def refresh(self) -> None:
        """Forget the fingerprints: a variant has another checkpoint now."""
        self._fingerprints.clear()
