"""What constrains an answer to a grammar: protocols that `service.text.json` implements."""

from __future__ import annotations

from typing import Protocol

from service.errors import InvalidRequest


class Matcher(Protocol):
    """How far one answer has come in its grammar."""

    def allowed(self) -> bytes:
        """A bit for each token id, the lowest of a byte first: whether the token may come next; ids beyond may not."""
        ...

    def accept(self, token_id: int) -> None:
        """Move on by a token that may come."""
        ...


class Grammar(Protocol):
    """What an answer must match, compiled for a vocabulary; shared by the requests that ask for it."""

    def matcher(self) -> Matcher:
        """A matcher at the start of an answer."""
        ...


class Grammars(Protocol):
    """What makes grammars of rules, and keeps those it made."""

    def compile(self, rules: str) -> Grammar:
        """Takes up to seconds for rules that are new, and may be called from any thread.

        Raises:
            InvalidRequest: the rules cannot be compiled for this vocabulary.
            QueueFull: as many grammars are being compiled as may be.
        """
        ...


def compiled(grammars: Grammars | None, rules: str) -> Grammar:
    """The grammar of these rules; see `Grammars.compile`, which also has its errors.

    Raises:
        InvalidRequest: there is nothing that compiles.
    """
    if grammars is None:
        raise InvalidRequest("this engine takes no grammar", "response_format")
    return grammars.compile(rules)
