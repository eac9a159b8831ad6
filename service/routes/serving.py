"""What the routes share: engines, tokenizer, metrics, who is ready, and who is running."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastapi import Request as HTTPRequest

from service.engine.request import Engine
from service.errors import EngineFailed, NotReady, UnknownVariant
from service.metrics import ServiceMetrics
from service.settings import Settings
from service.text import TokenizerLike

BASELINE = "fp16"
STARTING = "the start-up self-check is still running"


@dataclass(slots=True)
class Traffic:
    """Requests that this process is running: how many now, how many ever."""

    num_active: int = 0
    num_entered: int = 0

    def enter(self) -> None:
        self.num_active += 1
        self.num_entered += 1

    def leave(self) -> None:
        self.num_active -= 1


@dataclass(slots=True)
class Serving:
    """One app's state. refused: None until the self-check is done, then the reason for each variant it refused."""

    engines: Mapping[str, Engine]
    settings: Settings
    tokenizer: TokenizerLike
    info: Callable[[], dict[str, object]]
    metrics: ServiceMetrics
    refused: Mapping[str, str] | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def default_variant(self) -> str:
        return next(iter(self.engines))

    def engine(self, variant: str) -> Engine:
        """The engine of a variant that can take requests.

        Raises:
            UnknownVariant: no such variant here.
            NotReady: the self-check is not done, or refused it.
            EngineFailed: a step of it raised.
        """
        engine = self.engines.get(variant)
        if engine is None:
            served = ", ".join(self.engines)
            raise UnknownVariant(
                f"`variant` is {variant[:80]!r}, which is not served here; use one of: {served}", "variant"
            )
        reason = self.why_unready(variant)
        if reason is not None:
            raise NotReady(f"variant {variant} is not ready: {reason}", "variant")
        if engine.failure is not None:
            raise EngineFailed(f"the {variant} engine has stopped after a failure; the server must be restarted")
        return engine

    def why_unready(self, variant: str) -> str | None:
        """What keeps a served variant from being ready, its engine's health aside."""
        return STARTING if self.refused is None else self.refused.get(variant)

    def failures(self) -> dict[str, str]:
        """The engines that have stopped, and why."""
        stopped = {variant: engine.failure for variant, engine in self.engines.items()}
        return {variant: f"{type(error).__name__}: {error}" for variant, error in stopped.items() if error is not None}


def serving_of(request: HTTPRequest) -> Serving:
    """The app's state, as a FastAPI dependency."""
    serving: Serving = request.app.state.serving
    return serving
