"""The bytes and a readable text of single tokens, for the log-probabilities of an answer."""

from __future__ import annotations

import re

from tokenizers import Tokenizer as Backend

from service.store.tokenizer_file import rules_of

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class TokenBytes:
    """The bytes and the text of each token of one tokenizer.

    There are three kinds of vocabulary: byte-level (each character of a token stands for a byte), byte-fallback (a
    token such as <0x0A> stands for a byte), and plain text. The text of an added token, special or not, is its name.
    """

    def __init__(self, backend: Backend) -> None:
        kinds = {rule["type"] for rule in rules_of(backend.decoder)}
        self._backend = backend
        self._added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        # A leading space may be dropped at the start of a text, so a token is decoded after another one.
        self._before: list[int] = list(backend.encode("a", add_special_tokens=False).ids)

    def text(self, token_id: int) -> str:
        """The token's text; `bytes:` and hexadecimal if it is part of a character; the id if it is unknown."""
        given = self.bytes(token_id)
        if not given and self._backend.id_to_token(token_id) is None:
            return f"token_id:{token_id}"
        try:
            return given.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in given)

    def bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token adds to a text; empty for an unknown id."""
        added, token = self._added.get(token_id), self._backend.id_to_token(token_id)
        if added is not None or token is None:
            return (added or "").encode()
        if self._is_byte_level and _BYTES.keys() >= set(token):
            return bytes(_BYTES[char] for char in token)
        byte = BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        return bytes([int(byte[1], 16)]) if byte else self._read(token_id).encode()

    def _read(self, token_id: int) -> str:
        before = self._backend.decode(self._before)
        return self._backend.decode([*self._before, token_id]).removeprefix(before)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters: printable bytes stand for themselves, the others follow from U+0100 on.

    Source: GPT-2's byte-level vocabulary.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()
