"""The basic rules of JSON grammars, in xgrammar's notation."""

from __future__ import annotations

from service.text.json.numbers import integer_rule

# As ranges, because the compiler turns those into complete UTF-8 characters only.
CHAR = r"[\u0020-\u0021\u0023-\u005b\u005d-\ud7ff\ue000-\U0010ffff]"
_DATE = (
    '[1-9] [0-9] [0-9] [0-9] "-" (("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
    ' | ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8]))'
)
_MINUTES = '("0" [0-9] | "1" [0-9] | "2" [0-3]) ":" [0-5] [0-9]'
_TIME = f'{_MINUTES} ":" [0-5] [0-9] ("." [0-9]{{1,6}})? ("Z" | [+-] {_MINUTES})'
FORMATS = {
    "date": _DATE,
    "date-time": f'{_DATE} "T" {_TIME}',
    "time": _TIME,
    "uuid": ' "-" '.join(f"[0-9a-f]{{{length},{length}}}" for length in (8, 4, 4, 4, 12)),
}
COMMON = {
    "space": r'(" " | "\n" [ \t]{0,40})?',
    "string": rf'"\"" ({CHAR} | "\\" ["\\/bfnrt])* "\""',
    "integer": integer_rule({}),
    "number": '"-"? ("0" | [1-9] [0-9]{0,17}) ("." [0-9]{1,17})? ([eE] [+-]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
}


def map_of(rule: str) -> str:
    """The rule of an object with arbitrary names and values of one rule."""
    member = f'string ":" space {rule}'
    return f'"{{" space {member} ("," space {member})* space "}}" | "{{}}"'


def literal(text: str) -> str:
    """A text as a quoted literal of the grammar."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
