"""Clients that behave badly: they do not read, they vanish, they send what is no request."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterable
from contextlib import suppress

from benchmarks.faults.bench import LONG_TOKENS, MAX_MODEL_LEN, Bench, ask_all, questions
from benchmarks.faults.case import Case
from benchmarks.faults.clients import Kind, Question, Seen, ask, encoded, parse, posted

TIMEOUT_S = 2
"""Of servers here: after which who does not read or send is cut off."""

MAX_BODY_BYTES = 1 << 20
NUM_EACH = 10


async def slow_readers(bench: Bench, case: Case) -> None:
    """Clients that ask for megabytes and read nothing are cut off; the others do not notice."""
    num_slow, num_others = 8, 100
    case.done = f"{num_slow} clients that never read streams of up to 9 MB, {num_others} others meanwhile"
    body = Question("Once upon a time", MAX_MODEL_LEN - 64, stream=True).body | {"logprobs": 20}
    # Each of them may fill a context to its end.
    with bench.serve("--send-timeout-s", str(TIMEOUT_S), num_kv_tokens=2 * num_slow * MAX_MODEL_LEN) as server:
        async with case.watching(server):
            slow = [await _unread(server.port, posted(json.dumps(body).encode())) for _ in range(num_slow)]
            try:
                case.take(await ask_all(server.port, questions(num_others, 24)), bench.answers)
                await server.blocks_in_use(60.0)
                await case.expect_counted(server, {"length": num_others, "abort": num_slow, "error": 0})
                seen = [parse(received) for received in await asyncio.gather(*map(_rest, slow))]
            finally:
                for client in slow:
                    client.close()
            case.expect_equal({one.kind for one in seen}, {Kind.CUT}, "how their streams end")
            case.expect(all(one.is_consistent for one in seen), "a stream that was cut off says [DONE]")
            case.seen[f"{Kind.CUT} after {TIMEOUT_S} s"] += num_slow
            case.ends[Kind.CUT] += num_slow


async def vanishing(bench: Bench, case: Case) -> None:
    """Half of all streams are reset in their midst."""
    asked = [Question(question.prompt, LONG_TOKENS, question.variant, True) for question in questions(200, 1)]
    case.done = f"{len(asked)} streams, every other one reset after its third event"
    with bench.serve() as server:
        async with case.watching(server):

            async def one(place: int, question: Question) -> tuple[Question, Seen]:
                leaves = (lambda received: received.count(b"data: ") >= 3) if place % 2 else None
                return question, await ask(server.port, question, leaves=leaves)

            pairs = await asyncio.gather(*(one(place, question) for place, question in enumerate(asked)))
            seen = case.take(pairs, bench.answers, (Kind.ANSWERED, Kind.LEFT))
            case.expect_equal((seen["200 length"], seen["left"]), (100, 100), "answered and left")
            await server.blocks_in_use()
            await case.expect_counted(server, {"length": 100, "abort": 100, "error": 0})


def broken_bodies() -> dict[str, tuple[bytes, str]]:
    """What it is -> the bytes of a request, and what its client must see."""
    whole = Question("Water boils", 8).body
    chunked = {"content-length": "", "transfer-encoding": "chunked", "connection": "close"}
    closing = {"connection": "close"}

    def said(content: bytes | dict[str, object]) -> bytes:
        return posted(content if isinstance(content, bytes) else json.dumps(content).encode(), closing)

    big = json.dumps(whole | {"prompt": "a" * 8 * MAX_BODY_BYTES}).encode()
    chunks = b"%x\r\n%s\r\n" % (len(big), big) + b"0\r\n\r\n"
    return {
        "a body that says it is too long": (
            posted(b"", closing | {"content-length": "99999999"}),
            "413 body_too_large",
        ),
        "8 MB, sent to the end before reading": (said(big), "413 body_too_large"),
        "8 MB in a chunk": (posted(b"", chunked) + chunks, "413 body_too_large"),
        "a body that is no JSON": (said(b'{"prompt": '), "422 malformed"),
        "an empty body": (said(b""), "422 malformed"),
        "a list": (said(b"[]"), "422 malformed"),
        "100,000 brackets": (said(b"[" * 100_000), "400 invalid_value"),
        "bytes that are no UTF-8": (said(b'{"prompt": "\xff\xfe"}'), "400 invalid_value"),
        "half a surrogate pair": (said(b'{"prompt": "\\ud800"}'), "400 invalid_value"),
        "a number of 5,000 digits": (said(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"), "400 invalid_value"),
        "NaN": (said(b'{"prompt": "a", "temperature": NaN}'), "400 invalid_value"),
        "a field that there is not": (said(whole | {"beam": 4}), "422 malformed"),
        "a prompt that is no text": (said(whole | {"prompt": {"a": 1}}), "422 malformed"),
        "a token that there is not": (said({"prompt_ids": [1 << 40]}), "400 invalid_value"),
        "no tokens to generate": (said(whole | {"max_tokens": 0}), "400 invalid_value"),
        "a prompt longer than the context": (said(whole | {"prompt": "a" * 50_000}), "400 context_length_exceeded"),
        "a variant that there is not": (said(whole | {"variant": "int4"}), "404 variant_not_found"),
        "half a body, then silence": (said(b"{}").replace(b"length: 2", b"length: 9"), Kind.CUT),
        "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "400 bad_request"),
    }


async def bodies(bench: Bench, case: Case) -> None:
    """Bodies too long and wrong in every way, among good ones."""
    bad, num_good = broken_bodies(), 100
    case.done = f"{NUM_EACH} each of {len(bad)} kinds of bad body, {num_good} good ones among them"
    limits = ("--max-body-bytes", str(MAX_BODY_BYTES), "--receive-timeout-s", str(TIMEOUT_S))
    with bench.serve(*limits) as server:
        async with case.watching(server):
            good = asyncio.ensure_future(ask_all(server.port, questions(num_good, 24)))
            await _expect_each(case, server.port, bad)
            case.take(await good, bench.answers)
            await case.expect_counted(server, {"length": num_good, "abort": 0, "error": 0})


async def headers(bench: Bench, case: Case) -> None:
    """Heads without end, in every direction, and too slow."""
    good_head = encoded(Question("Water boils", 8)).partition(b"\r\n")
    many = b"".join(b"x-%d: %s\r\n" % (number, b"a" * 20) for number in range(10_000))
    too_long = "431 request_header_fields_too_large"
    bad = {
        "10,000 headers": (good_head[0] + b"\r\n" + many + good_head[2], too_long),
        "a header of 1 MB": (good_head[0] + b"\r\nx-big: " + b"a" * (1 << 20) + b"\r\n" + good_head[2], too_long),
        "a path of 1 MB": (b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", too_long),
        "a header without a name": (good_head[0] + b"\r\n: nameless\r\n" + good_head[2], "400 bad_request"),
    }
    num_slow, num_good = 100, 100
    case.done = (
        f"{NUM_EACH} each of {', '.join(bad)}; {num_slow} that send a byte of a head every 0.2 s; {num_good} good ones"
    )
    with bench.serve("--receive-timeout-s", str(TIMEOUT_S)) as server:
        async with case.watching(server):
            slow = asyncio.gather(*(_dripping(server.port) for _ in range(num_slow)))
            good = asyncio.ensure_future(ask_all(server.port, questions(num_good, 24)))
            await _expect_each(case, server.port, bad)
            case.take(await good, bench.answers)
            durations_s = await slow
            case.seen[f"{Kind.CUT} after {TIMEOUT_S} s"] += num_slow
            case.expect(max(durations_s) < 3 * TIMEOUT_S, f"a slow head was borne for {max(durations_s):.1f} s")
            await case.expect_counted(server, {"length": num_good, "abort": 0, "error": 0})


async def _expect_each(case: Case, port: int, bad: dict[str, tuple[bytes, str]]) -> None:
    async def one(what: str, content: bytes, wanted: str) -> None:
        seen = await ask(port, content)
        case.seen[str(seen)] += 1
        case.expect_equal(str(seen), wanted, what)

    await asyncio.gather(*(one(what, *pair) for what, pair in bad.items() for _ in range(NUM_EACH)))


async def _unread(port: int, request: bytes) -> socket.socket:
    """A connection on which the request was sent and nothing is read, with as little room as the kernel grants."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    await loop.sock_sendall(client, request)
    return client


async def _rest(client: socket.socket) -> bytes:
    """What the kernel still holds for a client that has not read."""
    received, loop = bytearray(), asyncio.get_running_loop()
    with suppress(ConnectionError):
        while chunk := await asyncio.wait_for(loop.sock_recv(client, 1 << 16), 10):
            received += chunk
    return bytes(received)


async def _dripping(port: int) -> float:
    """Send a head a byte at a time until the server ends the connection: the seconds that took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    with suppress(ConnectionError):
        for byte in _bytes(b"POST /generate HTTP/1.1\r\nhost: " + b"a" * 200):
            writer.write(byte)
            await writer.drain()
            with suppress(TimeoutError):
                if not await asyncio.wait_for(reader.read(1), 0.2):
                    break
    writer.close()
    return loop.time() - start_s


def _bytes(content: bytes) -> Iterable[bytes]:
    return (content[place : place + 1] for place in range(len(content)))
