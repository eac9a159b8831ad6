"""Stop strings against the definition: cut before the first one that is complete, wherever the text was split."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.text.stops import Ending, StopStrings
from service.text.tokenizer import Tokenizer
from tests.support.tokenizers import byte_level_backend

SHORT = st.text(alphabet="ab", max_size=24)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: read character by character, stop at the first end of a stop string, drop the longest there."""
    for end in range(len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(place, len(text)) for place in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


@given(SHORT, STOPS, st.lists(st.integers(0, 24)))
@example("abab", ["bab", "aba"], [1])
@example("abc", ["abc", "b"], [])
def test_same_cut_as_the_whole_text_however_split(text: str, stops: list[str], cuts: list[int]) -> None:
    search = StopStrings(stops)
    out = ""
    for piece in pieces(text, cuts):
        out += search.push(piece)
        assert text.startswith(out)
        if search.found is not None:
            break
    out += search.flush()
    assert (out, search.found is not None) == cut(text, stops)


@given(SHORT, STOPS)
def test_what_is_held_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    search = StopStrings(stops)
    out = search.push(text)
    if search.found is None:
        held = text[len(out) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
        longer = [text[-n:] for n in range(len(held) + 1, len(text) + 1)]
        assert not any(stop.startswith(part) for part in longer for stop in stops)


def test_nothing_comes_after_the_stop_string() -> None:
    search = StopStrings(["ab"])
    assert search.push("xaby") == "x"
    assert search.found == "ab"
    assert search.push("more") == ""
    assert search.flush() == ""


def test_without_stop_strings_everything_passes() -> None:
    search = StopStrings([])
    assert search.push("text") == "text"
    assert search.flush() == ""


@given(SHORT, STOPS, st.lists(st.integers(0, 24)))
def test_a_stop_string_can_be_kept(text: str, stops: list[str], cuts: list[int]) -> None:
    search = StopStrings(stops, is_included=True)
    out = ""
    for piece in pieces(text, cuts):
        out += search.push(piece)
        if search.found is not None:
            break
    out += search.flush()
    before, is_stopped = cut(text, stops)
    assert (out, search.found is not None) == (before + (search.found or ""), is_stopped)


TOKENIZER = Tokenizer(byte_level_backend(), frozenset({0}))
END, USER = "<|end|>", "<|user|>"
END_ID, USER_ID = (TOKENIZER.special_ids[name] for name in (END, USER))
HELLO = TOKENIZER.encode("hello world")[1:]
THERE = TOKENIZER.encode(" there")[1:]


def said(ending: Ending, ids: Sequence[int], size: int) -> tuple[str, int, bool]:
    """The text, the tokens taken, and whether a stop string ended it, with size tokens at a time."""
    output = ending.output(TOKENIZER)
    text, num_taken = "", 0
    for start in range(0, len(ids), size):
        new, taken = output.take(ids[start : start + size])
        text, num_taken = text + new, num_taken + taken
        if output.is_stopped:
            break
    return text + output.flush(), num_taken, output.is_stopped


@pytest.mark.parametrize("size", [1, 2, 99])
@pytest.mark.parametrize(
    ("ending", "ids", "text", "num_taken"),
    [
        (Ending(), [*HELLO, USER_ID, *THERE, END_ID], "hello world there", None),
        (Ending(shown=frozenset({USER})), [*HELLO, USER_ID, *THERE, END_ID], "hello world<|user|> there", None),
        (Ending((USER,), shown=frozenset({USER})), [*HELLO, USER_ID, *THERE], "hello world", len(HELLO) + 1),
        (
            Ending((USER,), is_included=True, shown=frozenset({USER})),
            [*HELLO, USER_ID, *THERE],
            "hello world<|user|>",
            len(HELLO) + 1,
        ),
        # The end token ends the answer by itself, and what a longer stop string would have held back is not shown.
        (Ending((END + "\n",), frozenset({END_ID}), shown=frozenset({END})), [*HELLO, END_ID], "hello world", None),
        (
            Ending((END,), frozenset({END_ID}), is_included=True, shown=frozenset({END})),
            [*HELLO, END_ID],
            "hello world<|end|>",
            None,
        ),
        (Ending((), frozenset({THERE[0]})), [*HELLO, THERE[0]], "hello world", None),
        (Ending((), frozenset({THERE[-1]}), is_included=True), [*HELLO, *THERE], "hello world there", None),
        (Ending(("hello", "there"), min_tokens=len(HELLO)), [*HELLO, *THERE], "hello world ", None),
    ],
)
def test_the_ways_in_which_an_answer_ends(
    ending: Ending, ids: list[int], text: str, num_taken: int | None, size: int
) -> None:
    found, taken, is_stopped = said(ending, ids, size)
    assert (found, taken) == (text, len(ids) if num_taken is None else num_taken)
    assert is_stopped == any(stop in searched(ending, ids) for stop in ending.stops)


def searched(ending: Ending, ids: Sequence[int]) -> str:
    """What is searched for stop strings."""
    decoder = TOKENIZER.detokenizer((), ending.shown)
    silent = frozenset() if ending.is_included else ending.token_ids
    return "".join(decoder.push(i) for i in ids[ending.min_tokens :] if i not in silent) + decoder.flush()
