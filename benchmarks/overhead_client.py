"""The clients of `benchmarks.overhead`, in a process of their own: requests over loopback, timed as they are answered.

    python -m benchmarks.overhead_client        a job as a line of JSON on stdin, its answer as one on stdout

Bare sockets and no HTTP library, so that a client costs little beside the server that it measures. Bytes are noted with
the time they came and read as HTTP and events only afterwards. Nothing of ottava or torch is imported.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

HOST = "127.0.0.1"
END = b"0\r\n\r\n"
"""Of a chunked body; no event ends so, since those end with two newlines."""

TIMEOUT_S = 120.0

Arrivals = list[tuple[float, bytes]]
"""What one client received, and when."""


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        started_s = time.process_time()
        answer = KINDS[job.pop("kind")](**job)
        print(json.dumps({"answer": answer, "cpu_s": time.process_time() - started_s}), flush=True)


def at_once(port: int, path: str, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """All requests sent at once, each on a connection of its own: when they went out, and when each token came in."""
    sockets = [connection(port) for _ in bodies]
    requests = [post(path, body) for body in bodies]
    arrivals: list[Arrivals] = [[] for _ in bodies]
    with selectors.DefaultSelector() as selector:
        for number, one in enumerate(sockets):
            one.setblocking(False)
            selector.register(one, selectors.EVENT_READ, number)
        started_s = time.perf_counter()
        for one, request in zip(sockets, requests, strict=True):
            one.sendall(request)
        num_left = len(bodies)
        while num_left:
            ready = selector.select(TIMEOUT_S)
            if not ready:
                raise TimeoutError(f"{path}: nothing came for {TIMEOUT_S} s")
            for key, _ in ready:
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                arrivals[key.data].append((time.perf_counter(), data))
                if not data or data.endswith(END):
                    selector.unregister(key.fileobj)
                    num_left -= 1
    for one in sockets:
        one.close()
    num_events = sum(b"".join(data for _, data in came).count(b"data: {") for came in arrivals)
    return {
        "started_s": started_s,
        "tokens_s": [token_times(came, path) for came in arrivals],
        "num_events": num_events,
    }


def first_event_s(port: int, path: str, bodies: list[dict[str, Any]]) -> list[float]:
    """One request after the other on one connection: seconds from sending each to its first event."""
    took = []
    with connection(port) as one:
        for body in bodies:
            request, data = post(path, body), b""
            started_s = time.perf_counter()
            one.sendall(request)
            while b"data: " not in data or b"\n\n" not in data:
                data += received(one)
            took.append(time.perf_counter() - started_s)
            while not data.endswith(END):
                data += received(one)
            token_times([(0.0, data)], path)
    return took


def floor_s(port: int, path: str, count: int) -> list[float]:
    """Seconds that requests take which the server answers with next to no work."""
    took = []
    request = f"GET {path} HTTP/1.1\r\nhost: {HOST}:{port}\r\n\r\n".encode()
    with connection(port) as one:
        for _ in range(count):
            started_s = time.perf_counter()
            one.sendall(request)
            data = b""
            while not data.endswith(b"}"):
                data += received(one)
            took.append(time.perf_counter() - started_s)
    return took


def token_times(arrivals: Arrivals, path: str) -> list[float]:
    """When each token of a stream came, by the arrival of its event's end.

    OpenAI's events do not say how many tokens they bring. Where there are fewer events than tokens, an event has the
    share of the tokens that it has of the text.

    Raises:
        ValueError: the stream is not 200, does not end with [DONE], or brought another number of tokens than it tells;
            of OpenAI's, more events than tokens.
    """
    body = b"".join(data for _, data in arrivals)
    head, _, chunked = body.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200") or not chunked.endswith(END):
        raise ValueError(f"{path}: {body[:400]!r}")
    ends = []
    num_bytes = 0
    for time_s, data in arrivals:
        num_bytes += len(data)
        ends.append((num_bytes, time_s))
    times: list[float] = []
    lengths: list[int] = []
    told = place = 0
    at = len(head) + 4
    last = b""
    while (size := int(body[at : body.index(b"\r\n", at)], 16)) > 0:
        at = body.index(b"\r\n", at) + 2
        last = body[at : at + size]
        at += size + 2
        while ends[place][0] < at:
            place += 1
        count, length, metrics = _read(last)
        times += [ends[place][1]] * count
        lengths += [length] * count
        told = told or metrics
    if "/v1/" in path and len(times) < told:
        times = _spread(times, lengths, told)
    if last != b"data: [DONE]\n\n" or told != len(times):
        raise ValueError(f"{path}: {told} tokens told, {len(times)} came, and last {last[:400]!r}")
    return times


def _spread(times: list[float], lengths: list[int], num_tokens: int) -> list[float]:
    """The events' times, each as often as its length of all lengths makes of so many tokens."""
    total, so_far = sum(lengths), 0
    spread: list[float] = []
    for time_s, length in zip(times, lengths, strict=True):
        so_far += length
        spread += [time_s] * (round(num_tokens * so_far / total) - len(spread))
    return spread


def _read(event: bytes) -> tuple[int, int, int]:
    """How many tokens an event brought, the length of its text, and how many tokens its metrics tell of at the end."""
    if event == b"data: [DONE]\n\n":
        return 0, 0, 0
    body = json.loads(event.removeprefix(b"data: "))
    if "choices" in body:
        # One token at least: none of these streams has a stop string.
        (choice,) = body["choices"]
        return 1, len(choice["text"]), choice.get("metrics", {}).get("generated_tokens", 0)
    if "metrics" in body:
        return 0, 0, body["metrics"]["generated_tokens"]
    return len(body["token_ids"]), 0, 0


def connection(port: int) -> socket.socket:
    one = socket.create_connection((HOST, port), timeout=TIMEOUT_S)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one


def post(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


def received(one: socket.socket) -> bytes:
    data = one.recv(1 << 16)
    if not data:
        raise ConnectionError("the server closed the connection")
    return data


KINDS: dict[str, Callable[..., object]] = {"streams": at_once, "first": first_event_s, "floor": floor_s}
"""What a job can be; each takes the rest of the job as its arguments."""


if __name__ == "__main__":
    main()
