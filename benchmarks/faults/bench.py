"""What the cases share: the model's folders, the answers of a quiet run, and servers to be had."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.case import Answers
from benchmarks.faults.clients import Kind, Question, Seen, ask
from benchmarks.faults.model import float_model, int8_model
from benchmarks.faults.server import OTTAVA, Server

VARIANTS = ("w8a8", "fp16")
MAX_MODEL_LEN = 8192
NUM_ROWS = 64
"""Most requests of a step."""

LONG_TOKENS = 300
"""Of the longest answer whose tokens are compared."""

PROMPTS = tuple(
    f"{opening} {rest}"
    for opening in ("Once upon a time", "The capital of France", "Water boils", "def add(a, b):")
    for rest in ("is", "there was a village", "at one hundred degrees, and so on:")
)


@dataclass(slots=True)
class Bench:
    """The model under test, made once.

    folder: scratch, for models, caches and logs.
    answers: see `Answers`; set by `ask_in_quiet`.
    """

    folder: Path
    model_name: str
    float_folder: Path
    int8_folder: Path
    answers: Answers = field(default_factory=dict)
    num_servers: int = 0

    @classmethod
    def make(cls, folder: Path, model_name: str) -> Bench:
        """Make the model and quantize it."""
        source = float_model(model_name, folder / model_name)
        return cls(folder, model_name, source, int8_model(source, folder / f"{model_name}-w8a8"))

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one variant, in float32."""
        config = json.loads((self.float_folder / "config.json").read_text(encoding="utf-8"))
        head_size = config["hidden_size"] // config["num_attention_heads"]
        return int(2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_size)

    def serve(
        self,
        *arguments: str,
        models: Sequence[str] | None = None,
        num_kv_tokens: int = 64 << 10,
        program: Sequence[str] = OTTAVA,
    ) -> Server:
        """A server of both variants, on its way up. models: what to serve instead, as `ottava serve` takes it."""
        self.num_servers += 1
        served = models or (str(self.int8_folder), "--baseline", str(self.float_folder))
        fixed = (
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--kv-cache-bytes",
            str(num_kv_tokens * self.kv_bytes_per_token),
            "--max-num-requests",
            str(NUM_ROWS),
        )
        return Server(self.folder / f"server-{self.num_servers}.log", (*served, *fixed, *arguments), program)

    async def ask_in_quiet(self) -> None:
        """Ask every prompt of every variant alone: the answers that all others are held against."""
        answers = {}
        with self.serve() as server:
            await server.checked()
            for variant in VARIANTS:
                for prompt in PROMPTS:
                    seen = await ask(server.port, Question(prompt, LONG_TOKENS, variant))
                    if seen.kind is not Kind.ANSWERED:
                        raise RuntimeError(f"the quiet run was not answered: {seen} {seen.message}")
                    answers[variant, prompt] = seen.token_ids
        self.answers = answers


def questions(count: int, max_tokens: int, variants: Sequence[str] = VARIANTS) -> list[Question]:
    """Requests that go round the prompts, and with each round to another variant, or from streams to whole answers."""
    rounds = [(stream, variant) for stream in (True, False) for variant in variants]
    return [
        Question(PROMPTS[place % len(PROMPTS)], max_tokens, variant, stream)
        for place in range(count)
        for stream, variant in [rounds[place // len(PROMPTS) % len(rounds)]]
    ]


async def ask_all(port: int, asked: Iterable[Question]) -> list[tuple[Question, Seen]]:
    """All of them at once."""

    async def one(question: Question) -> tuple[Question, Seen]:
        return question, await ask(port, question)

    return list(await asyncio.gather(*(one(question) for question in asked)))
