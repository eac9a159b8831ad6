"""What a client's regular expression or grammar is refused for before it is compiled."""

from __future__ import annotations

import re

import pytest

from service.errors import InvalidRequest
from service.text.grammars.given import MAX_GRAMMAR_BYTES, MAX_REGEX_CHARS, grammar_rules, regex_rules


@pytest.mark.parametrize("pattern", ["", "a", "^a$", r"\$\^", "[$^]+", "[^$]", r"a\\$", "^", "$"])
def test_expressions_that_match_the_whole_answer(pattern: str) -> None:
    assert regex_rules(pattern) == f"regex {pattern}"


@pytest.mark.parametrize("pattern", ["a$b", "a^b", "(^a)", "a|^b", "(a$)", r"[\]]$x", "^^a"])
def test_an_anchor_inside_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape("has `^` or `$` inside")):
        regex_rules(pattern)


def test_sizes() -> None:
    assert regex_rules("a" * MAX_REGEX_CHARS)
    with pytest.raises(InvalidRequest, match="4097 characters; at most 4096"):
        regex_rules("a" * (MAX_REGEX_CHARS + 1))
    head = "root ::= "
    assert grammar_rules(head + "a" * (MAX_GRAMMAR_BYTES - len(head)))
    with pytest.raises(InvalidRequest, match="65537 bytes; at most 65536"):
        grammar_rules(head + "a" * (MAX_GRAMMAR_BYTES - len(head) + 1))


@pytest.mark.parametrize(
    "text",
    [
        'root ::= "Token(5)"',
        "root ::= [Token(]",
        'root ::= "a" # TagDispatch(',
        'root ::= Tokens ("a")\nTokens ::= "b"',
    ],
)
def test_a_name_in_a_literal_is_no_macro(text: str) -> None:
    assert grammar_rules(text) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rule `root ::= ...`"),
        ("start: /a+/", "written for Lark"),
        ('?value: "a"\n', "written for Lark"),
        ('"::="', "no rule"),
        ('root ::= TagDispatch(("a", b))', "uses TagDispatch"),
        ("root ::= Token (5)", "uses Token"),
    ],
)
def test_what_is_no_grammar_of_a_client(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        grammar_rules(text)


def test_hostile_texts_are_checked_in_time() -> None:
    for text in ("[" * 4096, "\\" * 4095, "[\\" * 2000, "(" * 4096):
        regex_rules(text)
    for text in ('"' * 60_000, "[" * 60_000, '"\\' * 30_000, "#" * 60_000, "a:" * 30_000, "Token" * 10_000):
        with pytest.raises(InvalidRequest):
            grammar_rules(text)
