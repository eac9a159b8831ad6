"""Reasoning in answers: where it begins and ends, and that the way an answer is split changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.text.reasoning import ReasoningParser


def read(pieces: Sequence[str], *, is_open: bool = False) -> tuple[str, str]:
    parser = ReasoningParser(is_open=is_open)
    parts = [parser.push(piece) for piece in pieces] + [parser.flush()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("<think>\nHm, so.\n</think>\n\nYes.", False, "Hm, so.", "Yes."),
        ("\n<think>a</think>b", False, "a", "b"),
        ("<think>\n\n</think>\n\nYes. ", False, "", "Yes. "),
        ("Hm, so.\n</think>\n\nYes.", True, "Hm, so.", "Yes."),
        ("\nHm,\n\nso", True, "Hm,\n\nso", ""),
        ("<think>a < b </thin", False, "a < b </thin", ""),
        ("Yes.", False, "", "Yes."),
        (" Yes <think>no</think>", False, "", " Yes <think>no</think>"),
        ("<thin", False, "", "<thin"),
        ("<thing>", False, "", "<thing>"),
        ("<think>a</think>b</think>c<think>", False, "a", "b</think>c<think>"),
        ("", False, "", ""),
        ("", True, "", ""),
        (" \n", False, "", " \n"),
    ],
)
def test_an_answer_is_divided(text: str, is_open: bool, reasoning: str, content: str) -> None:
    assert read([text], is_open=is_open) == (reasoning, content)
    assert read(text, is_open=is_open) == (reasoning, content)


FRAGMENTS = st.sampled_from(["<think>", "</think>", "<", "/think>", " ", "\n", "a", "b c"])


@settings(max_examples=300)
@given(st.lists(FRAGMENTS, max_size=10), st.booleans(), st.data())
def test_the_split_of_an_answer_changes_nothing(fragments: list[str], is_open: bool, data: st.DataObject) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces, is_open=is_open) == read([text], is_open=is_open) == read(text, is_open=is_open)


def test_reasoning_is_passed_on_as_it_comes() -> None:
    parser = ReasoningParser(is_open=True)
    assert parser.push("Hm") == ("Hm", "")
    assert parser.push(" so </") == (" so", "")
    assert parser.push("b>") == (" </b>", "")
    assert parser.push("</think> Yes") == ("", "Yes")
    assert parser.push(" sir") == ("", " sir")
