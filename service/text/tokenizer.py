"""A model's tokenizer: chat template, encoding, and decoding one token at a time.

It is defined by tokenizer.json alone; no model class of a library and no code of the model is involved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from service.errors import InvalidRequest, UnsupportedModel
from service.store.tokenizer_file import library_faults, read_tokenizer, unusable
from service.text.chat_template import TOOL_USE, ChatTemplate, read_object, read_template, special_tokens
from service.text.detokenizer import Detokenizer, decoded
from service.text.token_bytes import TokenBytes
from service.text.tools.format import Format

NO_TEXT = b"\xff"
"""A byte of no text in UTF-8, so that a grammar allows a special token only where it names the token."""

MAX_REMEMBERED = 1 << 16
"""Tokens whose texts are remembered, about 12 MB."""


class Tokenizer:
    """The tokenizer of a model folder.

    Args:
        backend: tokenizer of the `tokenizers` library.
        eos_ids: tokens that end an answer.
        template: None if the model has no chat template.
        tool_template: the one for conversations with tools, if the model has one of its own for them.
    """

    def __init__(
        self,
        backend: Backend,
        eos_ids: frozenset[int],
        template: ChatTemplate | None = None,
        tool_template: ChatTemplate | None = None,
    ) -> None:
        self._backend = backend
        self._text_alone = lru_cache(MAX_REMEMBERED)(lambda token_id: decoded(backend, [token_id]))
        self._names = TokenBytes(self._backend)
        self._template = template
        self._tool_template = tool_template or template
        added = backend.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        begin = self._ids("", add_special_tokens=True)[:1]
        self._first_ids = begin if set(begin) <= set(self._special_ids.values()) else []
        # Ids may have gaps, so their number says nothing.
        self._vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos_ids = eos_ids
        """Tokens that end an answer."""

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Load tokenizer, chat template and end tokens.

        Raises:
            UnsupportedModel: as `read_tokenizer`, or another file cannot be read.
        """
        backend = read_tokenizer(folder)
        templates = read_template(folder), read_template(folder, TOOL_USE)
        with library_faults(partial(unusable, folder)):
            # A decoder may fail on a token that no answer has had yet. 0.1 s for 49,000 tokens.
            backend.decode_batch([[i] for i in backend.get_vocab().values()], skip_special_tokens=False)
            return cls(backend, _eos_ids(folder, backend), *templates)

    @property
    def vocab_size(self) -> int:
        """The largest token id + 1, including added tokens; a model may have fewer rows or more."""
        return self._vocab_size

    @property
    def special_ids(self) -> Mapping[str, int]:
        """See `TokenizerLike.special_ids`."""
        return self._special_ids

    @property
    def tool_format(self) -> Format | None:
        """See `TokenizerLike.tool_format`."""
        return None if self._tool_template is None else self._tool_template.tool_format

    @property
    def has_reasoning(self) -> bool:
        """See `TokenizerLike.has_reasoning`."""
        return self._template is not None and self._template.has_reasoning

    @property
    def takes_later_system(self) -> bool:
        """See `TokenizerLike.takes_later_system`."""
        templates = (self._template, self._tool_template)
        return all(template is None or template.takes_later_system for template in templates)

    def encode(self, text: str, adds_special: bool = True) -> list[int]:
        """See `TokenizerLike.encode`.

        A text that begins with the first special token, as one that a chat template has made, does not get it twice.
        """
        if not adds_special:
            return self._encode(text, add_special_tokens=False)
        ids = self._encode(text, add_special_tokens=True)
        return ids[1:] if ids[:1] == ids[1:2] == self._first_ids else ids

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        is_open: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template; see `ChatTemplate.render`.

        The role developer becomes system if the template does not have it.

        Raises:
            InvalidRequest: the model has no chat template, or its template refuses these messages.
        """
        template = self._tool_template if tools else self._template
        if template is None:
            raise InvalidRequest("this model has no chat template: send `prompt` instead of `messages`", "messages")
        if not template.knows_developers:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        return self._encode(template.render(messages, is_open, tools, variables), add_special_tokens=False)

    def detokenizer(self, context: Sequence[int] = (), shown: Collection[str] = ()) -> Detokenizer:
        """A detokenizer for one request.

        context: the tokens that its text continues, to keep a leading space.
        shown: the special tokens that have a text, their name.
        """
        shown_ids = {self._special_ids[name] for name in shown if name in self._special_ids}
        hidden = frozenset(self._special_ids.values()) - shown_ids if shown_ids else None
        return Detokenizer(self._backend, context, hidden, self._text_alone)

    def vocabulary(self, size: int) -> list[bytes]:
        """The UTF-8 bytes of the tokens 0 to size - 1, empty for unknown ones and NO_TEXT for special ones.

        Takes seconds for 256,000 tokens.
        """
        special = set(self._special_ids.values())
        return [NO_TEXT if i in special else self.token_bytes(i) for i in range(size)]

    def token_text(self, token_id: int) -> str:
        """See `TokenBytes.text`."""
        return self._names.text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """See `TokenBytes.bytes`."""
        return self._names.bytes(token_id)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Raises InvalidRequest if the library fails on the text, as where it has no token for it."""
        with library_faults(_unencodable):
            return self._ids(text, add_special_tokens)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        # Only the batch calls release the interpreter lock, and a prompt of 1 MB takes 0.4 s. The fast one omits each
        # token's offset in the text, which is not used: 0.42 instead of 0.53 ms for 512 tokens.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


def _unencodable(why: str) -> InvalidRequest:
    return InvalidRequest(f"the model's tokenizer fails on this text: {why}; send another text, or token ids")


def _eos_ids(folder: Path, backend: Backend) -> frozenset[int]:
    """The union of the end tokens in generation_config.json, config.json and the tokenizer."""
    own = special_tokens(folder).get("eos_token")
    own_id = None if own is None else backend.token_to_id(own)
    ids = set() if own_id is None else {own_id}
    for name in ("generation_config.json", "config.json"):
        listed = read_object(folder / name).get("eos_token_id")
        found = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(type(token_id) is int for token_id in found):
            raise UnsupportedModel(
                f"{folder / name}: eos_token_id is {listed!r:.100}; a token's number, or a list of them, is served"
            )
        ids.update(found)
    return frozenset(ids)
