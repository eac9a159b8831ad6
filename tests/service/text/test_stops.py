"""Stop strings against the definition: cut before the first one that is complete, wherever the text was split."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from service.text.stops import StopStrings

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
