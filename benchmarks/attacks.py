"""What a well-behaved client feels while another one attacks: the longest gap of its stream, and how it is answered.

    python -m benchmarks.attacks

A server of a tiny random model is started, so that the server's own work is what is measured and not the model's. The
attacks are what one key, or a client without one, may send; each lasts --seconds. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paced import made_backend
from benchmarks.processes import free_port, served
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.report import RESULTS, birth_certificate, write
from benchmarks.shapes import SHAPES

GOOD, BAD, ADMIN = "good-key-for-attacks", "bad-key-for-attacks", "admin-key-for-attacks"
GOAL_MS = 250.0
START_S = 120.0
CONNECTIONS = 2
CHUNKS = b"1\r\na\r\n" * 20_000

Attack = Callable[[int, float], str]
"""(port, seconds) -> what was sent or answered, in words."""


@dataclass(slots=True)
class Stream:
    """A client that reads one answer after the other, and notes the times between events."""

    port: int
    gaps_s: list[float] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)
    is_over: bool = False

    def run(self) -> None:
        while not self.is_over:
            body = {"prompt": "w5 w6", "max_tokens": 400, "ignore_eos": True, "stream": True}
            connection, response = ask(self.port, "/generate", body, GOOD)
            self.statuses.add(response.status)
            last_s = time.perf_counter()
            while not self.is_over and response.readline():
                now_s = time.perf_counter()
                self.gaps_s.append(now_s - last_s)
                last_s = now_s
            connection.close()


def main() -> int:
    args = _arguments()
    certificate = birth_certificate(args.commit)
    with tempfile.TemporaryDirectory() as scratch, _served(Path(scratch)) as port:
        rows = [measured(name, attack, port, args.seconds) for name, attack in ATTACKS.items()]
    write(args.out or RESULTS / "attacks-cpu.json", certificate, rows)
    for row in rows:
        print(f"{row['attack']:<52}{row['longest_gap_ms']:>8.0f} ms{row['p99_gap_ms']:>8.1f} ms  {row['said']}")
    print(json.dumps(rows))
    return 0 if all(row["longest_gap_ms"] < GOAL_MS and row["statuses"] == [200] for row in rows) else 1


def measured(name: str, attack: Attack, port: int, seconds: float) -> dict[str, Any]:
    """The gaps of a stream beside an attack."""
    stream = Stream(port)
    thread = threading.Thread(target=stream.run, daemon=True)
    thread.start()
    time.sleep(0.5)
    stream.gaps_s.clear()
    said = attack(port, seconds)
    stream.is_over = True
    thread.join(10)
    gaps_ms = sorted(1e3 * gap for gap in stream.gaps_s)
    return {
        "attack": name,
        "said": said,
        "events": len(gaps_ms),
        "longest_gap_ms": gaps_ms[-1],
        "p99_gap_ms": gaps_ms[int(0.99 * len(gaps_ms))],
        "statuses": sorted(stream.statuses),
    }


def chunks_of_one_byte(head: bytes) -> Attack:
    """Bodies in chunks of one byte, as fast as the server takes them, over and over."""

    def one(port: int, until_s: float, sent: list[int]) -> None:
        while time.perf_counter() < until_s:
            with socket.create_connection(("127.0.0.1", port), 5) as connection:
                connection.settimeout(5)
                try:
                    connection.sendall(head)
                    while time.perf_counter() < until_s:
                        connection.sendall(CHUNKS)
                        sent.append(len(CHUNKS))
                except OSError:
                    continue  # the server has hung up

    def attack(port: int, seconds: float) -> str:
        until_s, sent = time.perf_counter() + seconds, list[int]()
        threads = [threading.Thread(target=one, args=(port, until_s, sent)) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return f"{sum(sent) / 1e6:.0f} MB sent"

    return attack


def requests_of(path: str, body: dict[str, Any], key: str = BAD) -> Attack:
    """One request after the other."""

    def attack(port: int, seconds: float) -> str:
        until_s, statuses = time.perf_counter() + seconds, Counter[int]()
        while time.perf_counter() < until_s:
            connection, response = ask(port, path, body, key)
            response.read()
            connection.close()
            statuses[response.status] += 1
        return ", ".join(f"{count} x HTTP {status}" for status, count in sorted(statuses.items()))

    return attack


def ask(
    port: int, path: str, body: dict[str, Any], key: str
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request("POST", path, json.dumps(body), headers)
    return connection, connection.getresponse()


def _head(line: str, key: str | None = None) -> bytes:
    keyed = "" if key is None else f"Authorization: Bearer {key}\r\n"
    kind = "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\n{keyed}{kind}".encode()


def _of_alternatives(count: int) -> dict[str, Any]:
    return {"json": {"anyOf": [{"type": "array", "items": {"type": "string"}, "minItems": 1}] * count}}


ROWS = {"prompt": "w5", "n": 128, "max_tokens": 300, "ignore_eos": True}
SCORES = {"prompt": [17] * 400, "n": 24, "echo": True, "logprobs": 20, "max_tokens": 0}
SCHEMA = {"prompt": "w5", "n": 16, "max_tokens": 24, "structured_outputs": _of_alternatives(120)}


def nothing(_: int, seconds: float) -> str:
    time.sleep(seconds)
    return ""


ATTACKS: dict[str, Attack] = {
    "none": nothing,
    "chunks of one byte, without a key, GET /health": chunks_of_one_byte(_head("GET /health")),
    "chunks of one byte, without a key, POST /generate": chunks_of_one_byte(_head("POST /generate")),
    "chunks of one byte, with a key, POST /generate": chunks_of_one_byte(_head("POST /generate", BAD)),
    "128 answers at once": requests_of("/v1/completions", ROWS),
    "9,600 echoed tokens with 20 log-probabilities each": requests_of("/v1/completions", SCORES),
    "a schema of 120 alternatives, 16 answers": requests_of("/v1/completions", SCHEMA),
    "reloads, with a key that is no admin key": requests_of("/admin/reload", {"model": "/"}),
}


@contextmanager
def _served(scratch: Path) -> Iterator[int]:
    folder, port = scratch / "model", free_port()
    write_checkpoint(folder, "tiny", is_int8=True, max_model_len=1024)
    # With words alone no JSON could be written.
    made_backend(SHAPES["tiny"].vocab_size).save(str(folder / "tokenizer.json"))
    keys = {"OTTAVA_API_KEYS": f"good:{GOOD},bad:{BAD}", "OTTAVA_ADMIN_API_KEYS": f"op:{ADMIN}"}
    command = [sys.executable, "-m", "service", "serve", str(folder), "--variants", "w8a8", "--port", str(port)]
    with served(command, f"http://127.0.0.1:{port}/ready", scratch / "log", START_S, keys):
        yield port


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each attack")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
