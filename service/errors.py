"""Every error a user can meet, as one tree. A leaf maps to one HTTP status or to one line and a non-zero exit.

OttavaError
 + RequestError               the client can mend it
 |  + InvalidRequest     400   a value out of its range
 |  + PromptTooLong      400   more tokens than the context holds
 |  + UnknownVariant     404   no such variant here
 |  + Malformed          422   the body has another shape
 + CapacityError              the client can try again
 |  + QueueFull          503   too many requests waiting
 |  + NotReady           503   starting, stopping, or refused by the self-check
 + EngineError                ours
 |  + EngineFailed       500   a step raised; the request is lost
 + StartupError               told in one line at start, exit code 1
    + ModelNotFound            neither a folder nor a model that can be fetched
    + UnsupportedModel         a family or a feature of it that is not served
    + UnsafeCheckpoint         pickled weights
    + InvalidSettings          an unknown or impossible setting
    + SelfCheckFailed          a variant whose output is not finite or disagrees wildly with the baseline

`quant.checkpoint.CheckpointError` (a corrupt or unsupported quantized checkpoint) lives below this tree, since quant
knows no service; the command line shows it as a start-up error.
"""

from __future__ import annotations


class OttavaError(Exception):
    """Root of the tree. `param` names the field at fault, where there is one."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class RequestError(OttavaError):
    """The request cannot be served as it stands."""

    status = 400
    type = "invalid_request_error"


class InvalidRequest(RequestError):
    """A value lies outside its range."""

    code = "invalid_value"


class PromptTooLong(RequestError):
    """Prompt and max_tokens do not fit in the context."""

    code = "context_length_exceeded"


class UnknownVariant(RequestError):
    """The variant asked for is not served here."""

    status = 404
    code = "variant_not_found"


class Malformed(RequestError):
    """The body does not have the documented shape."""

    status = 422
    code = "malformed"


class CapacityError(OttavaError):
    """The same request can succeed later. `retry_after_s` goes out as Retry-After."""

    status = 503
    type = "overloaded_error"
    retry_after_s = 1


class QueueFull(CapacityError):
    """As many requests wait as the queue holds."""

    code = "queue_full"


class NotReady(CapacityError):
    """The service is starting, stopping, or was refused by its self-check."""

    code = "not_ready"


class EngineError(OttavaError):
    """The server is at fault."""


class EngineFailed(EngineError):
    """A step of the engine raised; its running requests are lost."""

    code = "engine_failed"


class StartupError(OttavaError):
    """The service cannot start."""

    code = "startup"


class ModelNotFound(StartupError):
    """The model is neither a folder nor a fetchable id."""


class UnsupportedModel(StartupError):
    """The model's family or one of its features is not served."""


class UnsafeCheckpoint(StartupError):
    """The checkpoint would have to be unpickled."""


class InvalidSettings(StartupError):
    """A setting is unknown or cannot be satisfied."""


class SelfCheckFailed(StartupError):
    """A variant's output is not finite or disagrees wildly with the baseline's."""
