"""Types for OpenAI parameters that are not supported: they accept only values that have no effect."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from service.web.schemas.bodies import Text

T = TypeVar("T")
MAX_NOTE_CHARS = 512
MAX_NOTES = 16


def _refuse(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Replace any validation error by `not_honoured`, since the value would have no effect."""
    try:
        found = handler(value)
    except ValidationError as error:
        raise PydanticCustomError("not_honoured", "leave it out") from error
    # 0 and 0.0 are equal to False, and no boolean.
    if isinstance(found, bool) and not isinstance(value, bool):
        raise PydanticCustomError("not_honoured", "leave it out")
    return found


Only = Annotated[T, WrapValidator(_refuse)]
"""Accepts the values of T, which have no effect, and refuses all others."""

Nothing = Only[None]
EmptyList = Only[Annotated[list[Any], Field(max_length=0)]]

InertText = Annotated[Text, Field(max_length=MAX_NOTE_CHARS)]
"""A note for the client's own use."""
Metadata = Annotated[dict[str, InertText], Field(max_length=MAX_NOTES)]
"""Labels for the client's own use."""
