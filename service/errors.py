"""Every error a user can see, as one tree. A leaf maps to one HTTP status or to one line and a non-zero exit.

OttavaError
 + RequestError               the client can fix it
 |  + InvalidRequest     400   a value out of its range
 |  + PromptTooLong      400   more tokens than the context holds
 |  + Unauthorized       401   no API key, or an unknown one
 |  + Forbidden          403   an admin route of a server that has no admin keys
 |  + UnknownVariant     404   a variant that is not served
 |  + UnknownModel       404   a model that is not served
 |  + UnknownResponse    404   an earlier answer: none is stored
 |  + TooLarge           413   a body above the limit
 |  + UnknownHost        421   a Host header with another name than this server's
 |  + Malformed          422   a body of the wrong shape
 |  + DeadlineExceeded   504   not done within the request's timeout
 |  + ReloadFailed       409   the new checkpoint is not served; the old one still is
 + CapacityError              the client can try again
 |  + RateLimited        429   too many requests of one API key
 |  + QueueFull          503   too many requests queued
 |  + QueueTimeout       503   queued too long
 |  + NotReady           503   starting, or refused by the self-check
 |  + Draining           503   the server is stopping
 |  + WeightsReplaced    503   ended by a reload that had waited for it
 + EngineError                the server is at fault
 |  + EngineFailed       500   a step raised; the request is lost
 + ChatError                  `ottava chat`: no server answers, or it refused; one line, exit code 1
 + BenchError                 `ottava bench`: no server answers, or none of its answers counts; likewise
 + StartupError               shown in one line at start, exit code 1
    + ModelNotFound            neither a folder nor a model that can be fetched
    + UnsupportedModel         a family, or a feature of it, that is not served
    + UnsafeCheckpoint         pickled weights
    + InvalidSettings          an unknown or impossible setting
    + SelfCheckFailed          a variant whose output is not finite or far from the baseline's

`quant.errors` is a separate tree (a corrupt checkpoint, a model that cannot be quantized), because quant does not
import service; the command line shows its errors like start-up errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping


class OttavaError(Exception):
    """Root of the tree. `param` names the field that caused it, or is None; `headers` are sent with the answer."""

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
    """The request cannot be served unless the client changes it."""

    status = 400
    type = "invalid_request_error"


class InvalidRequest(RequestError):
    """A value is out of its range."""

    code = "invalid_value"


class PromptTooLong(RequestError):
    """Prompt and max_tokens do not fit in the context."""

    code = "context_length_exceeded"


class Unauthorized(RequestError):
    """The request has no API key, or an unknown one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"www-authenticate": 'Bearer realm="ottava"'}


class Forbidden(RequestError):
    """An admin route is closed, since the server has no admin keys."""

    status = 403
    type = "permission_error"
    code = "admin_closed"


class UnknownVariant(RequestError):
    """The requested variant is not served."""

    status = 404
    code = "variant_not_found"


class UnknownModel(RequestError):
    """The requested model is not served."""

    status = 404
    code = "model_not_found"


class UnknownResponse(RequestError):
    """An earlier answer is asked for, but none is stored."""

    status = 404
    code = "response_not_found"


class TooLarge(RequestError):
    """The body is longer than the server accepts."""

    status = 413
    code = "body_too_large"


class UnknownHost(RequestError):
    """The Host header names another server."""

    status = 421
    code = "unknown_host"


class DeadlineExceeded(RequestError):
    """The request exceeded its timeout; what it held is freed."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class Malformed(RequestError):
    """The body does not have the documented shape."""

    status = 422
    code = "malformed"


class ReloadFailed(RequestError):
    """A reload failed and changed nothing: the old checkpoint is still served."""

    status = 409
    code = "reload_failed"


class CapacityError(OttavaError):
    """The same request can succeed later. `retry_after_s`, in whole seconds, is sent as Retry-After."""

    status = 503
    type = "overloaded_error"

    def __init__(self, message: str, param: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(message, param)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": str(self.retry_after_s)}


class RateLimited(CapacityError):
    """An API key has exceeded one of its limits."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limited"


class QueueFull(CapacityError):
    """The queue of requests is full."""

    code = "queue_full"


class QueueTimeout(CapacityError):
    """The request was queued for too long."""

    code = "queue_timeout"


class NotReady(CapacityError):
    """The server is starting, or the variant was refused by the self-check."""

    code = "not_ready"


class Draining(CapacityError):
    """The server is stopping and accepts no new requests."""

    code = "draining"


class WeightsReplaced(CapacityError):
    """The request ran when the weights were replaced, and would have held up those that waited for the new ones."""

    code = "weights_replaced"


class EngineError(OttavaError):
    """The server is at fault."""


class EngineFailed(EngineError):
    """A step of the engine raised; its running requests are lost."""

    code = "engine_failed"


class ChatError(OttavaError):
    """A running server could not be reached, refused a request, or broke off its answer."""

    code = "chat"


class BenchError(OttavaError):
    """A server to be measured could not be reached, refused a first request, or answered nothing."""

    code = "bench"


class StartupError(OttavaError):
    """The service cannot start."""

    code = "startup"


class ModelNotFound(StartupError):
    """The model is neither a folder nor an id that can be fetched."""


class UnsupportedModel(StartupError):
    """The model's family or one of its features is not served."""


class UnsafeCheckpoint(StartupError):
    """The checkpoint has only pickled weights, which are not loaded."""


class InvalidSettings(StartupError):
    """A setting is unknown or cannot be satisfied."""


class SelfCheckFailed(StartupError):
    """A variant's output is not finite or is far from the baseline's."""


class ClientGone(Exception):
    """The client has closed the connection: there is nobody to tell an error."""


def leaves() -> Iterator[type[OttavaError]]:
    """Every class of the tree, including the root."""
    found = [OttavaError]
    while found:
        kind = found.pop()
        yield kind
        found += kind.__subclasses__()


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
