"""What the routes share: engines, tokenizer, metrics, who is ready, and who is running."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastapi import Request as HTTPRequest

from service.comparison.shadow import Shadow
from service.comparison.tally import Comparisons
from service.comparison.traffic import Traffic, Visit
from service.engine.request import Engine
from service.errors import EngineFailed, InvalidSettings, NotReady, ReloadFailed, UnknownVariant
from service.settings import BASELINE, Settings
from service.telemetry.metrics import ServiceMetrics
from service.telemetry.recent import Recent
from service.text.protocols import TokenizerLike
from service.web.keys import Keyring
from service.web.lifecycle import Lifecycle
from service.web.limits import KeyLimits, Pace
from service.web.model_names import ModelNames
from service.web.reloads import Reload, Reloaded, Reloads

STARTING = "the start-up self-check is still running"
STOPPING = "the server is stopping"


@dataclass(slots=True)
class Serving:
    """One app's state. refused: None until the self-check is done, then the reason for each variant it refused."""

    engines: Mapping[str, Engine]
    settings: Settings
    tokenizer: TokenizerLike
    info: Callable[[], dict[str, object]]
    metrics: ServiceMetrics
    traffic: Traffic
    recent: Recent
    comparisons: Comparisons
    shadow: Shadow
    keys: Keyring
    limits: KeyLimits
    pace: Pace
    reloads: Reloads
    models: ModelNames
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    refused: Mapping[str, str] | None = None

    @classmethod
    def over(
        cls,
        engines: Mapping[str, Engine],
        settings: Settings,
        tokenizer: TokenizerLike,
        info: Callable[[], dict[str, object]],
        reload: Reload,
    ) -> Serving:
        """The state of a fresh app."""
        metrics, traffic = ServiceMetrics(engines, info), Traffic()
        comparisons = Comparisons(metrics)
        rate, max_waiting = settings.shadow_rate, settings.shadow_queue
        shadow = Shadow(engines, BASELINE, tokenizer, traffic, comparisons, metrics, rate, max_waiting)
        limits = KeyLimits(settings.max_concurrent_per_key, settings.max_requests_per_minute)
        return cls(
            engines,
            settings,
            tokenizer,
            info,
            metrics,
            traffic,
            Recent(),
            comparisons,
            shadow,
            Keyring(settings),
            limits,
            Pace(),
            Reloads(reload, metrics),
            ModelNames(engines, info),
        )

    def visit(self) -> Visit:
        """A client's request comes in; it must `leave`."""
        return Visit(self.traffic, self.engines.values())

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

    async def reload(self, model: str | None) -> Reloaded:
        """Read the API keys again, then serve a checkpoint: see `Reloads.run`.

        Raises:
            ReloadFailed: with the reason; also while the server starts or stops. What was served before still is.
        """
        if self.is_draining or self.refused is None:
            raise ReloadFailed(STOPPING if self.is_draining else STARTING)
        try:
            self.keys.reload()
        except InvalidSettings as error:
            raise ReloadFailed(f"the API keys cannot be read again: {error.message}") from error
        reloaded = await self.reloads.run(model)
        self.models.refresh()
        # It has passed the check that the one before may have failed.
        self.refused = {variant: why for variant, why in self.refused.items() if variant != reloaded.variant}
        return reloaded

    @property
    def is_draining(self) -> bool:
        """The server is stopping: it takes no new generations."""
        return self.lifecycle.is_draining

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
