"""Types of OpenAI's parameters that this server has no use for: the values that change nothing, and no others."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from service.web.schemas.bodies import Text

T = TypeVar("T")
MAX_NOTE_CHARS = 512
MAX_NOTES = 16


def _refuse(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Whatever the type does not take is a wish that would not be honoured."""
    try:
        return handler(value)
    except ValidationError as error:
        raise PydanticCustomError("not_honoured", "leave it out") from error


Only = Annotated[T, WrapValidator(_refuse)]
"""The values of T are accepted and change nothing; any other is refused by the parameter's name."""

Nothing = Only[None]
EmptyList = Only[Annotated[list[Any], Field(max_length=0)]]
EmptyObject = Only[Annotated[dict[str, Any], Field(max_length=0)]]
Zero = Only[Annotated[float, Field(ge=0, le=0)]]

InertText = Annotated[Text, Field(max_length=MAX_NOTE_CHARS)]
"""A note of the client's."""
Metadata = Annotated[dict[str, InertText], Field(max_length=MAX_NOTES)]
"""Labels of the client's."""
