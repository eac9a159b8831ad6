"""Protocols for constraining an answer to a grammar; `service.text.json` implements them."""

from __future__ import annotations

from typing import Protocol

from service.errors import InvalidRequest


class Matcher(Protocol):
    """The position of one answer in its grammar."""

    def allowed(self) -> bytes:
        """One bit per token id, lowest bit first: whether the token may come next. Ids beyond the last bit may not."""
        ...

    def accept(self, token_id: int) -> None:
        """Advance by a token, which must be allowed."""
        ...


class Grammar(Protocol):
    """A grammar compiled for a vocabulary; shared by all requests that use it."""

    def matcher(self) -> Matcher:
        """A matcher at the start of an answer."""
        ...


class Grammars(Protocol):
    """A cache of grammars that compiles rules on first use."""

    def compile(self, rules: str) -> Grammar:
        """The grammar of these rules. May take seconds for new rules; thread-safe.

        Raises:
            InvalidRequest: the rules cannot be compiled for this vocabulary.
            QueueFull: too many grammars are being compiled.
        """
        ...


def compiled(grammars: Grammars | None, rules: str) -> Grammar:
    """The grammar of these rules.

    Raises:
        InvalidRequest: grammars is None, or as `Grammars.compile`.
        QueueFull: as `Grammars.compile`.
    """
    if grammars is None:
        raise InvalidRequest("this engine takes no grammar", "response_format")
    return grammars.compile(rules)
