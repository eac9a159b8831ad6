"""When the next step is planned: as late as the device allows, so that requests that arrive meanwhile are in it."""

from __future__ import annotations

from service.engine.scheduler import StepResults
from service.engine.shapes import Shape

RISE = 0.1
"""How far an expected time follows a longer one; a shorter one at once, since the device must not wait for the host."""

KEPT = 0.98
"""Share of the longest launch, and of the time kept in reserve, that is left after a step."""

RESERVE_S = 0.0003
"""Least time between the end of a launch and that of the step that runs."""

MOST_S = 0.01
"""Most of the same."""


class JustInTime:
    """How long the next step's planning can wait, from what earlier steps of the running one's shape took.

    The next step must be launched while one runs, or the device would wait for the host. Launched at once, it would be
    without the requests that arrive while the first one runs, and they would wait for both. A launch that came after
    the end, on this rank or another, doubles the time that is kept in reserve, which falls slowly again.

    Attributes:
        num_late: launches that came after the end.

    Args:
        num_late: what it begins with.
    """

    def __init__(self, num_late: int = 0) -> None:
        self._times_s: dict[Shape, float] = {}
        self._launch_s = 0.0
        self._reserve_s = RESERVE_S
        self._begun_s = 0.0
        self.num_late = num_late

    def wait_s(self, shape: Shape | None, now_s: float) -> float:
        """Seconds until the next step must be planned while one of a shape runs; 0 where its time is not known."""
        time_s = None if shape is None else self._times_s.get(shape)
        if time_s is None:
            return 0.0
        return max(0.0, self._begun_s + time_s - self._launch_s - self._reserve_s - now_s)

    def launched(self, now_s: float, launch_s: float, *, was_late: bool) -> None:
        """A step has been launched.

        launch_s: seconds from the end of the wait; 0 if none ran.   was_late: the one before has ended already.
        """
        self._begun_s = now_s
        self._launch_s = max(launch_s, KEPT * self._launch_s)
        if was_late:
            self.was_late()
        else:
            self._reserve_s = max(KEPT * self._reserve_s, RESERVE_S)

    def ended(self, results: StepResults) -> None:
        """A step has been read, so the one behind it has begun."""
        self._begun_s = max(self._begun_s, results.time_s)
        if results.shape is not None and results.device_s is not None:
            expected_s = self._times_s.get(results.shape, results.device_s)
            longer_s = expected_s + RISE * (results.device_s - expected_s)
            self._times_s[results.shape] = min(results.device_s, longer_s)

    def was_late(self) -> None:
        """A launch came after the end of the step before, on this rank or, as is known once it is read, on another."""
        self.num_late += 1
        self._reserve_s = min(2 * self._reserve_s, MOST_S)
