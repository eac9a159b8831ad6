"""The body of every error response."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    """What went wrong, and how to fix it."""

    message: str
    type: str = Field(description="invalid_request_error, overloaded_error or server_error.")
    param: str | None = Field(description="The field at fault.")
    code: str


class ErrorResponse(BaseModel):
    """Body of every error response."""

    error: ErrorDetail


class MessagesErrorResponse(BaseModel):
    """Body of every error response of /v1/messages, in Anthropic's shape; `param` and `code` are ottava's own."""

    type: Literal["error"] = "error"
    error: ErrorDetail
