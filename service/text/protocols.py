"""The interface of tokenizers, which imports no tokenizer library."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from service.text.tools.format import Format


class DetokenizerLike(Protocol):
    """Decodes one request's tokens incrementally."""

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it completes; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """The rest of the text, after the last token; an incomplete character becomes U+FFFD."""
        ...


class TokenizerLike(Protocol):
    """Implemented by `service.text.tokenizer.Tokenizer`, and by a fake in tests."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The special tokens by name; an answer's text leaves them out unless they are `shown`."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ...

    @property
    def tool_format(self) -> Format | None:
        """How the model writes calls of tools; None if its chat template knows no tools, or has another format."""
        ...

    @property
    def has_reasoning(self) -> bool:
        """Whether the model thinks before it answers; see `service.text.reasoning`."""
        ...

    @property
    def takes_later_system(self) -> bool:
        """Whether the chat template shows a system message that comes after others."""
        ...

    def encode(self, text: str, adds_special: bool = True) -> list[int]:
        """Token ids of a text. adds_special: with the special tokens that the model expects around a prompt."""
        ...

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        is_open: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; is_open ends it inside the assistant's turn, see `ChatTemplate.render`.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses the messages.
        """
        ...

    def token_text(self, token_id: int) -> str:
        """A token's text, or `bytes:` and the bytes in hexadecimal if it is part of a character."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token adds to a text; for a special token, its name."""
        ...

    def detokenizer(self, context: Sequence[int] = (), shown: Collection[str] = ()) -> DetokenizerLike:
        """A detokenizer for one request.

        context: the tokens that its text continues. shown: the special tokens that have a text, their name.
        """
        ...
