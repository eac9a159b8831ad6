"""The messages between the web and the engines' process, as MessagePack: `encode`, `ToEngine`, `ToWeb`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from service.engine.api import HostInfo, Reloaded, Stage
from service.engine.messages import Fault, Finish, News, Submit

CallKind = Literal["compile", "check", "reload", "cached"]


class Open(msgspec.Struct, array_like=True, frozen=True, tag="open"):
    """Load the model of these settings, which contain no secrets."""

    settings: dict[str, Any]


class Call(msgspec.Struct, array_like=True, frozen=True, tag="call"):
    """Run a slow operation and answer with a `Returned` of the same number.

    argument: for compile, the rules of a grammar; for reload, a folder, or None for the present one; for cached, the
        salt.
    num_answers: for compile, see `Engine.compile`.
    variant, prompt_ids: for cached, the engine and the prompt that is looked up in its prefix cache.
    """

    number: int
    kind: CallKind
    argument: str | None = None
    variant: str = ""
    prompt_ids: list[int] = []
    num_answers: int = 1


class Abandon(msgspec.Struct, array_like=True, frozen=True, tag="abandon"):
    """Nobody waits for the result of the call of this number any more."""

    number: int


class Stop(msgspec.Struct, array_like=True, frozen=True, tag="stop"):
    """Stop the engines, then exit."""


class Staged(msgspec.Struct, array_like=True, frozen=True, tag="staged"):
    """The current stage of start-up."""

    stage: Stage


class EngineFacts(msgspec.Struct, array_like=True, frozen=True):
    """The properties of an engine that are known once it is loaded; see `service.engine.api.Engine`."""

    variant: str
    max_model_len: int
    dtype: str


class Opened(msgspec.Struct, array_like=True, frozen=True, tag="opened"):
    """The engines are running.

    tokenizer_folder: files of the tokenizer that they share.
    busy_poll_s: how long the processes of this server poll; see `service.busy_poll`.
    """

    info: HostInfo
    tokenizer_folder: str
    engines: list[EngineFacts]
    busy_poll_s: float = 0.0


class Refused(msgspec.Struct, array_like=True, frozen=True, tag="refused"):
    """Start-up failed. is_told: whether the fault says what the user has to change."""

    fault: Fault
    is_told: bool


class Returned(msgspec.Struct, array_like=True, frozen=True, tag="returned"):
    """The result of a `Call`: a fault; or of a check refused (variant -> reason); or of a reload reloaded; or of cached
    num_cached.

    info: after a check or a reload, both of which change it.
    """

    number: int
    fault: Fault | None = None
    refused: dict[str, str] | None = None
    reloaded: Reloaded | None = None
    info: HostInfo | None = None
    num_cached: int = 0


class Failed(msgspec.Struct, array_like=True, frozen=True, tag="failed"):
    """An engine has failed for good.

    is_exhausted: it had used up its restarts, so a new process would not help.
    is_stuck: a step hangs.
    """

    variant: str
    failure: str
    is_exhausted: bool
    is_stuck: bool


ToEngine = Open | Submit | Finish | Call | Abandon | Stop
ToWeb = Staged | Opened | Refused | News | Returned | Failed

encode = msgspec.msgpack.Encoder().encode
