"""Whether the server still takes requests, and how many it owes an answer."""

from __future__ import annotations

import asyncio
import math
import time

from service.errors import Draining


class Lifecycle:
    """Counts the generations inside, streams until their last byte, and closes the door behind them."""

    def __init__(self) -> None:
        self.num_inside = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._until_s: float | None = None

    @property
    def is_draining(self) -> bool:
        return self._until_s is not None

    @property
    def retry_after_s(self) -> int:
        """When this process is gone at the latest, and another may listen in its place."""
        return 1 if self._until_s is None else max(1, math.ceil(self._until_s - time.monotonic()))

    def refuse_if_draining(self) -> None:
        """Raise Draining where the server is stopping."""
        if self.is_draining:
            seconds = self.retry_after_s
            raise Draining(
                f"the server is stopping and takes no new requests; send it to another one, or again in {seconds} s",
                retry_after_s=seconds,
            )

    def enter(self) -> None:
        """A generation comes in; it must `leave`."""
        self.num_inside += 1
        self._is_empty.clear()

    def leave(self) -> None:
        """A generation has its answer, or its client is gone."""
        self.num_inside -= 1
        if not self.num_inside:
            self._is_empty.set()

    def drain(self, timeout_s: float) -> None:
        """Take no more. Those inside have timeout_s left."""
        self._until_s = time.monotonic() + timeout_s

    async def emptied(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False after timeout_s."""
        try:
            await asyncio.wait_for(self._is_empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
