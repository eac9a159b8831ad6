"""What the settings say of faults, as the engines and whoever replaces their process take it."""

from __future__ import annotations

from service.engine.supervision import FaultLimits
from service.settings import Settings


def fault_limits(settings: Settings) -> FaultLimits:
    """See `FaultLimits`."""
    return FaultLimits(settings.engine_restarts, settings.engine_restart_window_s, settings.step_timeout_s)
