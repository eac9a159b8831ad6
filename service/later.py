"""Modules that are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Later:
    """A module that is imported when one of its attributes is first accessed.

    torch and transformers take seconds to import, which must not delay help, shell completion and `ottava chat`, and
    the web never imports them. Use it so that type checkers see the module itself:

        if TYPE_CHECKING:
            from service.store import resolve
        else:
            resolve = Later("service.store.resolve")
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)
