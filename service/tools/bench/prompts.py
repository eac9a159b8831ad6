"""What is sent: random prompts, conversations that share system prefixes, or the lines of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, Protocol

from service.errors import InvalidSettings

_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face level office door health person art war history party result change morning reason research girl"
)
WORDS = tuple(_TEXT.split())
"""Common English words, of about one token each in the vocabularies of large models."""


Parts = tuple[tuple[str, str | list[int]], ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, in parts of a role and its text or token ids; all parts are of one kind."""

    parts: Parts
    max_tokens: int
    is_conversation: bool = False

    @property
    def ids(self) -> list[int]:
        """All token ids; empty if it is text."""
        return [id_ for _, part in self.parts if not isinstance(part, str) for id_ in part]

    @property
    def text(self) -> str:
        return "\n".join(part for _, part in self.parts if isinstance(part, str))

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": role, "content": part} for role, part in self.parts if isinstance(part, str)]


class Material(Protocol):
    """What prompts are made of."""

    def make(self, num_tokens: int, rng: Random) -> str | list[int]: ...


@dataclass(frozen=True, slots=True)
class Ids:
    """Random token ids from low to high, both included."""

    low: int
    high: int

    def make(self, num_tokens: int, rng: Random) -> list[int]:
        return [rng.randint(self.low, self.high) for _ in range(num_tokens)]

    def __str__(self) -> str:
        return f"random token ids from {self.low} to {self.high}"


@dataclass(frozen=True, slots=True)
class Words:
    """Random words, as many as make about the tokens asked for.

    tokens_per_word, overhead_tokens: of the server, by two probes; overhead is what its template adds.
    """

    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0

    def make(self, num_tokens: int, rng: Random) -> str:
        num_words = max(1, round((num_tokens - self.overhead_tokens) / self.tokens_per_word))
        return " ".join(rng.choices(WORDS, k=num_words))

    def __str__(self) -> str:
        return f"text of random words, of {self.tokens_per_word:.2f} tokens each, so lengths are approximate"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts and answers, each drawn evenly from mean * (1 - spread) to mean * (1 + spread)."""

    input_len: int
    output_len: int
    spread: float = 0.0

    def draw(self, mean: int, rng: Random) -> int:
        return rng.randint(max(1, round(mean * (1 - self.spread))), max(1, round(mean * (1 + self.spread))))


def random_prompts(material: Material, lengths: Lengths, rng: Random) -> Iterator[Prompt]:
    """Prompts that share nothing."""
    while True:
        asked = material.make(lengths.draw(lengths.input_len, rng), rng)
        yield Prompt((("user", asked),), lengths.draw(lengths.output_len, rng))


@dataclass(frozen=True, slots=True)
class Prefixes:
    """How many system prefixes of how many tokens are shared, and how many turns a conversation has."""

    count: int
    tokens: int
    turns: int = 1


def prefix_prompts(material: Material, lengths: Lengths, prefixes: Prefixes, rng: Random) -> Iterator[Prompt]:
    """The turns of endless conversations, one open at a time for each prefix, each taking its turn after the others.

    A turn repeats all before it. The answers in it are drawn like the rest and are not the server's own, so that a turn
    can be sent at its time and waits for no answer.
    """
    shared = [material.make(prefixes.tokens, rng) for _ in range(prefixes.count)]
    said: list[list[tuple[str, str | list[int]]]] = [[] for _ in shared]
    while True:
        for _ in range(prefixes.turns):
            for prefix, turns in zip(shared, said, strict=True):
                turns.append(("user", material.make(lengths.draw(lengths.input_len, rng), rng)))
                num_output = lengths.draw(lengths.output_len, rng)
                yield Prompt((("system", prefix), *turns), num_output, is_conversation=True)
                turns.append(("assistant", material.make(num_output, rng)))
        for turns in said:
            turns.clear()


def dataset_prompts(lines: list[Prompt]) -> Iterator[Prompt]:
    """The lines in their order, from the first again after the last."""
    return cycle(lines)


def read_dataset(path: Path, output_len: int) -> list[Prompt]:
    """A JSON line each: {"prompt": text or token ids} or {"messages": [{"role", "content"}, ...]}, and "max_tokens" if
    it is not output_len.

    Raises:
        InvalidSettings: a line is none of these, named by its number, or there is none.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            prompts.append(_line(line, output_len, f"{path}, line {number}"))
    if not prompts:
        raise InvalidSettings(f"{path} has no line; write one JSON object a line: {_SHAPE}")
    return prompts


_SHAPE = (
    '{"prompt": "..." or [ids]} or {"messages": [{"role": "user", "content": "..."}]}, each with "max_tokens" if you '
    "like"
)


def _line(line: str, output_len: int, where: str) -> Prompt:
    try:
        found: Any = json.loads(line)
        max_tokens = int(found.get("max_tokens", output_len))
        if "messages" in found:
            parts: Parts = tuple((str(turn["role"]), str(turn["content"])) for turn in found["messages"])
        else:
            parts = (("user", _asked(found["prompt"])),)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InvalidSettings(f"{where} is not a request ({error!r}); write {_SHAPE}") from error
    if not parts or max_tokens < 1:
        raise InvalidSettings(f"{where} asks for nothing: messages must not be empty, and max_tokens be at least 1")
    return Prompt(parts, max_tokens, is_conversation="messages" in found)


def _asked(prompt: object) -> str | list[int]:
    return [int(id_) for id_ in prompt] if isinstance(prompt, list) else str(prompt)
