"""Whether the server accepts requests, and how many are active."""

from __future__ import annotations

import asyncio
import math
import time

from service.errors import Draining


class Lifecycle:
    """Counts active generations, streams until their last byte, and refuses new ones while draining."""

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
        """Seconds until this process has exited at the latest and another may have taken its place."""
        return 1 if self._until_s is None else max(1, math.ceil(self._until_s - time.monotonic()))

    def refuse_if_draining(self) -> None:
        """Raise Draining if the server is stopping."""
        if self.is_draining:
            seconds = self.retry_after_s
            raise Draining(
                f"the server is stopping and takes no new requests; send it to another one, or again in {seconds} s",
                retry_after_s=seconds,
            )

    def enter(self) -> None:
        """Count a generation as active, until `leave`."""
        self.num_inside += 1
        self._is_empty.clear()

    def leave(self) -> None:
        """Count a generation as done: it was answered, or its client disconnected."""
        self.num_inside -= 1
        if not self.num_inside:
            self._is_empty.set()

    def drain(self, timeout_s: float) -> None:
        """Refuse new generations from now on; active ones have timeout_s left."""
        self._until_s = time.monotonic() + timeout_s

    async def emptied(self, timeout_s: float) -> bool:
        """Wait until no generation is active. False after timeout_s."""
        try:
            await asyncio.wait_for(self._is_empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
