"""Drains the server before it stops."""

from __future__ import annotations

import logging

from service.errors import Draining
from service.web.state import Serving

FAREWELL_S = 5.0
"""Time for clients to read the end of their answers."""

log = logging.getLogger(__name__)


async def drain(serving: Serving, timeout_s: float, why: str) -> None:
    """Accept no new requests, give active ones timeout_s to finish, and end the rest with Draining."""
    lifecycle = serving.lifecycle
    lifecycle.drain(timeout_s)
    log.info("%s: draining, %d requests have up to %g s to finish", why, lifecycle.num_inside, timeout_s)
    if await lifecycle.emptied(timeout_s):
        return
    log.warning("%d requests were not done within %g s and are ended", lifecycle.num_inside, timeout_s)
    await serving.host.close(
        Draining(
            f"the server stopped before the request was done, {timeout_s:g} s after it had been told to; send it again"
        )
    )
    await lifecycle.emptied(FAREWELL_S)
