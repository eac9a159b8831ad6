"""Checks regular expressions and grammars that clients send, as far as that takes no compiler."""

from __future__ import annotations

import re
from collections.abc import Mapping

from service.engine.grammar import REGEX
from service.errors import InvalidRequest
from service.text.json.keywords import PARAM

MAX_REGEX_CHARS = 4096
MAX_GRAMMAR_BYTES = 1 << 16

_LARK = re.compile(r"^\s*[?!]?[A-Za-z_]\w*(?:\.-?\d+)?\s*:(?!:=)", re.MULTILINE)
_MACRO = re.compile(r"\b(TagDispatch|TokenTagDispatch|Token|ExcludeToken)\s*\(")


def regex_rules(pattern: str) -> str:
    """The rules, as for `Engine.compile`, of an answer that a regular expression matches as a whole.

    Raises:
        InvalidRequest: it is longer than MAX_REGEX_CHARS, or has an anchor inside, which the compiler would ignore.
    """
    if len(pattern) > MAX_REGEX_CHARS:
        raise InvalidRequest(
            f"the regular expression has {len(pattern)} characters; at most {MAX_REGEX_CHARS} are served: shorten it, "
            "or send a grammar",
            PARAM,
        )
    inner = _bare(pattern, {"[": "]"})
    if "^" in inner[1:] or "$" in inner[:-1]:
        raise InvalidRequest(
            "the regular expression has `^` or `$` inside; it is matched with the whole answer, so leave them out, or "
            "write `\\^` or `\\$` for the characters",
            PARAM,
        )
    return REGEX + pattern


def grammar_rules(text: str) -> str:
    """The rules, as for `Engine.compile`, of a client's grammar.

    Raises:
        InvalidRequest: it is longer than MAX_GRAMMAR_BYTES, written for Lark, or names tokens.
    """
    size = len(text.encode())
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"the grammar has {size} bytes; at most {MAX_GRAMMAR_BYTES} are served: shorten it", PARAM)
    bare = _bare(text, {'"': '"', "[": "]", "#": "\n"})
    if "::=" not in bare:
        remedy = "; this one seems to be written for Lark" if _LARK.search(bare) else ""
        raise InvalidRequest(f"the grammar has no rule `root ::= ...`: write it in EBNF (GBNF){remedy}", PARAM)
    macro = _MACRO.search(bare)
    if macro is not None:
        raise InvalidRequest(f"the grammar uses {macro[1]}, which is not served: describe the text itself", PARAM)
    return text


def _bare(text: str, quotes: Mapping[str, str]) -> str:
    """A text with a space for each escaped character and each quotation. quotes: opening and closing characters.

    Not by a regular expression, which would look for the end of each quotation anew.
    """
    bare: list[str] = []
    end, is_escaped = "", False
    for char in text:
        if is_escaped:
            is_escaped = False
        elif char == "\\" and end != "\n":
            is_escaped = True
        elif end:
            end = "" if char == end else end
            continue
        else:
            end = quotes.get(char, "")
            bare.append(" " if end else char)
            continue
        if is_escaped and not end:
            bare.append(" ")
    return "".join(bare)
