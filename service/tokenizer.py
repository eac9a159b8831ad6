"""A model's tokenizer: chat template, encoding, and decoding one token at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service.errors import InvalidRequest, UnsupportedModel

REPLACEMENT = "\ufffd"
# A character has at most 4 bytes; more tokens without a whole one are not valid text, and are let go as they are so
# that a step's cost stays bounded.
MAX_PENDING = 64


class Decoder:
    """Turns one request's tokens into text that never ends inside a character. Special tokens give no text.

    A window of the last tokens is decoded again with each new one, since the text of a token depends on the ones before
    it: _prefix is the text of the part that went out, the rest is pending. (`tokenizers`' DecodeStream does the same,
    but raises where a byte-fallback tokenizer takes back text it has given, as it does after invalid UTF-8.)
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._window: list[int] = []
        self._num_sent = 0
        self._prefix = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is still in parts."""
        self._window.append(token_id)
        text = self._pending_text()
        is_partial = not text or text.endswith(REPLACEMENT)
        return "" if is_partial and len(self._window) - self._num_sent < MAX_PENDING else self._sent(text)

    def flush(self) -> str:
        """What is left at the end: a character that stayed incomplete comes as U+FFFD."""
        return self._sent(self._pending_text())

    def _pending_text(self) -> str:
        text = self._decode(self._window)
        if text.startswith(self._prefix):
            return text[len(self._prefix) :]
        return self._decode(self._window[self._num_sent :])

    def _sent(self, text: str) -> str:
        self._window = self._window[self._num_sent :]
        self._num_sent = len(self._window)
        self._prefix = self._decode(self._window)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)


class Tokenizer:
    """The tokenizer of a model folder; never runs code that the folder brings."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may carry its training set-up: a prompt must be neither cut nor padded in silence.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_ids = eos_ids
        """Tokens that end an answer."""

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Load tokenizer and end tokens.

        Raises:
            UnsupportedModel: the folder has no tokenizer that the `tokenizers` library runs.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UnsupportedModel(f"{folder}: no usable tokenizer: {error}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UnsupportedModel(
                f"{folder}: {type(tokenizer).__name__} has no fast form; convert it to a tokenizer.json"
            )
        return cls(tokenizer, _eos_ids(folder, tokenizer.eos_token_id))

    @property
    def vocab_size(self) -> int:
        """Token ids run from 0 to vocab_size - 1, added tokens included."""
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model expects around a prompt."""
        return self._encode(text, add_special_tokens=True)

    def apply_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises:
            InvalidRequest: the model has no chat template, or its template refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template: send `prompt` instead of `messages`", "messages")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        return self._encode(str(text), add_special_tokens=False)

    def decoder(self) -> Decoder:
        """A decoder for one request."""
        return Decoder(self._backend)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Only the batch call lets other threads run meanwhile: a prompt of 1 MB takes 0.4 s.
        return list(self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)


def _eos_ids(folder: Path, tokenizer_eos_id: int | None) -> frozenset[int]:
    """End tokens by generation_config.json, config.json and the tokenizer together."""
    ids = set() if tokenizer_eos_id is None else {tokenizer_eos_id}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if listed is not None:
            ids.update(listed if isinstance(listed, list) else [listed])
    return frozenset(ids)
