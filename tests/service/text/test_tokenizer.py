"""The tokenizer over small real ones: chat template, end tokens, decoding token by token."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequest, UnsupportedModel
from service.text.tokenizer import Tokenizer
from tests.support.tokenizers import SPECIAL, byte_fallback_backend, byte_level_backend, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    files: dict[str, Any] = {
        "config": {"model_type": "llama", "eos_token_id": 3},
        "generation_config": {"eos_token_id": [2, 3]},
    }
    return save(tmp_path_factory.mktemp("model"), backend, **files)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module", params=[byte_level_backend, byte_fallback_backend])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.param(), frozenset())


def decoded(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    decoder = tokenizer.detokenizer()
    return [decoder.push(token_id) for token_id in ids] + [decoder.flush()]


def test_encode_adds_the_prompts_special_tokens_and_neither_cuts_nor_pads(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world, hello tokens")
    assert ids[0] == 1
    assert "".join(decoded(tokenizer, ids)) == "hello world, hello tokens"
    assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size


def test_end_tokens_come_from_all_three_places(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == {0, 2, 3}


def test_chat_template_ends_where_the_answer_begins(tokenizer: Tokenizer) -> None:
    ids = tokenizer.apply_chat([{"role": "user", "content": "hello"}])
    assert ids[0] == SPECIAL.index("<|user|>")
    assert ids[-2:] == [SPECIAL.index("<|end|>"), SPECIAL.index("<|assistant|>")]
    assert "".join(decoded(tokenizer, ids)) == "hello"


def test_messages_that_the_template_refuses(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(InvalidRequest, match="system must come first"):
        tokenizer.apply_chat(messages)


def test_no_chat_template(tmp_path: Path) -> None:
    bare = Tokenizer.from_folder(save(tmp_path, byte_level_backend(), None, config={"model_type": "llama"}))
    assert bare.eos_ids == {0}
    with pytest.raises(InvalidRequest, match="send `prompt` instead"):
        bare.apply_chat([{"role": "user", "content": "a"}])


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedModel, match="no usable tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["😀", "a😀b日本語", "naïve café\n", " leading and trailing ", "👩‍👩‍👧 family"])
def test_no_piece_ends_inside_a_character(any_tokenizer: Tokenizer, text: str) -> None:
    ids = [token_id for byte in text.encode() for token_id in _byte_ids(any_tokenizer, byte)]
    out = decoded(any_tokenizer, ids)
    assert not any("�" in piece for piece in out)
    assert "".join(out).strip() == text.strip()
    assert out[-1] == ""


def _byte_ids(tokenizer: Tokenizer, byte: int) -> list[int]:
    vocab = tokenizer._backend.get_vocab()
    if f"<0x{byte:02X}>" in vocab:
        return [vocab[f"<0x{byte:02X}>"]]
    # Byte-level BPE writes each byte as a printable character of its own.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [other for other in range(256) if other not in printable]
    return [vocab[chr(byte) if byte in printable else chr(256 + shifted.index(byte))]]


def test_an_incomplete_character_comes_as_replacement_at_the_end(any_tokenizer: Tokenizer) -> None:
    ids = [token_id for byte in "a😀".encode()[:-1] for token_id in _byte_ids(any_tokenizer, byte)]
    out = decoded(any_tokenizer, ids)
    assert "�" not in "".join(out[:-1])
    assert set(out[-1]) == {"�"}


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello")
    assert "".join(decoded(tokenizer, [2, *ids, 0, 4])) == "hello"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    plain = text.translate({ord(char): None for char in "<|>"})
    assert "".join(decoded(tokenizer, tokenizer.encode(plain))) == plain


def test_random_tokens_add_up_to_the_whole_decode(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(30))]
        whole = tokenizer._backend.decode(ids, skip_special_tokens=True)
        assert "".join(decoded(tokenizer, ids)) == whole


def test_bytes_that_are_no_text_raise_nothing_and_hold_nothing_back(any_tokenizer: Tokenizer) -> None:
    """A byte-fallback tokenizer takes back what it decoded before invalid bytes; what was sent stays sent."""
    rng = random.Random(0)
    words = any_tokenizer.encode("hello world")
    for _ in range(50):
        noise = [i for _ in range(rng.randrange(100)) for i in _byte_ids(any_tokenizer, rng.randrange(256))]
        out = decoded(any_tokenizer, [*words, *noise, *words])
        assert "".join(out).startswith("hello world")
        assert "".join(out).endswith("hello world")
    endless = _byte_ids(any_tokenizer, 0x80) * 1000
    assert max(len(piece) for piece in decoded(any_tokenizer, endless)) <= 64


def test_a_text_does_not_get_a_second_beginning(tokenizer: Tokenizer) -> None:
    begin = SPECIAL.index("<|bos|>")
    assert tokenizer.encode("") == [begin]
    assert tokenizer.encode("<|bos|>") == [begin]
    assert tokenizer.encode("<|bos|>hello") == tokenizer.encode("hello")
    assert tokenizer.encode("<|bos|><|bos|>hello")[:3] == [begin, begin, *tokenizer.encode("hello")[1:2]]
    assert tokenizer.encode("<|user|>hello")[:2] == [begin, SPECIAL.index("<|user|>")]


def test_a_tokenizer_without_beginning_adds_none() -> None:
    plain = Tokenizer(byte_fallback_backend(), frozenset())
    assert plain.encode("") == []
    assert plain.encode("he he") == plain._encode("he he", add_special_tokens=False)
