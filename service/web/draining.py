"""How a server is emptied before it ends, whatever serves it."""

from __future__ import annotations

import logging

from service.errors import Draining
from service.web.state import Serving

FAREWELL_S = 5.0
"""For the clients to read what their requests ended with."""

log = logging.getLogger(__name__)


async def drain(serving: Serving, timeout_s: float, why: str) -> None:
    """Take no more requests, give those that run timeout_s to finish, and end those that are left."""
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
