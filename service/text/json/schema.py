"""Turns a JSON schema into the rules of a grammar; every text that matches them is JSON that the schema accepts.

A keyword is either expressed in the rules or the schema is refused; none is silently ignored. The rules may allow less
than the schema if a model does not need the rest: properties come in the schema's order, without additional ones;
between values there is nothing, a space, or one line break with indentation; numbers have at most 18 digits; and a
string with a length contains no escapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

from service.text.json.keywords import (
    ANNOTATIONS,
    BOUNDS,
    KEYWORDS,
    Place,
    is_of,
    json_text,
    range_of,
    refuse,
    resolve,
    shown,
    types_of,
)
from service.text.json.numbers import integer_rule, number_rule
from service.text.json.terminals import CHAR, COMMON, FORMATS, literal, map_of

MAX_SCHEMA_BYTES = 1 << 16
MAX_RULES_BYTES = 1 << 17
"""Longest rules. The time to compile grows with the square of their length: 128 KiB take up to 0.7 s, 460 KB 5 s."""
MAX_COUNTED = 64
"""Most arrays with a number of items. The time grows with their square too: 64 take 0.25 s, 1200 a minute."""
MAX_DEPTH = 48
"""Most nested schemas, including references."""
MAX_ITEMS = 1000
MAX_OPTIONAL = 128
"""Most optional properties in the whole schema. If 100 can come next, finding the allowed tokens takes 2 ms, with 1000
it takes 100 ms, during which every request in the step waits."""
MAX_ALTERNATIVES = 128
"""Most alternatives of `anyOf` in the whole schema. Of 128 that begin alike, finding the allowed tokens takes 0.6 ms,
of 1200 it takes 130 ms: time and memory grow with their square."""
MAX_LENGTHS = 8
MAX_LENGTH_SUM = 256
"""Most different lengths of strings, and their sum. A position in such a string takes the compiler 7 ms with 49,152
tokens, and with 22 possible lengths, finding the allowed tokens takes 28 ms."""
FREE_DEPTH = 12
"""Most nested arrays and objects in a value that the schema does not restrict."""

ALONE = ("$ref", "anyOf", "allOf", "const", "enum")
REMEDIES = {
    "oneOf": "use `anyOf`",
    "pattern": "use `enum`, `format` or a length",
    "patternProperties": "name the properties, or give `additionalProperties` alone",
    "prefixItems": "use an object with a property for each place",
}


class GrammarRules(NamedTuple):
    """Rules by name, and the name of the one that stands for a whole text."""

    bodies: Mapping[str, str]
    root: str

    def text(self) -> str:
        """All rules in xgrammar's notation, with `root` last.

        Raises:
            InvalidRequest: they are longer than MAX_RULES_BYTES.
        """
        rules = "\n".join(f"{name} ::= {body}" for name, body in {**self.bodies, "root": self.root}.items()) + "\n"
        size = len(rules.encode())
        if size > MAX_RULES_BYTES:
            refuse((), f"has rules of {size} bytes; at most {MAX_RULES_BYTES} are served: use fewer formats and bounds")
        return rules

    def __or__(self, other: GrammarRules) -> GrammarRules:
        """The rules for texts that either matches; rules of one name must be equal."""
        return GrammarRules({**self.bodies, **other.bodies}, f"{self.root} | {other.root}")


Needs = Sequence[Set[str]]
"""For each alternative of a rule, the rules that it requires."""


def json_grammar(schema: dict[str, Any] | None) -> str:
    """The rules, in xgrammar's notation, for texts that the schema accepts; None accepts any object.

    Raises:
        InvalidRequest: a keyword or a combination of keywords is not served, a keyword's value is invalid, a limit is
            exceeded, or no finite text satisfies the schema.
    """
    return json_rules(schema).text()


def json_rules(schema: dict[str, Any] | None) -> GrammarRules:
    """The rules of `json_grammar`. Raises as it does."""
    return Rules({"type": "object"} if schema is None else schema).all()


def choice_rules(texts: Sequence[str]) -> GrammarRules:
    """The rules of an answer that is one of these texts."""
    return GrammarRules({"choice": " | ".join(json.dumps(text) for text in texts)}, "choice")


class Rules:
    """Collects the rules of one schema; `at` is the location of a part.

    Args:
        schema: see `json_grammar`.
        prefix: of the names of all rules that differ between schemas, so that those of several go into one grammar.
    """

    def __init__(self, schema: dict[str, Any], prefix: str = "") -> None:
        self._schema = schema
        self._prefix = prefix
        self._bodies: dict[str, str] = {name: COMMON[name] for name in ("space", "string")}
        self._needs: dict[str, Needs] = {}
        self._references: dict[Place, str] = {}
        # References since the last property or item; one that returns to itself would be an empty recursion.
        self._chain: tuple[Place, ...] = ()
        self._lengths: set[tuple[int, int | None]] = set()
        self._num_optional = 0
        self._num_alternatives = 0
        self._num_counted = 0
        self._depth = 0

    def all(self) -> GrammarRules:
        """All rules. Raises InvalidRequest as `json_grammar`."""
        size = len(json_text(self._schema, ()).encode())
        if size > MAX_SCHEMA_BYTES:
            refuse((), f"has {size} bytes; at most {MAX_SCHEMA_BYTES} are served: split it, or leave descriptions out")
        root = self._reference("#", ())
        if not self._can_end(root):
            refuse((), "is fulfilled by no finite text: let what refers to itself be optional, or give it an end")
        return GrammarRules(self._bodies, root)

    def _can_end(self, root: str) -> bool:
        """Whether a finite text satisfies a rule, by growing the set of rules with one until nothing is added."""
        ends: set[str] = set()
        left = dict(self._needs)
        while new := {name for name, ways in left.items() if any(way <= ends for way in ways)}:
            ends |= new
            left = {name: ways for name, ways in left.items() if name not in new}
        return root in ends

    def _add(self, body: str, needs: Needs = (frozenset(),), name: str | None = None) -> str:
        name = name or f"{self._prefix}r{len(self._bodies)}"
        self._bodies[name], self._needs[name] = body, needs
        return name

    def _either(self, rules: list[str]) -> str:
        return rules[0] if len(rules) == 1 else self._add(" | ".join(rules), [{rule} for rule in rules])

    def _inside(self, schema: Any, at: Place) -> str:
        """The rule of a property or an item."""
        outside, self._chain = self._chain, ()
        rule = self._rule(schema, at)
        self._chain = outside
        return rule

    def _rule(self, schema: Any, at: Place) -> str:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            refuse(at, f"lies more than {MAX_DEPTH} schemas deep, references followed: make it flatter")
        if schema is True or (isinstance(schema, dict) and schema.keys() <= ANNOTATIONS):
            rule = self._free("value")
        elif not isinstance(schema, dict):
            refuse(at, f"is {shown(schema)}: a schema is an object, or true")
        else:
            alone = next((word for word in ALONE if word in schema), None)
            rule = self._typed(schema, at) if alone is None else self._lone(alone, schema, at)
        self._depth -= 1
        return rule

    def _lone(self, word: str, schema: dict[str, Any], at: Place) -> str:
        """The rule of a keyword that must be the only one in its schema."""
        beside = schema.keys() - ANNOTATIONS - {word} - ({"type"} if word in {"const", "enum"} else set())
        if beside:
            refuse(at, f"has `{min(beside)}` beside `{word}`: write both into one schema")
        value, place = schema[word], (*at, word)
        if word == "$ref":
            return self._reference(value, place)
        if word == "const":
            return self._values([value], schema, at)
        if not isinstance(value, list) or not value:
            refuse(place, f"is {shown(value)}: list at least one")
        if word == "enum":
            return self._values(value, schema, at)
        if word == "allOf" and len(value) > 1:
            refuse(place, f"has {len(value)} schemas; one is served: write them out as one")
        self._num_alternatives += len(value) if word == "anyOf" else 0
        if self._num_alternatives > MAX_ALTERNATIVES:
            refuse(
                place,
                f"brings the alternatives to {self._num_alternatives}; {MAX_ALTERNATIVES} are served: write constants "
                "as one `enum`, or use fewer schemas",
            )
        return self._either([self._rule(part, (*place, str(i))) for i, part in enumerate(value)])

    def _reference(self, pointer: object, at: Place) -> str:
        place, part = resolve(self._schema, pointer, at)
        if place in self._chain:
            refuse(at, f"is {shown(pointer)}, which leads back here: put a property or an item in between")
        if place not in self._references:
            name = self._references[place] = f"{self._prefix}ref{len(self._references)}"
            self._chain = (*self._chain, place)
            rule = self._rule(part, place)
            self._chain = self._chain[:-1]
            self._add(rule, [{rule}], name)
        return self._references[place]

    def _values(self, values: list[Any], schema: dict[str, Any], at: Place) -> str:
        types = types_of(schema, at) if "type" in schema else list(KEYWORDS)
        fitting = [value for value in values if is_of(value, types)]
        if not fitting:
            refuse(at, f"has no value of type {' or '.join(types)}: list one, or leave `type` out")
        return self._add(" | ".join(literal(json_text(value, at)) for value in fitting))

    def _typed(self, schema: dict[str, Any], at: Place) -> str:
        self._require_served(schema, list(KEYWORDS), at)
        types = types_of(schema, at)
        self._require_served(schema, types, at)
        return self._either([self._of_type(name, schema, at) for name in types])

    def _require_served(self, schema: dict[str, Any], types: list[str], at: Place) -> None:
        served = ANNOTATIONS.union({"type"}, *(KEYWORDS[name] for name in types))
        for word in sorted(schema.keys() - served):
            remedy = REMEDIES.get(word, "leave it out")
            refuse(at, f"has `{word}`, which is not served for {' or '.join(types)}: {remedy}")

    def _of_type(self, name: str, schema: dict[str, Any], at: Place) -> str:
        match name:
            case "object":
                return self._object(schema, at)
            case "array":
                return self._array(schema, at)
            case "string":
                return self._string(schema, at)
            case "integer" | "number" if BOUNDS & schema.keys():
                return self._number(name, {word: schema[word] for word in BOUNDS & schema.keys()}, at)
            case _:
                return self._common(name)

    def _common(self, name: str) -> str:
        return self._add(COMMON[name], name=name)

    def _number(self, name: str, bounds: dict[str, Any], at: Place) -> str:
        try:
            return self._add(integer_rule(bounds) if name == "integer" else number_rule(bounds))
        except ValueError as error:
            refuse(at, str(error))

    def _string(self, schema: dict[str, Any], at: Place) -> str:
        least, most = range_of(schema, "Length", at)
        if "format" in schema:
            wanted = schema["format"]
            if not isinstance(wanted, str) or wanted not in FORMATS or least or most is not None:
                refuse(at, f"has format {shown(wanted)}: served, without a length, are {', '.join(FORMATS)}")
            return self._add(rf'"\"" {FORMATS[wanted]} "\""')
        if not least and most is None:
            return self._common("string")
        self._lengths.add((least, most))
        count, total = len(self._lengths), sum(longest or shortest for shortest, longest in self._lengths)
        if count > MAX_LENGTHS or total > MAX_LENGTH_SUM:
            refuse(
                at,
                f"brings the different lengths of strings to {count}, together {total}; at most {MAX_LENGTHS} of "
                f"together {MAX_LENGTH_SUM} are served: leave `maxLength` out and bound the answer by max_tokens",
            )
        rest = f"{CHAR}*" if most is None else ""
        return self._add(rf'"\"" {CHAR}{{{least},{least if most is None else most}}} {rest} "\""')

    def _array(self, schema: dict[str, Any], at: Place) -> str:
        least, most = range_of(schema, "Items", at)
        if max(least, most or 0) > MAX_ITEMS:
            refuse(at, f"asks for {max(least, most or 0)} items; at most {MAX_ITEMS} are served: lower it")
        self._num_counted += least > 1 or most is not None
        if self._num_counted > MAX_COUNTED:
            refuse(
                at,
                f"brings the arrays with a number of items to {self._num_counted}; {MAX_COUNTED} are served: leave "
                "`minItems` and `maxItems` out of the others",
            )
        if most == 0:
            return self._add('"[]"')
        item = self._inside(schema.get("items", True), (*at, "items"))
        last = "" if most is None else most - 1
        items = f'{item} ("," space {item}){{{max(least - 1, 0)},{last}}}'
        body = f'"[" space {items} space "]"' + ("" if least else ' | "[]"')
        return self._add(body, [{item}] if least else [set()])

    def _object(self, schema: dict[str, Any], at: Place) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        extra = schema.get("additionalProperties", True)
        if not isinstance(properties, dict) or not isinstance(required, list):
            refuse(at, "has `properties` that are no object, or `required` that is no list: mend it")
        missing = next((name for name in required if not isinstance(name, str) or name not in properties), None)
        if missing is not None:
            refuse(at, f"requires {shown(missing)}, which `properties` lacks: describe it there")
        if not properties:
            return self._map(extra, at)
        if not isinstance(extra, bool):
            refuse(at, "has a schema in `additionalProperties` beside `properties`: set it to false")
        self._num_optional += len(properties.keys() - set(required))
        if self._num_optional > MAX_OPTIONAL:
            refuse(
                at, f"brings the optional properties to {self._num_optional}; {MAX_OPTIONAL} are served: require some"
            )
        rules = {name: self._inside(part, (*at, "properties", name)) for name, part in properties.items()}
        members = self._members(rules, set(required))
        return self._add(f'"{{" space {members} space "}}"', [{rules[name] for name in required}])

    def _members(self, rules: dict[str, str], required: set[str]) -> str:
        """The rule of members in order, with a comma before each except the first one present."""
        first = following = self._add('""')
        for name, rule in reversed(rules.items()):
            member = self._add(f'{literal(json_text(name, ()))} ":" space {rule}')
            if name in required:
                first, following = f"{member} {following}", f'"," space {member} {following}'
            else:
                first, following = f"{member} {following} | {first}", f'("," space {member})? {following}'
            first, following = self._add(first), self._add(following)
        return first

    def _map(self, extra: Any, at: Place) -> str:
        """The rule of an object with arbitrary names."""
        if extra is False:
            return self._add('"{}"')
        if extra is True:
            return self._free("object")
        return self._add(map_of(self._inside(extra, (*at, "additionalProperties"))))

    def _free(self, kind: str) -> str:
        """The rule of any value, or any object."""
        if f"value{FREE_DEPTH}" not in self._bodies:
            self._add(" | ".join(self._common(name) for name in ("string", "number", "boolean", "null")), name="value0")
            for level in range(1, FREE_DEPTH + 1):
                inner = f"value{level - 1}"
                self._add(map_of(inner), name=f"object{level}")
                self._add(f'"[" space {inner} ("," space {inner})* space "]" | "[]"', name=f"array{level}")
                self._add(f"value0 | object{level} | array{level}", name=f"value{level}")
        return f"{kind}{FREE_DEPTH}"
