"""Who is in the house: requests of clients now and ever, and whether one of them had the device to itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.engine.api import Engine


@dataclass(slots=True)
class Traffic:
    """Requests that this process is running: how many now, how many ever. on_enter: called as each arrives."""

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
    """One client's request among the others, from its arrival until it leaves. It may run on several variants.

    is_contended: another request was there when it came, or at the end of one of its runs had come meanwhile.
    """

    def __init__(self, traffic: Traffic, engines: Iterable[Engine]) -> None:
        self._traffic = traffic
        self._engines = tuple(engines)
        self._has_left = False
        self.is_contended = traffic.num_active > 0 or num_in(self._engines) > 0
        traffic.enter()
        self._num_entered = traffic.num_entered

    def note(self, num_own: int) -> None:
        """Look around at the end of a run, when the engines still hold num_own requests of this visit."""
        has_company = self._traffic.num_entered != self._num_entered or num_in(self._engines) > num_own
        self.is_contended = self.is_contended or has_company

    def leave(self) -> None:
        """End the visit. A second call changes nothing."""
        if not self._has_left:
            self._has_left = True
            self._traffic.leave()


def num_in(engines: Iterable[Engine]) -> int:
    """Requests that the engines hold, running or waiting."""
    stats = [engine.stats() for engine in engines]
    return sum(reading.num_running + reading.num_waiting for reading in stats)
