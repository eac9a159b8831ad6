"""Memory over rounds of mixed requests to a real server: whether what requests held is given back.

    python -m benchmarks.kept_memory

A tiny random model in both variants, with shadow mode on. Each round sends answers held to schemas, one of them new, to
a regular expression and to a grammar, log-probabilities of prompts and answers, conversations with tools, compared
answers, refused and abandoned compilations, and streams that are cut off. Resident memory of web and engine after each;
the verdict is about the last third of the rounds. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.paced import made_backend
from benchmarks.processes import free_port, served
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.report import RESULTS, birth_certificate, write
from benchmarks.shapes import SHAPES
from benchmarks.tool_schemas import TEMPLATE

START_S = 300.0
REST_S = 2.0
KV_BYTES = 8 << 20
MOST_MB = 16.0
"""Growth that is still noise of the allocators' arenas."""

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "big": {"type": "boolean"}},
}
TOOL = {"type": "function", "function": {"name": "city", "parameters": CITY}}
USER = [{"role": "user", "content": "w5 w6"}]
TEXT, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"


def main() -> int:
    args = _arguments()
    certificate = birth_certificate(args.commit)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        scratch, port = Path(name), free_port()
        folder = scratch / "model"
        write_checkpoint(folder, "tiny", is_int8=False, max_model_len=1024)
        made_backend(SHAPES["tiny"].vocab_size).save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        words = [sys.executable, "-m", "service", "serve", str(folder), "--port", str(port)]
        # A small cache of keys and values, since its pages become resident as they are first used.
        words += ["--cache-dir", str(scratch / "cache"), "--shadow-rate", "1", "--kv-cache-bytes", str(KV_BYTES)]
        with served(words, f"http://127.0.0.1:{port}/ready", scratch / "log", START_S):
            for number in range(args.rounds):
                statuses = played(port, number)
                time.sleep(REST_S)
                web, engine = resident_mb(port)
                rows.append(
                    {"round": number, "rss_mb": round(web + engine), "web_mb": round(web), "engine_mb": round(engine)}
                    | statuses
                )
                print(rows[-1], flush=True)
    settled = [float(row["rss_mb"]) for row in rows[-(len(rows) // 3) - 1 :]]
    growth = settled[-1] - settled[0]
    write(args.out or RESULTS / "kept-memory-cpu.json", certificate, rows)
    print(json.dumps({"rounds": len(rows), "settled_mb": settled[0], "last_mb": settled[-1], "growth_mb": growth}))
    return 0 if growth <= MOST_MB else 1


def played(port: int, number: int) -> dict[str, int]:
    """Send a round. Returns how many requests had which status."""
    bodies = requests_of(number)
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda each: ask(port, *each), bodies))
    return {f"http_{status}": told.count(status) for status in sorted(set(told))}


def requests_of(number: int) -> list[tuple[str, dict[str, Any], bool]]:
    """Path, body, and whether the client leaves after the first bytes."""
    schema = {"structured_outputs": {"json": CITY}}
    slow = " ".join(f'(x ("," x){{0,{990 - i}}})?' for i in range(400)) + f'\nx ::= "a{number}"'
    # A schema that no round before had, so that compiled ones have to be dropped some day.
    new = {"structured_outputs": {"json": CITY | {"properties": CITY["properties"] | {f"new{number}": CITY}}}}
    kinds: list[tuple[str, dict[str, Any], bool]] = [
        (TEXT, {"prompt": "w5", "n": 8, "max_tokens": 40, **schema}, False),
        (TEXT, {"prompt": f"w{number}", "max_tokens": 40, **new}, False),
        (TEXT, {"prompt": "w5", "max_tokens": 40, "structured_outputs": {"regex": "(w[0-9] ?)*"}}, False),
        (TEXT, {"prompt": "w5", "max_tokens": 20, "guided_grammar": f'root ::= "w{number % 3}" [a-z ]*'}, False),
        (TEXT, {"prompt": [17] * 300, "echo": True, "logprobs": 20, "max_tokens": 0, "n": 4}, False),
        (TEXT, {"prompt": "w5", "logprobs": 20, "max_tokens": 200, "ignore_eos": True}, False),
        (CHAT, {"messages": USER, "tools": [TOOL], "tool_choice": "required", "max_tokens": 200}, False),
        (GENERATE, {"prompt": "w5 w6", "max_tokens": 60, "compare": True, "ignore_eos": True}, False),
        (GENERATE, {"prompt": "w5 w7", "max_tokens": 60, "ignore_eos": True}, False),
        (TEXT, {"prompt": "w5", "structured_outputs": {"regex": "(?=a)"}}, False),
        (TEXT, {"prompt": "w5", "guided_grammar": f"root ::= {slow}", "timeout_s": 0.1}, False),
        (GENERATE, {"prompt": "w5", "max_tokens": 900, "ignore_eos": True, "stream": True}, True),
        (TEXT, {"prompt": "w5", "n": 8, "max_tokens": 900, "stream": True, "logprobs": 5, "ignore_eos": True}, True),
        (TEXT, {"prompt": "w5", "n": 8, "max_tokens": 900, "stream": True, **schema}, True),
    ]
    return kinds * 4


def ask(port: int, path: str, body: dict[str, Any], leaves: bool) -> int:
    """The status of the answer, which is read as a whole unless the client leaves."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read(200 if leaves else None)
    connection.close()
    return response.status


def resident_mb(port: int) -> tuple[float, float]:
    """Memory of the web and of the engine, as /metrics has it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    sizes = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(MEMORY))
    web, engine = (float(sizes[name]) / (1 << 20) for name in MEMORY)
    return web, engine


MEMORY = ("process_resident_memory_bytes", "ottava_engine_process_resident_memory_bytes")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
