"""Reloads of the int8 checkpoint as the HTTP side sees them: one at a time, off the event loop, counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime

from service.errors import OttavaError, ReloadFailed
from service.process import start_thread
from service.telemetry.metrics import FAILED, RELOADED, ServiceMetrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reloaded:
    """A reload that succeeded.

    generation: of the weights, 1 at start.
    load_s: of reading, checking and warming up beside the old weights.
    pause_s: for which no request could start.
    """

    variant: str
    checkpoint: str
    generation: int
    loaded_at: datetime
    load_s: float
    pause_s: float


Reload = Callable[[str | None], Reloaded]
"""Serve the checkpoint of a folder, None for the present one's. Blocks until it is served; raises ReloadFailed."""


def nothing_to_reload(_model: str | None) -> Reloaded:
    """A `Reload` for engines without a checkpoint."""
    raise ReloadFailed("the engines of this server hold no checkpoint that could be reloaded")


class Reloads:
    """Runs one reload at a time."""

    def __init__(self, reload: Reload, metrics: ServiceMetrics) -> None:
        self._reload = reload
        self._metrics = metrics
        self._running: Future[Reloaded] | None = None

    @property
    def is_running(self) -> bool:
        return self._running is not None and not self._running.done()

    async def run(self, model: str | None) -> Reloaded:
        """Reload, and wait for the end of it; it also ends where nobody waits any more.

        Raises:
            ReloadFailed: with the reason; a reload is running already. The old weights serve on.
        """
        if self.is_running:
            raise ReloadFailed("a reload is running already; try again once it has ended")
        self._running = start_thread("reload", self._reload, model)
        self._running.add_done_callback(self._note)
        return await asyncio.wrap_future(self._running)

    def _note(self, done: Future[Reloaded]) -> None:
        error = done.exception()
        self._metrics.reloaded(RELOADED if error is None else FAILED)
        if error is None:
            new = done.result()
            said = "%s serves %s, generation %d: loaded in %.3g s, no request could start for %.3g s"
            log.info(said, new.variant, new.checkpoint, new.generation, new.load_s, new.pause_s)
        else:
            trace = None if isinstance(error, OttavaError) else error
            log.error("the reload failed, the old weights serve on: %s", error, exc_info=trace)
