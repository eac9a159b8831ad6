"""Random schemas as tools of a real server: whether every forced call parses, names its tool and fits its schema.

    python -m benchmarks.tool_schemas
    python -m benchmarks.tool_schemas --tiny --schemas 6

Half of the calls are `required`, half name their tool, half are streamed. The demo model gets a chat template that
knows tools; --tiny takes a small model with random weights, whose answers are random tokens. The last line printed is
JSON, and the exit code 1 if any call is wrong.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from benchmarks.paced import made_backend
from benchmarks.processes import free_port, served
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.report import RESULTS, birth_certificate, write
from benchmarks.shapes import SHAPES
from service.settings import Settings
from service.store.resolve import resolve_model

START_S = 900.0
REQUEST_S = 3600
MAX_TOKENS = 700
TEMPLATE = """
{%- if tools %}<|im_start|>system
You call tools.
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Answer <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
""".strip()


def main() -> int:
    args = _arguments()
    certificate = birth_certificate(args.commit)
    begin_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, _served(Path(scratch), args.tiny) as port:
        temperature = 1.0 if args.tiny else 0.0
        with ThreadPoolExecutor(args.concurrency) as pool:
            told = list(pool.map(lambda number: call(port, number, temperature), range(args.schemas)))
    for number, said in enumerate(told):
        if said != "fits":
            print(f"schema {number}: {said}")
    counts = Counter(said.partition(":")[0] for said in told)
    row = {"schemas": args.schemas, "seconds": round(time.perf_counter() - begin_s), **counts}
    if args.out is not None or not args.tiny:
        write(args.out or RESULTS / "tool-schemas-cpu.json", certificate, [row])
    print(json.dumps(row))
    return 0 if counts["fits"] == args.schemas else 1


def call(port: int, number: int, temperature: float) -> str:
    """What became of one call: fits, or what is wrong with it."""
    schema = random_object(random.Random(number))
    name = f"tool_{number}"
    is_named, is_streamed = number % 2 == 1, number % 4 >= 2
    body = {
        "messages": [{"role": "user", "content": "Call the tool with what you like."}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}],
        "tool_choice": {"type": "function", "function": {"name": name}} if is_named else "required",
        "parallel_tool_calls": False,
        "max_tokens": MAX_TOKENS,
        "temperature": temperature,
        "seed": number,
        "stream": is_streamed,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_S)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != 200:
        return f"refused: {text[:300]}"
    end, calls = streamed_calls(text) if is_streamed else whole_calls(json.loads(text))
    if end != "tool_calls":
        return f"cut: {end} {calls}"
    if [each for each, _ in calls] != [name]:
        return f"wrong: {calls}"
    try:
        Draft202012Validator(schema).validate(json.loads(calls[0][1]))
    except Exception as error:  # noqa: BLE001 (reported)
        return f"wrong: {type(error).__name__} {calls[0][1]!r} under {json.dumps(schema)}"
    return "fits"


def whole_calls(answer: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The finish reason and the calls, by name and arguments, of an answer."""
    choice = answer["choices"][0]
    functions = [each["function"] for each in choice["message"].get("tool_calls", ())]
    return choice["finish_reason"], [(function["name"], function["arguments"]) for function in functions]


def streamed_calls(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The same of a stream, whose deltas are joined."""
    end, calls = "", list[list[str]]()
    for line in text.split("\n"):
        if not line.startswith("data: {"):
            continue
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        end = choice["finish_reason"] or end
        for delta in choice["delta"].get("tool_calls", ()):
            if delta["index"] == len(calls):
                calls.append([delta["function"]["name"], ""])
            calls[delta["index"]][1] += delta["function"]["arguments"]
    return end, [(name, arguments) for name, arguments in calls]


def random_object(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of the kind that tools have, all of whose texts end: nested objects, lists, bounds and choices."""
    names = rng.sample(["city", "unit", "x y", 'a"b', "größe", "when"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _schema(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:  # noqa: PLR0911 (a kind each)
    kinds = ["string", "date", "integer", "number", "enum", "const", "boolean"] + ["object", "array", "anyOf"] * depth
    match rng.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": rng.choice([4, 8])}
        case "date":
            return {"type": "string", "format": rng.choice(["date", "date-time", "uuid"])}
        case "integer" | "number" as name:
            low = rng.randint(-99, 99)
            return {"type": name, "minimum": low, "maximum": low + rng.randint(0, 50)}
        case "enum":
            return {"enum": rng.sample(["a", 'quo"te', "é", None, 7, {"b": []}], rng.randint(1, 3))}
        case "const":
            return {"const": rng.choice(["x\n", 1.5, [1, "2"]])}
        case "object":
            return random_object(rng, depth - 1)
        case "array":
            return {"type": "array", "items": _schema(rng, depth - 1), "maxItems": rng.randint(0, 3)}
        case "anyOf":
            return {"anyOf": [_schema(rng, depth - 1), {"type": "null"}]}
    return {"type": "boolean"}


@contextmanager
def _served(scratch: Path, is_tiny: bool) -> Iterator[int]:
    folder, port = scratch / "model", free_port()
    if is_tiny:
        write_checkpoint(folder, "tiny", is_int8=True, max_model_len=4096)
        made_backend(SHAPES["tiny"].vocab_size).save(str(folder / "tokenizer.json"))
    else:
        shutil.copytree(resolve_model(None, Settings().cache_dir), folder)
        (folder / "SHA256SUMS").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    command = [sys.executable, "-m", "service", "serve", str(folder), "--variants", "w8a8", "--port", str(port)]
    with served(
        [*command, "--request-timeout-s", str(REQUEST_S)], f"http://127.0.0.1:{port}/ready", scratch / "log", START_S
    ):
        yield port


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a small model with random weights")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
