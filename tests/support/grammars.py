"""Grammars over a vocabulary of bytes."""

from __future__ import annotations

from collections.abc import Iterable

from service.engine.api import Progress, SamplingParams, Token
from service.engine.grammar import GivenUp, Grammar, Matcher
from service.engine.loop import EngineLoop
from service.text.grammars.compiler import RulesCompiler
from service.text.json.schema import json_grammar
from service.text.tokenizer import NO_TEXT

EOS = 2


TOKENS = [NO_TEXT, NO_TEXT, b"", *(bytes([byte]) for byte in range(3, 256))]


JSON = RulesCompiler(lambda: TOKENS, frozenset({EOS}))


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["ä", 'quo"te', None, 2.5]},
        "size": {"type": "integer", "minimum": -20, "maximum": 300},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["kind", "size", "tags"],
}


RULES = json_grammar(SCHEMA)


class Registry:
    """Compiles rules as production does, and knows grammars that tests made by the names it gave them."""

    def __init__(self) -> None:
        self._made: dict[str, Grammar] = {}

    def name(self, grammar: Grammar) -> str:
        """What a request asks for to get this grammar."""
        self._made[f"made-{len(self._made)}"] = grammar
        return f"made-{len(self._made) - 1}"

    def compile(self, rules: str, num_answers: int = 1, given_up: GivenUp | None = None) -> Grammar:
        return self._made.get(rules) or JSON.compile(rules, num_answers, given_up)

    def known(self, rules: str) -> Grammar | None:
        return self._made.get(rules) or JSON.known(rules)

    def close(self) -> None:
        pass


REGISTRY = Registry()


def matcher_of(params: SamplingParams) -> Matcher | None:
    """The matcher that a request with these parameters gets."""
    return None if params.grammar is None else REGISTRY.compile(params.grammar).matcher()


class Only:
    """Allows given tokens, one set after the other, and the last set for ever."""

    def __init__(self, *sets: set[int]) -> None:
        self.sets = list(sets)

    def matcher(self) -> Only:
        return Only(*self.sets)

    is_ready = True
    mask_s = 0.0

    def allowed(self) -> bytes:
        bits = bytearray(40)  # 320 tokens, more than the model has
        for token_id in self.sets[0]:
            bits[token_id // 8] |= 1 << token_id % 8
        return bytes(bits)

    def accept(self, token_id: int) -> None:
        assert token_id in self.sets[0]
        if len(self.sets) > 1:
            self.sets.pop(0)


async def finished(
    engine: EngineLoop, prompt: list[int], params: SamplingParams, name: str = "r"
) -> tuple[Progress, list[Token]]:
    stream = engine.submit(prompt, params, name)
    tokens = [token async for tokens in stream for token in tokens]
    return stream.progress, tokens


def text_of(tokens: Iterable[Token]) -> str:
    return b"".join(TOKENS[token.id] for token in tokens).decode()
