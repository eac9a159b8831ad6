"""Every error a user can meet, as one tree. A leaf maps to one HTTP status or to one line and a non-zero exit.

OttavaError
 + RequestError               the client can mend it
 |  + InvalidRequest     400   a value out of its range
 |  + PromptTooLong      400   more tokens than the context holds
 |  + Unauthorized       401   no API key, or one that is not known
 |  + UnknownVariant     404   no such variant here
 |  + UnknownModel       404   no such model here
 |  + TooLarge           413   a body above the limit
 |  + UnknownHost        421   a Host header with another name than this server's
 |  + Malformed          422   the body has another shape
 |  + DeadlineExceeded   504   not done within the request's time
 |  + ReloadFailed       409   the new checkpoint is not served; the old one still is
 + CapacityError              the client can try again
 |  + RateLimited        429   too many requests of one API key
 |  + QueueFull          503   too many requests waiting
 |  + QueueTimeout       503   waited too long for the first step
 |  + NotReady           503   starting, or refused by the self-check
 |  + Draining           503   the server is stopping
 + EngineError                ours
 |  + EngineFailed       500   a step raised; the request is lost
 + ChatError                  `ottava chat`: no server answers, or it refused; one line, exit code 1
 + StartupError               told in one line at start, exit code 1
    + ModelNotFound            neither a folder nor a model that can be fetched
    + UnsupportedModel         a family or a feature of it that is not served
    + UnsafeCheckpoint         pickled weights
    + InvalidSettings          an unknown or impossible setting
    + SelfCheckFailed          a variant whose output is not finite or disagrees wildly with the baseline

`quant.errors` is a tree of its own (a corrupt checkpoint, a model that cannot be quantized), since quant knows no
service; the command line shows its errors as start-up errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping


class OttavaError(Exception):
    """Root of the tree. `param` names the field at fault, where there is one; `headers` go out with the answer."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def headers(self) -> Mapping[str, str]:
        return {}


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


class Unauthorized(RequestError):
    """The request brings no API key, or none that is known here."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"www-authenticate": 'Bearer realm="ottava"'}


class UnknownVariant(RequestError):
    """The variant asked for is not served here."""

    status = 404
    code = "variant_not_found"


class UnknownModel(RequestError):
    """The model asked for is not served here."""

    status = 404
    code = "model_not_found"


class TooLarge(RequestError):
    """The body is longer than the server takes."""

    status = 413
    code = "body_too_large"


class UnknownHost(RequestError):
    """The request was sent to a name that is not this server's."""

    status = 421
    code = "unknown_host"


class DeadlineExceeded(RequestError):
    """The request was not done within its time; what it held is freed."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class Malformed(RequestError):
    """The body does not have the documented shape."""

    status = 422
    code = "malformed"


class ReloadFailed(RequestError):
    """A reload that changed nothing: what was served before still is."""

    status = 409
    code = "reload_failed"


class CapacityError(OttavaError):
    """The same request can succeed later. `retry_after_s`, whole seconds, goes out as Retry-After."""

    status = 503
    type = "overloaded_error"

    def __init__(self, message: str, param: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(message, param)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": str(self.retry_after_s)}


class RateLimited(CapacityError):
    """One API key sends more requests than it may."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limited"


class QueueFull(CapacityError):
    """As many requests wait as the queue holds."""

    code = "queue_full"


class QueueTimeout(CapacityError):
    """The request waited in the queue for longer than a request may."""

    code = "queue_timeout"


class NotReady(CapacityError):
    """The service is starting, or was refused by its self-check."""

    code = "not_ready"


class Draining(CapacityError):
    """The server is stopping and takes no new requests; another one, or the next, will."""

    code = "draining"


class EngineError(OttavaError):
    """The server is at fault."""


class EngineFailed(EngineError):
    """A step of the engine raised; its running requests are lost."""

    code = "engine_failed"


class ChatError(OttavaError):
    """A running server could not be reached, refused a request, or broke off its answer."""

    code = "chat"


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


def leaves() -> Iterator[type[OttavaError]]:
    """Every class of the tree, the root among them."""
    found = [OttavaError]
    while found:
        kind = found.pop()
        yield kind
        found += kind.__subclasses__()


def first_line(error: BaseException) -> str:
    """An exception told in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
