"""Text that comes token by token is the text of all tokens: whatever the tokenizer, however characters are cut."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import Strip
from tokenizers.models import WordLevel

from service.errors import EngineFailed
from service.settings import Settings
from service.text.detokenizer import Detokenizer
from service.text.tokenizer import Tokenizer
from tests.support.tokenizers import byte_fallback_backend, byte_level_backend

DEMO = "SmolLM2-135M-Instruct"
FAMILY, FLAG, KEYCAP = "👩‍👩‍👧‍👦", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "1️⃣"
PIECES = [
    FAMILY,
    FLAG,
    KEYCAP,
    "👍🏽",
    "é",
    "e\u0301",
    "日本",
    "नि",
    " ",
    "  ",
    "\n",
    "\t",
    "\u00a0",
    "a",
    "the",
    " the",
    "don't",
    "�",
]
TEXTS = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=12
).map("".join)


def _demo() -> Tokenizer:
    folder = Path(Settings(_env_file=None).cache_dir) / "models" / DEMO
    if not folder.is_dir():
        pytest.skip(f"{DEMO} is not in the cache")
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback", DEMO])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == DEMO:
        return _demo()
    backend = byte_level_backend() if request.param == "byte-level" else byte_fallback_backend()
    return Tokenizer(backend, frozenset())


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    # Marks of special tokens would be read as such.
    return tokenizer._backend.encode(re.sub("[<|>]", "", text), add_special_tokens=False).ids


def whole(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer._backend.decode(ids, skip_special_tokens=True)


def pieces(tokenizer: Tokenizer, ids: list[int], context: Sequence[int] = ()) -> list[str]:
    decoder = tokenizer.detokenizer(context)
    return [*map(decoder.push, ids), decoder.flush()]


@given(TEXTS)
@example(f" {FAMILY}{FLAG} {KEYCAP}")
@settings(deadline=None)
def test_pieces_add_up_and_are_never_taken_back(tokenizer: Tokenizer, text: str) -> None:
    ids = ids_of(tokenizer, text)
    expected, said = whole(tokenizer, ids), ""
    for piece in pieces(tokenizer, ids):
        said += piece
        assert expected.startswith(said)
    assert said == expected


@given(TEXTS, st.integers(0, 40))
@example("hello world", 1)
@example("hello  world", 2)
@example(f"�{FAMILY}", 14)
@settings(deadline=None)
def test_an_answer_continues_its_prompt(tokenizer: Tokenizer, text: str, num_prompt: int) -> None:
    """Prompt and answer together read as one text: no space is lost or gained where they meet."""
    ids = ids_of(tokenizer, text)
    prompt, answer = ids[:num_prompt], ids[num_prompt:]
    begun = whole(tokenizer, prompt)
    if begun.endswith("�") or not whole(tokenizer, ids).startswith(begun):
        return  # cut inside a character
    assert begun + "".join(pieces(tokenizer, answer, prompt)) == whole(tokenizer, ids)


@given(st.data())
@settings(deadline=None)
def test_any_tokens_of_a_byte_level_vocabulary_add_up(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Also those that are no text. (A byte-fallback decoder takes back what it said of them.)"""
    if not tokenizer._names._is_byte_level:
        return
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=50))
    assert "".join(pieces(tokenizer, ids)) == whole(tokenizer, ids)


@given(st.data())
@settings(deadline=None)
def test_tokens_that_are_text_by_themselves_are_said_as_if_all_were_decoded(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """Whatever stands before them, parts of characters too: the same pieces as without texts that are remembered."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    context = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    decoder = Detokenizer(tokenizer._backend, context)
    assert pieces(tokenizer, ids, context) == [*map(decoder.push, ids), decoder.flush()]


@given(TEXTS)
@settings(deadline=None)
def test_bytes_of_the_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = ids_of(tokenizer, text)
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
    # The first Llamas begin every text with a space, and decode without it.
    assert (joined if tokenizer._names._is_byte_level else joined.removeprefix(" ")) == whole(tokenizer, ids)


def test_names_of_tokens(tokenizer: Tokenizer) -> None:
    names = [tokenizer.token_text(token_id) for token_id in ids_of(tokenizer, " a\u0080")]
    assert all(re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+|[^�]+", name) for name in names)
    assert any(name.startswith("bytes:") for name in names) or "\u0080" in "".join(names)
    unknown = tokenizer.vocab_size + 7
    assert (tokenizer.token_text(unknown), tokenizer.token_bytes(unknown)) == (f"token_id:{unknown}", b"")


def test_special_tokens_are_named() -> None:
    backend = byte_level_backend()
    tokenizer = Tokenizer(backend, frozenset())
    end = backend.token_to_id("<|end|>")
    assert end is not None
    assert (tokenizer.token_text(end), tokenizer.token_bytes(end)) == ("<|end|>", b"<|end|>")


def test_a_first_llama_keeps_the_space_of_a_continuation_alone() -> None:
    tokenizer = Tokenizer(byte_fallback_backend(), frozenset())
    prompt, answer = ids_of(tokenizer, "hello"), ids_of(tokenizer, "hello world")[len(ids_of(tokenizer, "hello")) :]
    assert "".join(pieces(tokenizer, answer, prompt)) == " world"
    assert "".join(pieces(tokenizer, answer)) == "world"


def test_a_decoder_that_panics_is_an_error_of_one_request() -> None:
    """A panic of the library is no Exception."""
    backend = Backend(WordLevel({"a": 0, "x": 1}, unk_token="a"))
    backend.decoder = Strip("x", 1, 1)
    decoder = Detokenizer(backend)
    assert decoder.push(0) == "a"
    with pytest.raises(EngineFailed, match="fails to turn tokens into text: slice index"):
        decoder.push(1)
