"""The development questions of MMLU, five of each of 57 subjects, from the wheel that carries them (MIT)."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.wheels import fetch_member
from quant.analysis.choices import Question

WHEEL = "lm-eval==0.4.13"
MEMBER = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
SHA256 = "081478485b1d4f51e01305e19113f0e3a468f2dc787596386998e229a97b096c"

LETTERS = "ABCDE"
ENTRY = re.compile(r"Q: (.*?)\n\(A\) (.*)\nA: .*The answer is \(([A-E])\)", re.DOTALL)
NEXT_CHOICE = re.compile(r"\s+\([B-E]\) ")


def load_mmlu(cache: Path, per_subject: int) -> list[Question]:
    """The first questions of each subject. A choice is its text: of letters a small model picks the same one always."""
    prompts = json.loads(fetch_member(cache / "text" / "mmlu-dev.json", WHEEL, MEMBER, SHA256).read_bytes())
    return [question for text in prompts.values() for question in parse_subject(text)[:per_subject]]


def parse_subject(text: str) -> list[Question]:
    """The questions in one subject's worked examples, whose reasoning is left out."""
    entries = (ENTRY.match(part) for part in re.split(r"\n\n(?=Q: )", text))
    return [_question(*entry.groups()) for entry in entries if entry is not None]


def _question(text: str, choices: str, answer: str) -> Question:
    return Question(f"{text}\nAnswer:", tuple(NEXT_CHOICE.split(choices)), LETTERS.index(answer))
