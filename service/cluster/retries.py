"""When a request is sent to another replica: only while its client has been sent nothing of an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

Trouble = Literal["unstarted", "lost"]
"""unstarted: the replica has refused the request, or cannot be reached, and has computed nothing.
lost: the replica or its engine ended while it had the request."""

UNSTARTED = frozenset({"draining", "not_ready", "queue_full"})
LOST = frozenset({"engine_failed"})
"""Codes of a replica's errors; any other error is the client's business and is passed on."""

MAX_UNSTARTED = 20
"""Refusals before the client gets the last of them. With the pauses between them that is about eight seconds."""

MAX_LOST = 2
"""A request that ends what serves it must not go through the whole cluster: after the second loss it is not sent
again."""

FIRST_PAUSE_S, MAX_PAUSE_S = 0.02, 0.5

ERROR_EVENT = b'data: {"error"'


@dataclass(slots=True)
class Tries:
    """What has become of a request so far."""

    num_unstarted: int = 0
    num_lost: int = 0

    def allows(self, trouble: Trouble) -> bool:
        """Count a failed try. Returns whether the request may be sent again."""
        if trouble == "lost":
            self.num_lost += 1
            return self.num_lost < MAX_LOST
        self.num_unstarted += 1
        return self.num_unstarted < MAX_UNSTARTED

    @property
    def pause_s(self) -> float:
        """Time to wait before the next try: none after a loss, more with each refusal."""
        if not self.num_unstarted:
            return 0.0
        return float(min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (self.num_unstarted - 1)))


def trouble_of(status: int, content: bytes) -> Trouble | None:
    """What an answer says of its replica; None if it is to be passed on to the client.

    Args:
        status: of the answer.
        content: the whole body, or the first event of a stream, which has status 200 whatever it brings.
    """
    is_event = content.startswith(ERROR_EVENT)
    if status < 500 and not is_event:
        return None
    code = _code(content.removeprefix(b"data: ").partition(b"\n\n")[0] if is_event else content)
    if code in UNSTARTED:
        return "unstarted"
    return "lost" if code in LOST else None


def _code(content: bytes) -> str | None:
    try:
        return str(json.loads(content)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return None
