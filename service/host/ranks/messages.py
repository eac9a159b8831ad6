"""What the first rank tells the others. Each message is one call that all ranks make."""

from __future__ import annotations

from typing import Any

import msgspec

from quant.scheme import KVStorage


class Message(msgspec.Struct, array_like=True, frozen=True):
    """name: the variant that the call is for, with the weights' generation after a reload (see `key_of`)."""

    name: str


class Join(Message, frozen=True, tag="join"):
    """The first message: become rank `rank` of `size`, which meet in the folder `meeting`. name: the device's type."""

    settings: dict[str, Any]
    rank: int
    size: int
    meeting: str


class Load(Message, frozen=True, tag="load"):
    """Load a variant's weights from a folder. kv: storage of keys and values; None for the folder's own."""

    folder: str
    kv: KVStorage | None


class Prepare(Message, frozen=True, tag="prepare"):
    """Load the weights of a reload beside those in use, while steps go on, and answer with `Prepared`.

    dtype: torch's name of the type of what is not quantized.
    """

    folder: str
    dtype: str


class Drop(Message, frozen=True, tag="drop"):
    """Let go of weights and runner, if there are any."""


class Start(Message, frozen=True, tag="start"):
    """Make a runner with so many blocks. takes: whose caches it takes over; None allocates new ones."""

    num_blocks: int
    takes: str | None = None


class Warm(Message, frozen=True, tag="warm"):
    """Go one piece further in warming the runner up."""


class Measure(Message, frozen=True, tag="measure"):
    """Tell the process' id, the free memory of the device, and what weights and cache of these variants take."""

    variants: list[str]


class Forward(Message, frozen=True, tag="forward"):
    """Run a step. Its columns are in a slot of the shared memory.

    is_behind: the step before had not ended when the first rank launched this one.
    """

    slot: int
    num_tokens: int
    num_requests: int
    num_samples: int
    num_tables: int
    width: int
    is_decode: bool
    is_captured: bool
    is_behind: bool

    @property
    def sizes(self) -> dict[str, int]:
        """Those of `TableLayout.table`."""
        return {
            "num_tokens": self.num_tokens,
            "num_requests": self.num_requests,
            "num_samples": self.num_samples,
            "num_tables": self.num_tables,
            "width": self.width,
            "is_decode": self.is_decode,
        }


class Chosen(Message, frozen=True, tag="chosen"):
    """Take over the ids that the first rank has sampled."""

    num_samples: int


class Scored(Message, frozen=True, tag="scored"):
    """Compute the logits of rows of the step. rows: int64."""

    rows: bytes


class Check(Message, frozen=True, tag="check"):
    """Compute the logits of a text, as the self-check does."""

    token_ids: list[int]


class Prepared(Message, frozen=True, tag="prepared"):
    """A rank's answer. fault: why it has not loaded the weights; None if it has."""

    fault: str | None


def key_of(variant: str, generation: int) -> str:
    """The name of a variant's weights in messages: those of the start have the variant's own."""
    return variant if generation == 1 else f"{variant}@{generation}"


ToRank = Join | Load | Prepare | Drop | Start | Warm | Measure | Forward | Chosen | Scored | Check

encode = msgspec.msgpack.Encoder().encode
