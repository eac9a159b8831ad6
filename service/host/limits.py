"""The fault limits of the settings, used by the engines and by the web that restarts their process."""

from __future__ import annotations

from service.engine.supervision import FaultLimits
from service.settings import Settings


def fault_limits(settings: Settings) -> FaultLimits:
    """See `FaultLimits`."""
    return FaultLimits(settings.engine_restarts, settings.engine_restart_window_s, settings.step_timeout_s)
