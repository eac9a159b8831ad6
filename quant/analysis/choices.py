"""Multiple choice without generation: the answer is the choice whose text is likeliest after the question."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from quant.analysis.perplexity import LogitsOf
from quant.convert.calibration import plain_ids, prompt_lead
from quant.errors import InvalidQuestions, NotFinite

MIN_CHOICES = 2


@dataclass(frozen=True, slots=True)
class Question:
    """A text, its possible continuations, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """Token ids of a question and one of its choices, which begins at `start`.

    num_bytes: of the choice as UTF-8.
    """

    ids: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ChoiceQuality:
    """accuracy: share of questions answered right; agreement: share answered like the baseline. Both 0..1."""

    accuracy: float
    agreement: float
    num_questions: int


def read_questions(path: Path) -> list[Question]:
    """Questions of a file of JSON lines, each {"question": text, "choices": [text, text, ...], "answer": index}.

    Empty lines are skipped.

    Raises:
        InvalidQuestions: the file cannot be read, has no question, or a line is malformed; the message names file,
            line and fault.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidQuestions(f"the questions {path} cannot be read: {error}") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                questions.append(_question(line))
            except InvalidQuestions as error:
                raise InvalidQuestions(f"{path}, line {number}: {error}") from error
    if not questions:
        raise InvalidQuestions(
            f"{path} holds no question; give one JSON object a line, with question, choices and answer"
        )
    return questions


def _question(line: str) -> Question:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidQuestions(f"not JSON ({error}); give one object a line") from error
    fields = entry.keys() if isinstance(entry, dict) else {type(entry).__name__}
    if fields != {"question", "choices", "answer"}:
        told = ", ".join(sorted(fields)) or "nothing"
        raise InvalidQuestions(f"it holds {told}; give an object of question, choices and answer")
    text, choices, answer = entry["question"], entry["choices"], entry["answer"]
    if not _is_text(text):
        raise InvalidQuestions(f"question = {text!r} must be a text that is not blank")
    if not isinstance(choices, list) or len(choices) < MIN_CHOICES or not all(map(_is_text, choices)):
        raise InvalidQuestions(f"choices = {choices!r} must be {MIN_CHOICES} texts or more, none of them blank")
    if len(set(choices)) < len(choices):
        raise InvalidQuestions(f"choices = {choices!r} names a choice twice")
    # In Python bool is an int, so true would count as 1.
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InvalidQuestions(f"answer = {answer!r} must be the index of a choice, 0 to {len(choices) - 1}")
    return Question(text, tuple(choices), answer)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def encode(tokenizer: Tokenizer, question: Question, max_len: int) -> list[Continuation]:
    """The question, a space and each choice, tokenized as one text, after what prompts begin with (BOS).

    A choice begins where the tokens first differ from those of the question alone.

    Args:
        max_len: the longest text in tokens.

    Raises:
        InvalidQuestions: a text is longer, a choice adds no token, or no token precedes it.
    """
    lead, text = prompt_lead(tokenizer), question.question.rstrip()

    def ids_of(words: str) -> tuple[int, ...]:
        return *lead, *plain_ids(tokenizer, words)

    alone, found = ids_of(text), []
    for choice in question.choices:
        ids = ids_of(f"{text} {choice}")
        start = _common_length(alone, ids)
        if not 0 < start < len(ids):
            raise InvalidQuestions(
                f"question {text!r} with choice {choice!r}: {start} of {len(ids)} tokens are the question's; "
                "at least one must be, and at least one the choice's"
            )
        if len(ids) > max_len:
            raise InvalidQuestions(
                f"question {text[:60]!r}... takes {len(ids)} tokens with choice {choice[:60]!r}, more than {max_len}; "
                "shorten it, or allow longer windows"
            )
        found.append(Continuation(ids, start, len(choice.encode())))
    return found


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def pick(logits_of: LogitsOf, continuations: Sequence[Continuation]) -> int:
    """The index of the likeliest choice, the first of several that are equal.

    score = (sum_{t >= start} log p(id_t | id_0..t-1)) / num_bytes

    The division by the bytes of its text makes long choices and different tokenizers comparable. Choices of one token
    take one pass, since the tokens before them are the same.

    Raises:
        ValueError: logits are not [L, V].
        NotFinite: logits hold NaN or infinity.
    """
    rows: dict[tuple[tuple[int, ...], int], Tensor] = {}
    scores = []
    for continuation in continuations:
        key = continuation.ids[:-1], continuation.start
        if key not in rows:
            rows[key] = _log_probs(logits_of, *key)
        targets = torch.tensor(continuation.ids[continuation.start :])
        scores.append(rows[key].gather(1, targets[:, None]).sum().item() / continuation.num_bytes)
    return scores.index(max(scores))


def _log_probs(logits_of: LogitsOf, ids: Sequence[int], start: int) -> Tensor:
    """Log-probabilities of the tokens from `start` on, float64 on the CPU: row t of the logits predicts token t + 1."""
    logits = logits_of(torch.tensor(ids))
    if logits.ndim != 2 or logits.shape[0] != len(ids):
        raise ValueError(f"logits {list(logits.shape)} for {len(ids)} tokens; expected [L, V]")
    if not bool(logits.isfinite().all()):
        raise NotFinite(f"logits of {len(ids)} tokens hold NaN or infinity")
    return logits[start - 1 :].float().log_softmax(-1).double().cpu()


@torch.inference_mode()
def picks(
    logits_of: LogitsOf,
    questions: Sequence[Sequence[Continuation]],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """The result of `pick` for each question. on_progress: called after each with (done, total)."""
    found = []
    for continuations in questions:
        found.append(pick(logits_of, continuations))
        if on_progress is not None:
            on_progress(len(found), len(questions))
    return found


def compare(picked: Sequence[int], answers: Sequence[int], baseline: Sequence[int]) -> ChoiceQuality:
    """Shares of questions on which the picks equal the answers, and the baseline's picks; at least one question."""
    num_right = sum(a == b for a, b in zip(picked, answers, strict=True))
    num_same = sum(a == b for a, b in zip(picked, baseline, strict=True))
    return ChoiceQuality(num_right / len(picked), num_same / len(picked), len(picked))
