"""Modules that are imported at their first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Later:
    """A module that is imported when something of it is first asked for.

    torch and transformers take seconds to import, for which help, a completed word and `ottava chat` must not wait, and
    the web does without them. Where one is used, a type checker is shown the module itself:

        if TYPE_CHECKING:
            from service.store import resolve
        else:
            resolve = Later("service.store.resolve")
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)
