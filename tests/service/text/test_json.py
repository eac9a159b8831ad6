"""JSON schemas as grammars: whatever they let through is JSON that the schema accepts, and the rest is refused."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from service.engine.grammar import Matcher
from service.errors import InvalidRequest
from service.text.grammars.compiler import RulesCompiler, RulesGrammar, RulesMatcher
from service.text.json.numbers import integer_rule, number_rule
from service.text.json.schema import MAX_ALTERNATIVES, MAX_COUNTED, MAX_RULES_BYTES, choice_rules, json_grammar
from service.text.tokenizer import Tokenizer
from tests.support.tokenizers import byte_fallback_backend, byte_level_backend

Schema = dict[str, Any] | None
EOS = 0
PIECES = [
    '": ',
    '", "',
    '{"',
    '"}',
    "true",
    "null",
    "12",
    "abc",
    "]}",
    "é",
    "日",
    "😀",
    "\\",
    '\\"',
    "  ",
    "\n  ",
    "-0.",
    "e9",
]
TOKENS = [b"", b"", *(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in PIECES)]
JSON = RulesCompiler(lambda: TOKENS, frozenset({EOS}))


def compiled(schema: Schema, compiler: RulesCompiler = JSON) -> RulesGrammar:
    return compiler.compile(json_grammar(schema))


# Ends are likely, so that most texts are short; bytes beyond ASCII are there, broken characters among them.
WEIGHTS = np.array(
    [60.0 if t == b"" else 25.0 if t in (b'"', b"}", b"]") else 3.0 if t.isalnum() else 0.7 for t in TOKENS]
)


def allowed_by(matcher: Matcher) -> npt.NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(matcher.allowed(), np.uint8), bitorder="little")[: len(TOKENS)].astype(bool)


def accepts(schema: Schema, text: bytes) -> bool:
    try:
        jsonschema.validate(json.loads(text.decode()), {"type": "object"} if schema is None else schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def walk(schema: Schema, seed: int, max_tokens: int = 400) -> bytes | None:
    """A text drawn token by token, None if it does not end; wherever it may end, it is checked."""
    matcher, rng, text = compiled(schema).matcher(), random.Random(seed), b""
    for _ in range(max_tokens):
        allowed = allowed_by(matcher)
        assert allowed.any(), f"nothing may follow {text!r}"
        assert not allowed[1], "a token without text"
        assert allowed[EOS] <= accepts(schema, text), f"{text!r} may end"
        token = rng.choices(range(len(TOKENS)), (WEIGHTS * allowed).tolist())[0]
        matcher.accept(token)
        if token == EOS:
            assert not allowed_by(matcher).any()
            return text
        text += TOKENS[token]
    return None


def lets_through(matcher: Matcher, text: str) -> bool:
    """Whether the whole text may come, byte by byte, and end."""
    for byte in text.encode():
        if not allowed_by(matcher)[2 + byte]:
            return False
        matcher.accept(2 + byte)
    return bool(allowed_by(matcher)[EOS])


def ends_of(schema: Schema, count: int = 12) -> list[bytes]:
    ends = [text for seed in range(count) if (text := walk(schema, seed)) is not None]
    assert ends, "no text ended"
    return ends


STR: Schema = {"type": "string"}
INT: Schema = {"type": "integer"}


def all_of(**properties: object) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


TREE = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"v": INT, "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "required": ["v"],
        }
    },
    "$ref": "#/$defs/tree",
}
SERVED: dict[str, Schema] = {
    "nothing said": {},
    "annotations": {"title": "x", "description": "y", "default": 3, "$schema": "https://json-schema.org/draft/2020-12/schema"},
    "any object": None,
    "properties": all_of(a=STR, b=INT, c={"type": "null"}),
    "optional": {"type": "object", "properties": {"a": INT, "b": {"type": "boolean"}, "c": INT}, "required": ["b"]},
    "all optional": {"type": "object", "properties": {"a": INT, "b": INT}, "additionalProperties": False},
    "names to escape": all_of(**{'a"\\\n\té😀': INT, "": INT}),
    "no properties": {"type": "object", "additionalProperties": False},
    "map": {"type": "object", "additionalProperties": {"type": "array", "items": INT}},
    "implied types": {"properties": {"a": {"minLength": 2}, "b": {"items": INT}}, "required": ["a", "b"]},
    "types": {"type": ["string", "null", "integer"], "maxLength": 2, "minimum": 5},
    "lengths": {"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 5}, "maxItems": 4},
    "least length": {"type": "string", "minLength": 6},
    "no length": {"type": "string", "maxLength": 0},
    "items": {"type": "array", "items": STR, "minItems": 2, "maxItems": 3},
    "least items": {"type": "array", "items": INT, "minItems": 3},
    "one item at most": {"type": "array", "items": INT, "maxItems": 1},
    "no items": {"type": "array", "items": INT, "maxItems": 0},
    "enum": {"enum": ["a", 1, None, True, {"x": [1, "é"]}, 'q"\\\n', 2.5, []]},
    "enum of a type": {"type": ["number", "null"], "enum": ["a", 1, None, True, 1.5]},
    "const": {"const": {"a": "é\"\n", "b": [1.5]}},
    "any of": {"anyOf": [STR, INT, all_of(a=INT), {"type": "null"}]},
    "all of one": {"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": INT}},
    "reference": {"definitions": {"a/b~c": INT}, "type": "array", "items": {"$ref": "#/definitions/a~1b~0c"}},
    "reference to a property": {**all_of(a=INT), "properties": {"a": INT, "b": {"$ref": "#/properties/a"}}},
    "the whole again": {"type": "object", "properties": {"c": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
    "tree": TREE,
}  # fmt: skip


@pytest.mark.parametrize("schema", SERVED.values(), ids=SERVED.keys())
def test_every_text_is_accepted(schema: Schema) -> None:
    for text in ends_of(schema):
        assert accepts(schema, text)


def test_reach() -> None:
    """The walks see every choice of optional members, and what a schema means comes through as json writes it."""
    optional = {tuple(json.loads(text)) for text in ends_of(SERVED["optional"], 150)}
    assert optional == {("b",), ("a", "b"), ("b", "c"), ("a", "b", "c")}
    lists = [json.dumps(["a"] * count) for count in range(5)]
    assert [lets_through(compiled(SERVED["items"]).matcher(), text) for text in lists] == [0, 0, 1, 1, 0]
    value = {"a": ["é😀\n", {"b": [None, True, -1.5e-7, {}], "a": 0}], "": [[], "/"]}
    for indent in (None, 0, 4, "\t"):
        text = json.dumps(value, indent=indent, ensure_ascii=False)
        assert lets_through(compiled(None).matcher(), text)
        assert not lets_through(compiled(None).matcher(), text[:-1])


@pytest.mark.parametrize(
    ("name", "parse"),
    [
        ("date", datetime.date.fromisoformat),
        ("date-time", datetime.datetime.fromisoformat),
        ("time", datetime.time.fromisoformat),
        ("uuid", lambda text: int(text.replace("-", ""), 16)),
    ],
)
def test_formats(name: str, parse: Callable[[str], object]) -> None:
    for text in ends_of({"type": "string", "format": name}, 40):
        parse(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "strin"}, "#/type is \"strin\": use object, array"),
        ({"type": []}, "use object, array"),
        ({"type": "string", "pattern": "a"}, "`pattern`, which is not served"),
        ({"oneOf": [STR]}, "`oneOf`, which is not served .* use `anyOf`"),
        ({"not": STR}, "`not`, which is not served"),
        ({"$ref": "#/$defs/x", "$defs": {"x": INT}, "minimum": 3}, "`minimum` beside `\\$ref`"),
        ({"anyOf": [STR], "type": "string"}, "`type` beside `anyOf`"),
        ({"anyOf": []}, "#/anyOf is \\[\\]: list at least one"),
        ({"allOf": [STR, STR]}, "has 2 schemas; one is served"),
        ({"enum": [1.5], "type": "integer"}, "no value of type integer"),
        ({"enum": [float("nan")]}, "no JSON that can be served"),
        ({"const": "\ud800"}, "no JSON that can be served"),
        ({"minLength": 1, "minimum": 1}, "no `type` beside minLength, minimum"),
        ({"type": "string", "minimum": 1}, "`minimum`, which is not served for string"),
        ({"type": "string", "minLength": -1}, "#/minLength is -1"),
        ({"type": "string", "minLength": True}, "#/minLength is true"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength 5 above maxLength 2"),
        ({"type": "string", "format": "email"}, "format \"email\": served, without a length, are date"),
        ({"type": "string", "format": ["date"]}, r"format .*date.*: served, without a length"),
        ({"type": "string", "format": "date", "maxLength": 9}, "without a length"),
        ({"type": "string", "maxLength": 257}, "to 1, together 257; at most 8 of together 256"),
        (all_of(**{f"p{i}": {"type": "string", "maxLength": i} for i in range(9)}), "to 9, together 36"),
        ({"type": "array", "maxItems": 1001}, "asks for 1001 items; at most 1000"),
        ({"type": "string", "const": 10**400}, "no value of type string"),
        ({"$ref": "#/$defs/a/" + "9" * 5000, "$defs": {"a": [INT]}}, "which is not there"),
        ({"type": "array", "uniqueItems": True}, "`uniqueItems`"),
        ({"type": "array", "prefixItems": [INT]}, "use an object with a property for each place"),
        ({"type": "object", "required": ["a"]}, "requires \"a\", which `properties` lacks"),
        ({**all_of(a=INT), "additionalProperties": INT}, "set it to false"),
        ({"type": "object", "properties": []}, "no object"),
        ({"type": "object", "properties": {f"p{i}": INT for i in range(129)}}, "to 129; 128 are served"),
        (all_of(a=3), "#/properties/a is 3: a schema is an object, or true"),
        (all_of(a=False), "#/properties/a is false"),
        ({"$ref": "http://host/x"}, "refer to a part of the same schema"),
        ({"$ref": "#/$defs/none"}, "is not there"),
        ({"$ref": 3}, "refer to a part"),
        ({"$ref": "#"}, "leads back here"),
        ({"anyOf": [{"$ref": "#"}, INT]}, "leads back here"),
        ({"$defs": {"n": all_of(n={"$ref": "#/$defs/n"})}, "$ref": "#/$defs/n"}, "fulfilled by no finite text"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "fulfilled by no finite text"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "leaves no integer between 3 and 2"),
        ({"type": "integer", "exclusiveMinimum": 1, "maximum": 1.5}, "leaves no integer"),
        ({"type": "integer", "minimum": "3"}, "minimum '3': use a number"),
        ({"type": "integer", "minimum": 10**18}, "use a number between"),
        ({"type": "number", "minimum": 0.5}, "served where they are whole"),
        ({"type": "number", "minimum": 2, "exclusiveMaximum": 2}, "leaves no number"),
        ({"description": "x" * 65536}, "has 65555 bytes; at most 65536"),
    ],
)  # fmt: skip
def test_what_is_refused(schema: Schema, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as raised:
        compiled(schema)
    assert raised.value.param == "response_format"


@pytest.mark.parametrize("nested", [lambda x: all_of(a=x), lambda x: {"anyOf": [x]}, lambda x: {"items": x}])
def test_depth_is_limited_before_python_is_at_its_end(nested: Callable[[Schema], Schema]) -> None:
    schema: Schema = INT
    for _ in range(300):
        schema = nested(schema)
    with pytest.raises(InvalidRequest, match="more than 48 schemas deep"):
        json_grammar(schema)
    for _ in range(100_000):
        schema = nested(schema)
    with pytest.raises(InvalidRequest, match="no JSON that can be served"):
        json_grammar(schema)


def test_an_integer_beyond_every_float_is_an_integer() -> None:
    assert str(10**400) in json_grammar({"type": "integer", "const": 10**400})


def test_a_long_chain_of_references_is_refused() -> None:
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(900)}
    with pytest.raises(InvalidRequest, match="references followed"):
        json_grammar({"$defs": {**chain, "d900": INT}, "$ref": "#/$defs/d0"})


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | NAMES | st.floats(-9, 9),
    lambda v: st.lists(v, max_size=2),
    max_leaves=3,
)


def objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    properties = st.dictionaries(NAMES, inner, min_size=1, max_size=4)
    return properties.flatmap(
        lambda p: st.builds(
            lambda required: {"type": "object", "properties": p, "required": required},
            st.lists(st.sampled_from(sorted(p)), unique=True),
        )
    )


def bounds(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    pairs = st.tuples(st.integers(low, high), st.integers(0, 3))
    return pairs.map(lambda pair: (pair[0], pair[0] + pair[1]))


SCALARS = st.one_of(
    st.sampled_from([{"type": name} for name in ("boolean", "null", "integer", "number", "string")]),
    bounds(-120, 120).map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[1]}),
    bounds(-12, 12).map(lambda b: {"type": "number", "exclusiveMinimum": b[0], "maximum": b[1] + 1}),
    bounds(0, 4).map(lambda b: {"type": "string", "minLength": b[0], "maxLength": b[1]}),
    st.lists(VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        objects(inner),
        st.tuples(inner, bounds(0, 2)).map(
            lambda p: {"type": "array", "items": p[0], "minItems": p[1][0], "maxItems": p[1][1]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        inner.map(lambda part: {"type": "object", "additionalProperties": part}),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_every_text_of_any_schema_is_accepted(schema: Schema, seed: int) -> None:
    try:
        text = walk(schema, seed)
    except InvalidRequest as error:
        assert "lengths of strings" in error.message  # noqa: PT017 (other refusals would be a fault)
        return
    assert text is None or accepts(schema, text)


def digits_match(rule: str, text: str) -> bool:
    """Whether a rule lets a number through."""
    compiler = JSON._compiler
    assert compiler is not None
    return lets_through(RulesMatcher(compiler.compile_grammar(f"root ::= {rule}\n"), len(TOKENS)), text)


@settings(max_examples=60, deadline=None)
@given(low=st.integers(-(10**4), 10**4), size=st.integers(0, 10**4), offset=st.integers(-3, 3), is_high=st.booleans())
def test_integers_are_those_between_the_bounds(low: int, size: int, offset: int, is_high: bool) -> None:
    high = low + size
    value = (high if is_high else low) + offset
    rule = integer_rule({"minimum": low, "exclusiveMaximum": high + 1})
    assert digits_match(rule, str(value)) == (low <= value <= high)


@settings(max_examples=60, deadline=None)
@given(
    low=st.integers(-30, 30),
    size=st.integers(1, 30),
    millis=st.integers(-1500, 1500),
    is_high=st.booleans(),
    excludes=st.tuples(st.booleans(), st.booleans()),
)
def test_numbers_are_those_between_the_bounds(
    low: int, size: int, millis: int, is_high: bool, excludes: tuple[bool, bool]
) -> None:
    high = low + size
    value = Decimal(high if is_high else low) + Decimal(millis) / 1000
    rule = number_rule(
        {"exclusiveMinimum" if excludes[0] else "minimum": low, "exclusiveMaximum" if excludes[1] else "maximum": high}
    )
    inside = (low < value if excludes[0] else low <= value) and (value < high if excludes[1] else value <= high)
    assert digits_match(rule, str(value)) == inside or str(value) in {"-0", "-0.000"}


def test_control_characters_and_broken_characters_are_not_let_through() -> None:
    matcher = compiled(STR).matcher()
    matcher.accept(2 + ord('"'))
    allowed = allowed_by(matcher)
    assert not allowed[2 : 2 + 0x20].any()
    assert not allowed[[2 + 0x80, 2 + 0xBF, 2 + 0xC0, 2 + 0xC1, 2 + 0xF5, 2 + 0xFF]].any()
    assert allowed[[2 + 0x20, 2 + 0x7F, 2 + 0xC3, 2 + 0xF0]].all()
    matcher.accept(2 + 0xED)
    assert not allowed_by(matcher)[2 + 0xA0], "half a surrogate pair"


def test_a_token_that_may_not_come_is_named() -> None:
    with pytest.raises(ValueError, match="token 99 may not come here"):
        compiled(INT).matcher().accept(99)


def test_matchers_of_one_schema_do_not_share_their_place() -> None:
    grammar = compiled(SERVED["properties"])
    first, second = grammar.matcher(), grammar.matcher()
    start = second.allowed()
    first.accept(2 + ord("{"))
    assert second.allowed() == start != first.allowed()


@pytest.mark.parametrize("backend", [byte_level_backend, byte_fallback_backend])
def test_over_a_real_vocabulary(backend: Callable[[], Backend]) -> None:
    """The text that the decoder makes of the tokens parses; special tokens never come, whatever they are called."""
    made = backend()
    tokenizer = Tokenizer(made, frozenset({0}))
    special = [i for i, t in made.get_added_tokens_decoder().items() if t.special]
    compiler = RulesCompiler(lambda: tokenizer.vocabulary(tokenizer.vocab_size), tokenizer.eos_ids)
    for seed in range(12):
        rng, decoder, text = random.Random(seed), tokenizer.detokenizer(), ""
        matcher = compiled(SERVED["properties"], compiler).matcher()
        for _ in range(300):
            bits = np.unpackbits(np.frombuffer(matcher.allowed(), np.uint8), bitorder="little")[: tokenizer.vocab_size]
            assert not bits[[i for i in special if i != 0]].any()
            token = rng.choice(bits.nonzero()[0].tolist())
            quote = tokenizer.token_bytes(token) != b'"' and bits.nonzero()[0].size > 20 and rng.random() < 0.3
            token = (
                next((i for i in bits.nonzero()[0].tolist() if tokenizer.token_bytes(i) == b'"'), token)
                if quote
                else token
            )
            matcher.accept(token)
            if token == 0:
                break
            text += decoder.push(token)
        else:
            continue
        jsonschema.validate(json.loads(text + decoder.flush()), SERVED["properties"])


def test_ids_with_gaps_and_rows_beyond_the_tokenizer() -> None:
    """The last ids come after a gap: a mask that ends at the number of tokens would not reach them."""
    state = json.loads(byte_level_backend().to_str())
    for name in ("{", "}"):
        state["model"]["vocab"][name] += 1000
    state["model"]["merges"] = []
    name = state["added_tokens"][0]["content"]
    state["added_tokens"][0]["id"] = state["model"]["vocab"][name] = end = 2000
    tokenizer = Tokenizer(Backend.from_str(json.dumps(state)), frozenset({end}))
    assert tokenizer.vocab_size == 2001
    compiler = RulesCompiler(lambda: tokenizer.vocabulary(2005), tokenizer.eos_ids)
    matcher = compiled({"type": "object", "properties": {}, "additionalProperties": False}, compiler).matcher()
    for wanted in (*(tokenizer._backend.get_vocab()[name] for name in "{}"), end):
        bits = np.unpackbits(np.frombuffer(matcher.allowed(), np.uint8), bitorder="little")
        assert wanted >= 1000
        assert bits[wanted]
        assert not bits[2001:].any()
        matcher.accept(wanted)


def test_a_model_without_an_end_token_is_told() -> None:
    tokenizer = Tokenizer(byte_level_backend(), frozenset())
    with pytest.raises(InvalidRequest, match="names no end token"):
        compiled(None, RulesCompiler(lambda: tokenizer.vocabulary(tokenizer.vocab_size), tokenizer.eos_ids))


def test_alternatives_are_bounded_in_the_whole_schema() -> None:
    """The time for a mask, and the memory of a row, grow with the square of those that begin alike."""
    part = {"anyOf": [{"items": STR, "minItems": 1}] * (MAX_ALTERNATIVES // 2)}
    both = {"type": "object", "properties": {"a": part, "b": part}, "required": ["a", "b"]}
    compiled(both)
    one_more = {"anyOf": [both, INT]}
    with pytest.raises(InvalidRequest, match=f"alternatives to .*; {MAX_ALTERNATIVES} are served"):
        compiled(one_more)


def test_what_would_take_long_to_compile_is_refused() -> None:
    def arrays(count: int, **bounds: int) -> Schema:
        names = [f"p{i}" for i in range(count)]
        return {"type": "object", "properties": {n: {"type": "array", **bounds} for n in names}, "required": names}

    compiled(arrays(MAX_COUNTED, maxItems=1000))
    json_grammar(arrays(3 * MAX_COUNTED, minItems=1))
    for bounds in ({"maxItems": 1000}, {"minItems": 2}):
        with pytest.raises(InvalidRequest, match=f"number of items to {MAX_COUNTED + 1}; {MAX_COUNTED} are served"):
            json_grammar(arrays(MAX_COUNTED + 1, **bounds))
    names = [f"p{i}" for i in range(400)]
    times = {"type": "string", "format": "date-time"}
    with pytest.raises(InvalidRequest, match=f"at most {MAX_RULES_BYTES} are served"):
        json_grammar({"type": "object", "properties": dict.fromkeys(names, times), "required": names})


@pytest.mark.parametrize("text", ["yes", 'n"o\n', "größe", "a\\b", "yes!", "no"])
def test_a_choice_of_texts(text: str) -> None:
    texts = ["yes", 'n"o\n', "größe", "a\\b"]
    matcher = JSON.compile(choice_rules(texts).text()).matcher()
    assert lets_through(matcher, text) == (text in texts)
