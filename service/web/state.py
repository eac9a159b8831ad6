"""The state shared by the routes: engines, tokenizer, metrics, keys, limits and lifecycle."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request as HTTPRequest

from service.comparison.shadow import Shadow
from service.comparison.tally import Comparisons
from service.comparison.traffic import Traffic, Visit
from service.engine.api import Engine, HostInfo, Reloaded, Stage
from service.errors import EngineFailed, InvalidSettings, NotReady, OttavaError, ReloadFailed, UnknownVariant
from service.settings import BASELINE, Settings
from service.telemetry.metrics import ServiceMetrics
from service.telemetry.recent import Recent
from service.telemetry.record import current
from service.text.protocols import TokenizerLike
from service.web.generation.compiling import Compiling
from service.web.keys import Keyring
from service.web.lifecycle import Lifecycle
from service.web.limits import KeyLimits, Pace
from service.web.model_names import ModelNames
from service.web.reloads import Reloads

STOPPING = "the server is stopping"


class Host(Protocol):
    """The web's interface to the engines of one model; implemented by `service.host.channel.client.HostClient`.

    engines: by variant, the default one first.
    stage: the current stage of start-up; None once they serve.
    refused: variant -> reason, for those that failed the self-check.
    failure: the error that ended one of them for good; `failed` is set then.
    is_stuck: whether that was a step that hangs.
    """

    stage: Stage | None
    refused: Mapping[str, str]
    failure: OttavaError | None
    failed: asyncio.Event
    is_stuck: bool

    @property
    def engines(self) -> Mapping[str, Engine]: ...

    @property
    def engine_pid(self) -> int | None:
        """The process of the engines; None while there is none, or if they are in this one."""
        ...

    @property
    def info(self) -> HostInfo:
        """What is served. Raises NotReady before the engines are open."""
        ...

    @property
    def tokenizer(self) -> TokenizerLike:
        """The model's tokenizer. Raises NotReady before it is loaded."""
        ...

    async def run(self) -> None:
        """Open and check the engines, and restart any that die. Ends when they are closed or have failed for good."""
        ...

    async def reload(self, model: str | None) -> Reloaded:
        """Reload from a checkpoint folder, or from the present one if None. Raises ReloadFailed or EngineFailed."""
        ...

    async def close(self, error: OttavaError) -> None:
        """Stop the engines; unfinished requests get the error. Idempotent."""
        ...


@dataclass(slots=True)
class Serving:
    """The state of one app."""

    host: Host
    settings: Settings
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
    lifecycle: Lifecycle
    compiling: Compiling

    @classmethod
    def over(cls, host: Host, settings: Settings) -> Serving:
        """The initial state of an app."""
        lifecycle, traffic = Lifecycle(), Traffic()

        def is_ready(variant: str) -> bool:
            has_failed = host.engines[variant].failure is not None
            return not (lifecycle.is_draining or host.stage or has_failed or variant in host.refused)

        metrics = ServiceMetrics(host.engines, lambda: host.info, is_ready=is_ready, engine_pid=lambda: host.engine_pid)
        comparisons = Comparisons(metrics)
        shadow = Shadow(
            host.engines,
            BASELINE,
            tokenizer=lambda: host.tokenizer,
            traffic=traffic,
            comparisons=comparisons,
            metrics=metrics,
            rate=settings.shadow_rate,
            max_waiting=settings.shadow_queue,
        )
        return cls(
            host=host,
            settings=settings,
            metrics=metrics,
            traffic=traffic,
            recent=Recent(),
            comparisons=comparisons,
            shadow=shadow,
            keys=Keyring(settings),
            limits=KeyLimits(settings.max_concurrent_per_key, settings.max_requests_per_minute),
            pace=Pace(),
            reloads=Reloads(host.reload, metrics),
            models=ModelNames(host.engines, lambda: host.info),
            lifecycle=lifecycle,
            compiling=Compiling(),
        )

    @property
    def engines(self) -> Mapping[str, Engine]:
        return self.host.engines

    @property
    def tokenizer(self) -> TokenizerLike:
        """The model's tokenizer. Raises NotReady before it is loaded."""
        return self.host.tokenizer

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding, see `HostInfo`. Raises NotReady before the engines are open."""
        return self.host.info.vocab_size

    def visit(self) -> Visit:
        """Register a client's request; call `leave` on the result when it ends."""
        return Visit(self.traffic, self.engines.values())

    @property
    def default_variant(self) -> str:
        return next(iter(self.engines))

    def engine(self, variant: str) -> Engine:
        """The engine of a variant that is ready for requests.

        Raises:
            UnknownVariant: no such variant is served.
            NotReady: it is still starting, or the self-check refused it.
            EngineFailed: it has failed for good.
        """
        engine = self.engines.get(variant)
        if engine is None:
            served = ", ".join(self.engines)
            raise UnknownVariant(
                f"`variant` is {variant[:80]!r}, which is not served here; use one of: {served}", "variant"
            )
        if engine.failure is not None:
            raise EngineFailed(f"the {variant} engine has stopped after a failure; the server must be restarted")
        reason = self.why_unready(variant)
        if reason is not None:
            raise NotReady(f"variant {variant} is not ready: {reason}", "variant")
        return engine

    def count_answers(self, num_answers: int, param: str | None) -> None:
        """Count the answers that the current request wants, its runs; see `KeyLimits.widen`."""
        record = current.get()
        if record is not None:
            self.limits.widen(record.key, num_answers, param)
            record.num_answers = num_answers

    async def reload(self, model: str | None) -> Reloaded:
        """Read the API keys again, then reload the checkpoint: see `Reloads.run`.

        Raises:
            ReloadFailed: the keys or the checkpoint cannot be read, or the server is starting or stopping. The old
                weights stay in use.
        """
        if self.is_draining or self.host.stage is not None:
            raise ReloadFailed(STOPPING if self.is_draining else f"the server is not ready: {self.host.stage}")
        try:
            self.keys.reload()
        except InvalidSettings as error:
            raise ReloadFailed(f"the API keys cannot be read again: {error.message}") from error
        reloaded = await self.reloads.run(model)
        self.models.refresh()
        return reloaded

    @property
    def is_draining(self) -> bool:
        """Whether the server is stopping and refuses new generations."""
        return self.lifecycle.is_draining

    @property
    def is_ready(self) -> bool:
        """Whether start-up and self-check are done; a variant may still have been refused."""
        return self.host.stage is None

    def why_unready(self, variant: str) -> str | None:
        """Why a served variant is not ready, or None; ignores failures of its engine."""
        return self.host.refused.get(variant) if self.is_ready else str(self.host.stage)

    def failures(self) -> dict[str, str]:
        """Variant -> reason, for the engines that have failed for good."""
        stopped = {variant: engine.failure for variant, engine in self.engines.items()}
        return {variant: why for variant, why in stopped.items() if why is not None}


def serving_of(request: HTTPRequest) -> Serving:
    """The app's state, as a FastAPI dependency."""
    serving: Serving = request.app.state.serving
    return serving
