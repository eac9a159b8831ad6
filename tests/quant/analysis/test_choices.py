from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from quant.analysis.choices import ChoiceQuality, Continuation, Question, compare, encode, pick, picks, read_questions
from quant.errors import InvalidQuestions, NotFinite
from tests.support.tokenizers import byte_level_backend

VOCAB = 7
GOOD = {"question": "Two and two make", "choices": ["four", "five"], "answer": 0}


class FakeModel:
    """Logits that depend on all tokens so far, and a count of the passes."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.table = torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.dtype = dtype
        self.num_passes = 0

    def __call__(self, ids: Tensor) -> Tensor:
        self.num_passes += 1
        return self.table[ids].cumsum(0).to(self.dtype)

    def score(self, continuation: Continuation) -> float:
        """By definition: the sum of log p(token | those before) over the choice's tokens, per byte."""
        total = 0.0
        for t in range(continuation.start, len(continuation.ids)):
            state = sum((self.table[i] for i in continuation.ids[:t]), torch.zeros(VOCAB, dtype=torch.float64))
            total += math.log(math.exp(state[continuation.ids[t]]) / sum(math.exp(v) for v in state))
        return total / continuation.num_bytes


def questions() -> Iterator[list[Continuation]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        start = int(torch.randint(1, 4, (1,), generator=generator))
        prompt = torch.randint(VOCAB, (start,), generator=generator).tolist()
        lengths = torch.randint(1, 5, (3,), generator=generator).tolist()
        yield [
            Continuation((*prompt, *torch.randint(VOCAB, (n,), generator=generator).tolist()), start, 3 * n - i)
            for i, n in enumerate(lengths)
        ]


def test_the_likeliest_choice_per_byte_is_picked() -> None:
    model = FakeModel()
    asked, seen = list(questions()), []
    expected = [max(range(3), key=lambda i: model.score(choices[i])) for choices in asked]
    assert picks(model, asked, lambda done, total: seen.append((done, total))) == expected
    assert len(set(expected)) == 3
    assert seen[-1] == (40, 40)


def test_length_is_no_handicap() -> None:
    """Uniform logits: every token costs log V, so only the bytes that share the cost decide."""

    def uniform(ids: Tensor) -> Tensor:
        return torch.zeros(len(ids), VOCAB)

    short, long = Continuation((0, 1), 1, 1), Continuation((0, 1, 2), 1, 4)
    assert pick(uniform, [short, long]) == 1
    assert pick(uniform, [short, short]) == 0


def test_choices_of_one_token_take_one_pass() -> None:
    model = FakeModel()
    pick(model, [Continuation((3, 4, i), 2, 1) for i in range(4)])
    assert model.num_passes == 1
    pick(model, [Continuation((3, 4, i, 1), 2, 1) for i in range(4)])
    assert model.num_passes == 5


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(3, VOCAB), ValueError, r"logits \[3, 7\] for 1 tokens; expected \[L, V\]"),
        (torch.zeros(VOCAB), ValueError, r"logits \[7\] for 1 tokens"),
        (torch.full((1, VOCAB), math.nan), NotFinite, "logits of 1 tokens hold NaN or infinity"),
    ],
)
def test_logits_of_no_use_are_refused(logits: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pick(lambda ids: logits, [Continuation((0, 1), 1, 1)])


def test_shares() -> None:
    assert compare([0, 1, 2, 3], [0, 1, 0, 0], [0, 0, 2, 3]) == ChoiceQuality(0.5, 0.75, 4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_backend()


def test_a_choice_begins_behind_the_question(tokenizer: Tokenizer) -> None:
    found = encode(tokenizer, Question("hello  ", ("world", "fox é"), 0), 100)
    assert [tokenizer.decode(list(c.ids[c.start :])) for c in found] == [" world", " fox é"]
    assert [tokenizer.decode(list(c.ids[: c.start])) for c in found] == ["hello", "hello"]
    assert [c.num_bytes for c in found] == [5, 6]


def test_a_question_beyond_the_context_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidQuestions, match=r"takes \d+ tokens with choice 'world', more than 2; shorten it"):
        encode(tokenizer, Question("hello naïve", ("world", "fox"), 0), 2)


def test_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"answer": 1, "question": "né"}) + "\n")
    choices = ("four", "five")
    assert read_questions(path) == [Question("Two and two make", choices, 0), Question("né", choices, 1)]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: it holds list; give an object of question, choices and answer"),
        ("{}", "line 2: it holds nothing"),
        (json.dumps({"question": "a", "choices": ["b", "c"]}), "line 2: it holds choices, question; give"),
        (json.dumps(GOOD | {"hint": 1}), "it holds answer, choices, hint, question"),
        (json.dumps(GOOD | {"question": " "}), "question = ' ' must be a text that is not blank"),
        (json.dumps(GOOD | {"question": 1}), "question = 1 must be"),
        (json.dumps(GOOD | {"choices": ["a"]}), r"choices = \['a'\] must be 2 texts or more"),
        (json.dumps(GOOD | {"choices": ["a", ""]}), "none of them blank"),
        (json.dumps(GOOD | {"choices": "ab"}), "choices = 'ab' must be"),
        (json.dumps(GOOD | {"choices": ["a", "a"]}), "names a choice twice"),
        (json.dumps(GOOD | {"answer": 2}), "answer = 2 must be the index of a choice, 0 to 1"),
        (json.dumps(GOOD | {"answer": -1}), "answer = -1"),
        (json.dumps(GOOD | {"answer": True}), "answer = True"),
        (json.dumps(GOOD | {"answer": "a"}), "answer = 'a'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(InvalidQuestions, match=fault) as info:
        read_questions(path)
    assert f"{path}, line 2: " in str(info.value)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidQuestions, match="empty holds no question; give one JSON object a line"):
        read_questions(tmp_path / "empty")
    for name in ("latin", "none"):
        with pytest.raises(InvalidQuestions, match=f"{name} cannot be read"):
            read_questions(tmp_path / name)
