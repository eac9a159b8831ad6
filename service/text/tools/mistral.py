"""`[TOOL_CALLS][{"name": ..., "arguments": {...}}]` or `[TOOL_CALLS]name[ARGS]{...}`, as Mistral writes it."""

from __future__ import annotations

import hashlib
import re
import secrets
import string

from service.text.tools.format import Format, Frame, Head

OPENING, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
ALPHABET = string.ascii_letters + string.digits
ID_LENGTH = 9
"""Mistral's chat templates refuse ids of another length."""

_NAMED = re.compile(r"\s*([\w.:/-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*")
_LISTED = re.compile(r"\s*\[\s*")


def head(text: str) -> tuple[Head, str] | None:
    """See `Format.head`; both ways of writing are read."""
    if not text.strip():
        return Head.CALL, ""
    if _LISTED.fullmatch(text):
        return Head.CALLS, ""
    named = _NAMED.fullmatch(text)
    return None if named is None else (Head.ARGUMENTS, named[1])


def call_id() -> str:
    """A fresh id that the templates take."""
    return "".join(secrets.choice(ALPHABET) for _ in range(ID_LENGTH))


def adapted(id_: str) -> str:
    """The id itself if the templates take it, else one that depends on it alone."""
    if len(id_) == ID_LENGTH and set(id_) <= set(ALPHABET):
        return id_
    digest = hashlib.blake2b(id_.encode(), digest_size=ID_LENGTH).digest()
    return "".join(ALPHABET[byte % len(ALPHABET)] for byte in digest)


def _format(name: str, frame: Frame) -> Format:
    return Format(
        name=name,
        opening=OPENING,
        closing="",
        markers=(OPENING, ARGS, CALL_ID),
        frame=frame,
        head=head,
        makes_id=call_id,
        adapts_id=adapted,
    )


MISTRAL = _format(
    "mistral",
    Frame(
        start=f"{OPENING}[",
        before_name='{"name": "',
        after_name='", "arguments": ',
        end="}",
        separator=", ",
        finish="]",
    ),
)
MISTRAL_ARGS = _format("mistral-args", Frame(before_name=OPENING, after_name=ARGS, end="", separator=""))
