"""Counts active requests, and detects whether a request had the device to itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.engine.api import Engine


@dataclass(slots=True)
class Traffic:
    """Counts clients' requests, active and in total. on_enter: called when one arrives."""

    num_active: int = 0
    num_entered: int = 0
    on_enter: Callable[[], None] | None = None

    def enter(self) -> None:
        self.num_active += 1
        self.num_entered += 1
        if self.on_enter is not None:
            self.on_enter()

    def leave(self) -> None:
        self.num_active -= 1


class Visit:
    """One client's request, from arrival to end; it may run on several variants.

    is_contended: another request was active when this one arrived, or had arrived by the end of one of its runs.
    """

    def __init__(self, traffic: Traffic, engines: Iterable[Engine]) -> None:
        self._traffic = traffic
        self._engines = tuple(engines)
        self._has_left = False
        self.is_contended = traffic.num_active > 0 or num_in(self._engines) > 0
        traffic.enter()
        self._num_entered = traffic.num_entered

    def note(self, num_own: int) -> None:
        """Update `is_contended` at the end of a run. num_own: requests of this visit that the engines still hold."""
        has_company = self._traffic.num_entered != self._num_entered or num_in(self._engines) > num_own
        self.is_contended = self.is_contended or has_company

    def leave(self) -> None:
        """End the visit. Idempotent."""
        if not self._has_left:
            self._has_left = True
            self._traffic.leave()


def num_in(engines: Iterable[Engine]) -> int:
    """Number of running and queued requests in the engines."""
    stats = [engine.stats() for engine in engines]
    return sum(reading.num_running + reading.num_waiting for reading in stats)
