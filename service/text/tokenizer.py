"""A model's tokenizer: chat template, encoding, and decoding one token at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service.errors import InvalidRequest, UnsupportedModel
from service.text.detokenizer import Detokenizer
from service.text.json.compiler import JsonCompiler, JsonGrammar
from service.text.json.keywords import PARAM
from service.text.token_bytes import TokenBytes


class Tokenizer:
    """The tokenizer of a model folder; never runs code that the folder brings."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may carry its training set-up: a prompt must be neither cut nor padded in silence.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._names = TokenBytes(self._backend)
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

    def apply_chat(self, messages: Sequence[dict[str, str]], is_open: bool = True) -> list[int]:
        """Token ids of a conversation by the model's own chat template.

        A developer's message is shown as the system's to a template that does not know developers.

        Args:
            messages: at least one `role` and `content`.
            is_open: go on as the assistant: with a new message, or if the last one is the assistant's, with that one.

        Raises:
            InvalidRequest: the model has no chat template, or its template refuses these messages.
        """
        template = self._tokenizer.get_chat_template() if self._tokenizer.chat_template else ""
        if not template:
            raise InvalidRequest("this model has no chat template: send `prompt` instead of `messages`", "messages")
        if "developer" not in template:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        continues = is_open and messages[-1]["role"] == "assistant"
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=is_open and not continues,
                continue_final_message=continues,
                tokenize=False,
            )
        except (jinja2.TemplateError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise InvalidRequest(f"the model's chat template refuses these messages: {reason}", "messages") from error
        return self._encode(str(text), add_special_tokens=False)

    def decoder(self, context: Sequence[int] = ()) -> Detokenizer:
        """A decoder for one request; context: the tokens that its text continues, where a leading space counts."""
        return Detokenizer(self._backend, context)

    def grammar(self, schema: dict[str, Any] | None) -> JsonGrammar:
        """What an answer in JSON must match: a JSON schema, or None for any object. Not on the event loop: it may take
        seconds.

        Raises:
            InvalidRequest: the schema is not served, or the model has no end token.
            QueueFull: too many schemas are being compiled.
        """
        if not self.eos_ids:
            raise InvalidRequest(
                "this model names no end token, so an answer in JSON could not end: leave `response_format` out, or "
                "put eos_token_id into the model's generation_config.json",
                PARAM,
            )
        return self._compiler.compile(schema)

    @cached_property
    def _compiler(self) -> JsonCompiler:
        """Made when it is first needed: reading a vocabulary of 256,000 tokens takes seconds."""
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        tokens = [b"" if i in special else self.token_bytes(i) for i in range(self.vocab_size)]
        return JsonCompiler(tokens, self.eos_ids)

    def token_text(self, token_id: int) -> str:
        """A token by name, see `TokenBytes.text`."""
        return self._names.text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the UTF-8 of a text, see `TokenBytes.bytes`."""
        return self._names.bytes(token_id)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Only the batch calls let other threads run meanwhile: a prompt of 1 MB takes 0.4 s. The fast one leaves out
        # where in the text each token is, which nobody reads: 0.42 instead of 0.53 ms for 512 tokens.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


def _eos_ids(folder: Path, tokenizer_eos_id: int | None) -> frozenset[int]:
    """End tokens by generation_config.json, config.json and the tokenizer together."""
    ids = set() if tokenizer_eos_id is None else {tokenizer_eos_id}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if listed is not None:
            ids.update(listed if isinstance(listed, list) else [listed])
    return frozenset(ids)
