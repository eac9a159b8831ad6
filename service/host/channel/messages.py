"""The messages between the web and the process of the engines, as MessagePack: `encode`, `ToEngine`, `ToWeb`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from service.engine.api import HostInfo, Reloaded, Stage
from service.engine.messages import Fault, Finish, News, Submit


class Open(msgspec.Struct, array_like=True, frozen=True, tag="open"):
    """Load what these settings name. No secret is among them."""

    settings: dict[str, Any]


class Call(msgspec.Struct, array_like=True, frozen=True, tag="call"):
    """Do something that takes a while and answer with `Returned` of the same number.

    compile: argument is the rules of a grammar.   check: none.   reload: a folder, or None for the one that is served.
    """

    number: int
    kind: Literal["compile", "check", "reload"]
    argument: str | None = None


class Stop(msgspec.Struct, array_like=True, frozen=True, tag="stop"):
    """End the engines, then the process."""


class Staged(msgspec.Struct, array_like=True, frozen=True, tag="staged"):
    """What the start-up is at."""

    stage: Stage


class EngineFacts(msgspec.Struct, array_like=True, frozen=True):
    """What is known of an engine once it runs; see `service.engine.api.Engine`."""

    variant: str
    max_model_len: int
    dtype: str


class Opened(msgspec.Struct, array_like=True, frozen=True, tag="opened"):
    """The engines run. tokenizer_folder: of the model that they share."""

    info: HostInfo
    tokenizer_folder: str
    engines: list[EngineFacts]


class Refused(msgspec.Struct, array_like=True, frozen=True, tag="refused"):
    """Nothing could be opened, and why. is_told: the fault says what to change."""

    fault: Fault
    is_told: bool


class Returned(msgspec.Struct, array_like=True, frozen=True, tag="returned"):
    """What a `Call` came to: a fault, or of `check` the variants that are refused, or of `reload` what is served."""

    number: int
    fault: Fault | None = None
    refused: dict[str, str] | None = None
    reloaded: Reloaded | None = None
    info: HostInfo | None = None


class Failed(msgspec.Struct, array_like=True, frozen=True, tag="failed"):
    """An engine has failed for good.

    is_exhausted: it went on after faults as often as it may, so a new process would not do better.
    is_stuck: a step does not end.
    """

    variant: str
    failure: str
    is_exhausted: bool
    is_stuck: bool


ToEngine = Open | Submit | Finish | Call | Stop
ToWeb = Staged | Opened | Refused | News | Returned | Failed

encode = msgspec.msgpack.Encoder().encode
