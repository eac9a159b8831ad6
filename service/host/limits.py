"""What the engines take from the settings: limits that the web has too, and how long they poll."""

from __future__ import annotations

from service.busy_poll import polling_s
from service.engine.grammar import GrammarLimits
from service.engine.supervision import FaultLimits
from service.settings import Settings


def fault_limits(settings: Settings) -> FaultLimits:
    """See `FaultLimits`."""
    return FaultLimits(settings.engine_restarts, settings.engine_restart_window_s, settings.step_timeout_s)


def busy_poll_s(settings: Settings, *, is_gpu: bool) -> float:
    """See `polling_s`. Each rank finds the same."""
    return polling_s(settings.busy_poll_ms, is_gpu=is_gpu, num_ranks=settings.tensor_parallel)


def grammar_limits(settings: Settings) -> GrammarLimits:
    """See `GrammarLimits`."""
    return GrammarLimits(
        compile_s=settings.max_grammar_compile_s,
        compile_bytes=settings.max_grammar_compile_bytes,
        mask_s=settings.max_mask_ms / 1e3,
        masks_s=settings.max_request_mask_ms / 1e3,
    )
