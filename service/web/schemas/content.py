"""Content that is sent as a text or in parts, and that is text alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.web.schemas.bodies import Text

INERT_PARTS = frozenset({"annotations", "cache_control", "citations", "logprobs", "prompt_cache_breakpoint"})
"""What clients send beside the text of a part; it has no effect."""
SEPARATOR = "\n"


def text_in_parts(*kinds: str) -> Any:
    """The type of a text, which may be sent in parts of these kinds; they are joined by line breaks."""
    example = f'{{"type": "{kinds[0]}", "text": "..."}}'
    part = {
        "type": "object",
        "properties": {"type": {"enum": list(kinds)}, "text": {"type": "string"}, **{name: {} for name in INERT_PARTS}},
        "required": ["type", "text"],
        "additionalProperties": False,
    }
    schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}
    return Annotated[Text, BeforeValidator(_joiner(frozenset(kinds), example)), WithJsonSchema(schema)]


def _joiner(kinds: Collection[str], example: str) -> Callable[[Any], Any]:
    def text_of(part: Any) -> str:
        if isinstance(part, dict) and kind_of(part) in kinds and part.keys() <= {"type", "text"} | INERT_PARTS:
            text = part.get("text")
            if isinstance(text, str):
                return text
        raise PydanticCustomError("not_text", f"send text alone: a string, or parts {example}")

    def joined(value: Any) -> Any:
        return SEPARATOR.join(map(text_of, value)) if isinstance(value, list) else value

    return joined


def kind_of(value: Any, default: str | None = None) -> str | None:
    """The `type` of a part that is sent, or of a model; the default if none is sent. None if it is no text."""
    kind = value.get("type") or default if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


def list_or_text(schema: dict[str, Any]) -> None:
    """Allow a text in the JSON schema of a field that is a list."""
    listed = {key: schema.pop(key) for key in ("type", "items", "minItems", "maxItems") if key in schema}
    schema["anyOf"] = [{"type": "string"}, listed]
