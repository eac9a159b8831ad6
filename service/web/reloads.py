"""Runs reloads of the int8 checkpoint one at a time, and counts them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from service.engine.api import Reloaded
from service.errors import OttavaError, ReloadFailed
from service.telemetry.metrics import FAILED, RELOADED, ServiceMetrics

log = logging.getLogger(__name__)


class Reloads:
    """Runs one reload at a time."""

    def __init__(self, reload: Callable[[str | None], Awaitable[Reloaded]], metrics: ServiceMetrics) -> None:
        self._reload = reload
        self._metrics = metrics
        self._running: asyncio.Task[Reloaded] | None = None

    @property
    def is_running(self) -> bool:
        return self._running is not None and not self._running.done()

    async def run(self, model: str | None) -> Reloaded:
        """Reload and wait for it. The reload continues if the caller is cancelled.

        Raises:
            ReloadFailed: another reload is running, or this one failed. The old weights stay in use.
        """
        if self.is_running:
            raise ReloadFailed("a reload is running already; try again once it has ended")
        self._running = asyncio.create_task(self._run(model))
        return await asyncio.shield(self._running)

    async def _run(self, model: str | None) -> Reloaded:
        try:
            new = await self._reload(model)
        except OttavaError as error:
            self._metrics.reloaded(FAILED)
            log.error("the reload failed, the old weights serve on: %s", error.message)  # noqa: TRY400 (its message says why)
            raise
        self._metrics.reloaded(RELOADED)
        said = "%s serves %s, generation %d: loaded in %.3g s, no request could start for %.3g s"
        log.info(said, new.variant, new.checkpoint, new.generation, new.load_s, new.pause_s)
        return new
