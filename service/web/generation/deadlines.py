"""The two timeouts of a run: until its first step, and until its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from service.engine.api import Stream
from service.errors import DeadlineExceeded, OttavaError, QueueTimeout


class Deadlines:
    """Calls `expire` with the error on the event loop if the request is too late.

    It uses timers rather than a timeout around the code that awaits tokens, because a client that does not read must
    not keep its request running.

    Args:
        stream: the request's stream.
        received_s: when it arrived, from `time.perf_counter`.
        timeout_s: from arrival to the last token.
        queue_timeout_s: from arrival to the first step.
        retry_after_s: returns the Retry-After of a request that waited too long.
        expire: called with DeadlineExceeded or QueueTimeout.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        received_s: float,
        timeout_s: float,
        queue_timeout_s: float,
        retry_after_s: Callable[[], int],
        expire: Callable[[OttavaError], None],
    ) -> None:
        self._stream = stream
        self._timeout_s = timeout_s
        self._queue_timeout_s = queue_timeout_s
        self._retry_after_s = retry_after_s
        self._expire = expire
        passed_s = time.perf_counter() - received_s
        call_later = asyncio.get_running_loop().call_later
        self._timers = (
            call_later(timeout_s - passed_s, self._end_late),
            call_later(queue_timeout_s - passed_s, self._end_waiting),
        )

    def cancel(self) -> None:
        """Stop the timers, once the run has ended."""
        for timer in self._timers:
            timer.cancel()

    def _end_late(self) -> None:
        self._expire(late(self._timeout_s))

    def _end_waiting(self) -> None:
        if self._stream.progress.first_scheduled_s is None:
            self._expire(
                QueueTimeout(
                    f"the request waited for {self._queue_timeout_s:g} s, which is the limit; try again later",
                    retry_after_s=self._retry_after_s(),
                )
            )


def late(timeout_s: float) -> DeadlineExceeded:
    """The error of a request that took longer than it may."""
    return DeadlineExceeded(
        f"the request was not done within {timeout_s:g} s; ask for fewer tokens or, up to the server's limit, a longer "
        "`timeout_s`",
        "timeout_s",
    )
