"""Protocols for constraining an answer to a grammar; `service.text.grammars` implements them."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from service.errors import InvalidRequest

REGEX = "regex "
"""Rules that begin like this are a regular expression, which the whole answer matches; others are in xgrammar's
notation."""

GivenUp = Future[None]
"""Is done once nobody waits for a result any more."""


MASK_S = 0.1


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a grammar may cost.

    compile_s: most processor seconds to compile it.
    compile_bytes: most memory that compiling it may take.
    mask_s: most seconds to find the tokens that one answer allows next.
    masks_s: most seconds for all answers of a request together.
    """

    compile_s: float = 5.0
    compile_bytes: int = 512 << 20
    mask_s: float = MASK_S
    masks_s: float = 1.0


class Matcher(Protocol):
    """The position of one answer in its grammar.

    is_ready: whether `allowed` is known already; see `service.engine.masks`.
    """

    @property
    def is_ready(self) -> bool: ...

    def allowed(self) -> bytes:
        """One bit per token id, lowest bit first: whether the token may come next. Ids beyond the last bit may not."""
        ...

    def accept(self, token_id: int) -> None:
        """Advance by a token, which must be allowed."""
        ...


class Grammar(Protocol):
    """A grammar compiled for a vocabulary; shared by all requests that use it.

    mask_s: processor seconds that its dearest mask is expected to take.
    """

    @property
    def mask_s(self) -> float: ...

    def matcher(self) -> Matcher:
        """A matcher at the start of an answer."""
        ...


class Grammars(Protocol):
    """A cache of grammars that compiles rules on first use."""

    def compile(self, rules: str, num_answers: int = 1, given_up: GivenUp | None = None) -> Grammar:
        """The grammar of these rules. May take seconds for new rules; thread-safe.

        Args:
            rules: in xgrammar's notation, or behind REGEX a regular expression.
            num_answers: how many answers of one request are to follow them.
            given_up: ends the compilation once it is done.

        Raises:
            InvalidRequest: the rules cannot be compiled for this vocabulary, or are dearer than the limits allow.
            DeadlineExceeded: it was given up.
        """
        ...

    def known(self, rules: str) -> Grammar | None:
        """The grammar of rules that are compiled already, or None. Never waits; thread-safe.

        Raises:
            InvalidRequest: as `compile`, of rules that have been refused already.
        """
        ...

    def close(self) -> None:
        """End what compiles. Idempotent."""
        ...


def compiled(grammars: Grammars | None, rules: str, num_answers: int = 1, given_up: GivenUp | None = None) -> Grammar:
    """The grammar of these rules.

    Raises:
        InvalidRequest: grammars is None, or as `Grammars.compile`.
        DeadlineExceeded: as `Grammars.compile`.
    """
    return required(grammars).compile(rules, num_answers, given_up)


def required(grammars: Grammars | None) -> Grammars:
    """The grammars of an engine. Raises InvalidRequest if it takes none."""
    if grammars is None:
        raise InvalidRequest("this engine takes no grammar", "response_format")
    return grammars
