"""Triton's interpreter, with less work at each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


def patch_once_per_launch() -> None:
    """Make a launch replace the functions of `triton.language` once for each module it calls.

    The interpreter does so at every call of a device function, `tl.sum` and `tl.cdiv` among them, though nothing puts
    the originals back before the launch ends: that takes most of its time.
    """
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set[int]()

    def patch_once(fn: Callable[..., Any]) -> Any:
        module = id(fn.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch(fn)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
