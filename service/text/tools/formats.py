"""Which format a model's chat template speaks."""

from __future__ import annotations

from service.text.tools.format import Format
from service.text.tools.hermes import HERMES
from service.text.tools.llama import LLAMA
from service.text.tools.mistral import ARGS, MISTRAL, MISTRAL_ARGS

FORMATS = (HERMES, LLAMA, MISTRAL, MISTRAL_ARGS)
OTHERS = ("<function=", "<arg_key>")
"""What stands inside `<tool_call>` in formats that are not served: Qwen3-Coder's and GLM's."""


def format_of(source: str) -> Format | None:
    """The format that a chat template writes calls in; None if it writes none, or in another one."""
    if "tools" not in source:
        return None
    if MISTRAL.opening in source:
        return MISTRAL_ARGS if ARGS in source else MISTRAL
    if HERMES.opening in source and not any(other in source for other in OTHERS):
        return HERMES
    return LLAMA if LLAMA.opening in source or '"parameters": ' in source else None
