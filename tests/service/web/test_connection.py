"""Clients that are slow, flood, or speak no HTTP, over a real socket."""

import asyncio
import errno
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

import httpx
import pytest
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from service.web.connection import BoundedProtocol
from service.web.uvicorn_config import allow_open_files
from tests.service.kinds import Samples
from tests.support.fake_engine import FakeEngine
from tests.support.harness import DEADLINE_S, app_of, metrics_of, server_of, two_engines, until

GENERATE = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Connect(Protocol):
    def __call__(self, port: int, receive_buffer: int | None = None) -> socket.socket: ...


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Opens client sockets, which are closed after the test whatever happens in it."""
    clients: list[socket.socket] = []

    def connect(port: int, receive_buffer: int | None = None) -> socket.socket:
        client = socket.socket()
        clients.append(client)
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", port))
        return client

    yield connect
    for client in clients:
        client.close()


async def send(client: socket.socket, data: str | bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(client, data.encode() if isinstance(data, str) else data)


async def read_all(client: socket.socket, limit_s: float = 10.0) -> bytes:
    """Whatever comes until the server closes."""
    received = b""
    async with asyncio.timeout(limit_s):
        while chunk := await _some(client):
            received += chunk
    return received


async def _some(client: socket.socket) -> bytes:
    try:
        return await asyncio.get_running_loop().sock_recv(client, 1 << 16)
    except ConnectionResetError:
        return b""


def generate(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    return f"{GENERATE}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def is_alive(port: int) -> bool:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        return (await client.get("/health")).status_code == 200


def parsed(received: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def long_stream(**settings: Any) -> tuple[dict[str, FakeEngine], FastAPI]:
    """An app whose answers are larger than every buffer between server and client."""
    # One step brings 2,000 tokens with 20 log-probabilities each: about 1 MB of an event.
    engines = two_engines(tokens_per_step=2000, max_model_len=1 << 20, delay_s=0.001)
    return engines, app_of(engines, max_logprobs=1 << 26, **settings)


LONG = {"prompt": "a", "max_tokens": 60_000, "ignore_eos": True, "stream": True, "logprobs": 20}


def test_a_client_that_does_not_read_is_cut_off_and_what_it_held_is_freed(connect: Connect) -> None:
    async def go() -> tuple[float, bytes, FakeEngine, Samples]:
        engines, app = long_stream(send_timeout_s=0.3)
        async with server_of(app) as port:
            client = connect(port, receive_buffer=4096)
            await send(client, generate(LONG))
            start_s = time.perf_counter()
            await until(lambda: bool(engines["w8a8"].submitted))
            await until(lambda: app.state.serving.traffic.num_active == 0)
            took_s = time.perf_counter() - start_s
            received = await read_all(client)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as other:
                return took_s, received, engines["w8a8"], await metrics_of(other)

    took_s, received, engine, samples = asyncio.run(go())
    assert took_s >= 0.3
    assert b"200 OK" in received
    assert b"[DONE]" not in received
    assert not engine.active
    assert samples["ottava_requests_total", "outcome=abort", "variant=w8a8"] == 1


def test_no_more_than_an_event_waits_in_memory(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next event is not made before the one before has gone to the kernel."""

    async def go() -> tuple[list[int], int]:
        _, app = long_stream(send_timeout_s=30)
        async with server_of(app) as port:
            client = connect(port, receive_buffer=4096)
            transports = _spy_on_transports(monkeypatch)
            await send(client, generate(LONG))
            sizes = []
            for _ in range(50):
                await asyncio.sleep(0.01)
                sizes.append(sum(transport.get_write_buffer_size() for transport in transports))
            (state,) = app.state.serving.limits._num_active.values()
            client.close()
            await until(lambda: app.state.serving.traffic.num_active == 0)
            return sizes, state

    sizes, num_active = asyncio.run(go())
    assert num_active == 1
    assert 0 < max(sizes) < 4 << 20, max(sizes)
    assert sizes[-1] == sizes[-10]


def _spy_on_transports(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Transport]:
    transports: list[asyncio.Transport] = []
    original = BoundedProtocol.pause_writing

    def pause_writing(self: BoundedProtocol) -> None:
        if self.transport not in transports:
            transports.append(self.transport)
        original(self)

    monkeypatch.setattr(BoundedProtocol, "pause_writing", pause_writing)
    return transports


def test_a_client_that_reads_slowly_gets_everything(connect: Connect) -> None:
    async def go() -> bytes:
        _, app = long_stream(send_timeout_s=1.0)
        async with server_of(app) as port:
            client = connect(port, receive_buffer=1 << 16)
            await send(client, generate({**LONG, "max_tokens": 6000}))
            received = b""
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(30):
                while b"[DONE]" not in received[-100:]:
                    received += await loop.sock_recv(client, 1 << 17)
                    await asyncio.sleep(0.02)
            client.close()
            return received

    received = asyncio.run(go())
    assert received.count(b'"usage"') == 1


def test_a_client_that_reads_one_long_answer_slowly_gets_all_of_it(connect: Connect) -> None:
    """The answer takes longer than send_timeout_s, and no pause does."""

    async def go() -> tuple[bytes, float]:
        _, app = long_stream(send_timeout_s=2.0)
        async with server_of(app) as port:
            client = connect(port, receive_buffer=1 << 16)
            await send(client, generate({**LONG, "stream": False, "max_tokens": 16_000}))
            received, start_s = await _some(client), time.perf_counter()
            length = int(received.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            while len(received) < length and (part := await _some(client)):
                received += part
                await asyncio.sleep(0.02)
            return received, time.perf_counter() - start_s

    received, took_s = asyncio.run(go())
    assert took_s > 2.0
    assert json.loads(received.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 16_000


def test_the_others_are_served_while_one_does_not_read(connect: Connect) -> None:
    async def go() -> list[int]:
        engines, app = long_stream(send_timeout_s=20)
        async with server_of(app) as port:
            client = connect(port, receive_buffer=4096)
            await send(client, generate(LONG))
            await until(lambda: bool(engines["w8a8"].submitted))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as other:
                answers = [await other.post("/generate", json={"prompt": "a"}) for _ in range(5)]
            client.close()
            return [answer.status_code for answer in answers]

    assert asyncio.run(go()) == [200] * 5


def test_a_deadline_frees_the_engine_even_where_the_client_does_not_read(connect: Connect) -> None:
    async def go() -> None:
        engines = two_engines(tokens_per_step=1000, max_model_len=1 << 20, delay_s=0.005)
        app = app_of(engines, send_timeout_s=600, request_timeout_s=0.3, max_logprobs=1 << 26)
        async with server_of(app) as port:
            client = connect(port, receive_buffer=4096)
            await send(client, generate({**LONG, "max_tokens": 1_000_000}))
            await until(lambda: bool(engines["w8a8"].submitted))
            await until(lambda: not engines["w8a8"].active)
            client.close()
            await until(lambda: app.state.serving.traffic.num_active == 0)

    asyncio.run(go())


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
        f"{GENERATE}Content-Length: 100\r\n\r\n".encode(),
        f"{GENERATE}Content-Length: 100\r\n\r\n{{".encode(),
        f"{GENERATE}Transfer-Encoding: chunked\r\n\r\n5\r\n12".encode(),
    ],
)
@pytest.mark.parametrize("trickles", [False, True])
def test_a_request_that_does_not_arrive_is_cut_off(connect: Connect, beginning: bytes, trickles: bool) -> None:
    async def go() -> tuple[float, bool]:
        app = app_of(two_engines(), receive_timeout_s=0.3)
        async with server_of(app) as port:
            client = connect(port)
            start_s = time.perf_counter()
            await send(client, beginning)
            if trickles:
                reading = asyncio.ensure_future(read_all(client))
                while not reading.done() and time.perf_counter() - start_s < DEADLINE_S:
                    await asyncio.sleep(0.05)
                    try:
                        await send(client, b" " if beginning else b"G")
                    except OSError:
                        break
                await reading
            else:
                await read_all(client)
            took_s = time.perf_counter() - start_s
            client.close()
            await until(lambda: not app.state.serving.limits._num_active)
            return took_s, await is_alive(port)

    took_s, alive = asyncio.run(go())
    assert 0.2 < took_s < DEADLINE_S
    assert alive


def test_an_idle_connection_lives_as_long_as_keep_alive_says() -> None:
    async def go() -> list[float]:
        app = app_of(two_engines(), receive_timeout_s=0.2, keep_alive_s=3)
        async with server_of(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            times = []
            for _ in range(2):
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b"200 OK" in await reader.readuntil(b"}")
                await asyncio.sleep(0.5)
            start_s = time.perf_counter()
            assert await reader.read() == b""
            times.append(time.perf_counter() - start_s)
            writer.close()
            return times

    (waited_s,) = asyncio.run(go())
    assert 1 < waited_s < DEADLINE_S


def test_a_slow_answer_is_not_cut_off_by_the_receive_timeout() -> None:
    async def go() -> httpx.Response:
        app = app_of(two_engines(delay_s=0.15), receive_timeout_s=0.2, send_timeout_s=0.2)
        async with server_of(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            return await client.post("/generate", json={"prompt": "a"})

    assert asyncio.run(go()).json()["text"] == "hello"


def refused(connect: Connect, data: bytes, **settings: Any) -> tuple[int, dict[str, Any]]:
    async def go() -> tuple[tuple[int, dict[str, Any]], bool]:
        async with server_of(app_of(two_engines(), **settings)) as port:
            client = connect(port)
            with suppress(ConnectionResetError, BrokenPipeError):
                await send(client, data)
            received = await read_all(client)
            client.close()
            return parsed(received), await is_alive(port)

    answer, alive = asyncio.run(go())
    assert alive
    assert set(answer[1]) == {"message", "type", "param", "code"}
    return answer


@pytest.mark.parametrize(
    "headers", [b"a:\r\n" * 5000, b"x-long: " + b"y" * 20_000 + b"\r\n", b"x-" + b"n" * 20_000 + b": y\r\n"]
)
def test_a_flood_of_headers_is_refused(connect: Connect, headers: bytes) -> None:
    status, error = refused(connect, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + headers)
    assert status == 431
    assert "16384 bytes" in error["message"]


def test_a_long_path_is_refused(connect: Connect) -> None:
    assert refused(connect, b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n")[0] == 431


def test_the_size_of_a_head_is_a_setting(connect: Connect) -> None:
    head = b"GET /info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nx-long: " + b"y" * 3000 + b"\r\n\r\n"

    async def status(max_header_bytes: int) -> int:
        async with server_of(app_of(two_engines(), max_header_bytes=max_header_bytes)) as port:
            client = connect(port)
            # In two parts: a head that is complete with its first byte over the limit is not incomplete.
            await send(client, head[:2500])
            await asyncio.sleep(0.05)
            await send(client, head[2500:])
            received = await read_all(client)
            client.close()
            return int(received.split()[1])

    assert [asyncio.run(status(limit)) for limit in (2048, 8192)] == [431, 200]


def test_ten_connections_that_flood_at_once_hurt_nobody(connect: Connect) -> None:
    async def flood(port: int) -> None:
        client = connect(port)
        with suppress(OSError):
            await send(client, b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 200_000)
        client.close()

    async def go() -> list[int]:
        async with server_of(app_of(two_engines())) as port:
            floods = [asyncio.ensure_future(flood(port)) for _ in range(10)]
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                answers = [await client.post("/generate", json={"prompt": "a"}) for _ in range(10)]
            await asyncio.gather(*floods)
            return [answer.status_code for answer in answers]

    assert asyncio.run(go()) == [200] * 10


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
        b"GET / HTTP/one\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_one_shape(connect: Connect, data: bytes) -> None:
    status, error = refused(connect, data)
    assert status in (400, 501)
    assert error["message"].startswith("invalid HTTP request")


def test_a_broken_chunk_ends_the_request(connect: Connect) -> None:
    async def go() -> tuple[bytes, bool]:
        app = app_of(two_engines())
        async with server_of(app) as port:
            client = connect(port)
            await send(client, f"{GENERATE}Transfer-Encoding: chunked\r\n\r\nzz\r\n")
            received = await read_all(client)
            client.close()
            await until(lambda: not app.state.serving.limits._num_active)
            return received, await is_alive(port)

    received, alive = asyncio.run(go())
    assert parsed(received)[0] == 400
    assert alive


def test_a_body_above_the_limit_is_answered_over_a_socket() -> None:
    async def go() -> tuple[httpx.Response, httpx.Response]:
        app = app_of(two_engines(), max_body_bytes=4096)
        async with server_of(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            first = await client.post("/generate", content=b" " * (8 << 20))
            return first, await client.post("/generate", json={"prompt": "a"})

    first, again = asyncio.run(go())
    assert (first.status_code, first.json()["error"]["code"]) == (413, "body_too_large")
    assert again.status_code == 200


LAST = "Connection: close\r\n"
TOO_LARGE = {
    "told": f"{GENERATE}{LAST}Content-Length: {8 << 20}\r\n\r\n".encode() + b" " * (8 << 20),
    "in one chunk": f"{GENERATE}{LAST}Transfer-Encoding: chunked\r\n\r\n800000\r\n".encode() + b" " * (8 << 20),
    "a head": GENERATE.encode() + b"a: b\r\n" * (1 << 20),
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_whoever_sends_too_much_to_the_end_before_it_reads_is_told_why(connect: Connect, what: str) -> None:
    """Closing the socket instead would reset the connection: the client finds that, and no answer."""

    async def go() -> tuple[bytes, bool]:
        async with server_of(app_of(two_engines(), max_body_bytes=4096)) as port:
            client = connect(port, receive_buffer=4096)
            await send(client, TOO_LARGE[what])
            received = await read_all(client)
            # The client holds its side open: the server is not to wait for it when it ends.
            return received, await is_alive(port)

    received, alive = asyncio.run(go())
    assert parsed(received)[0] == (431 if what == "a head" else 413)
    assert alive


def test_whoever_never_stops_sending_is_cut_off_although_it_was_answered(connect: Connect) -> None:
    async def go() -> tuple[float, bool]:
        app = app_of(two_engines(), max_body_bytes=4096, receive_timeout_s=0.3)
        async with server_of(app) as port:
            client = connect(port)
            await send(client, f"{GENERATE}{LAST}Content-Length: {1 << 40}\r\n\r\n")
            start_s = time.perf_counter()
            with suppress(ConnectionError):
                while time.perf_counter() < start_s + DEADLINE_S:
                    await send(client, b" " * (1 << 16))
                    await asyncio.sleep(0.01)
            return time.perf_counter() - start_s, await is_alive(port)

    took_s, alive = asyncio.run(go())
    assert 0.2 < took_s < DEADLINE_S
    assert alive


def test_a_client_that_has_reset_its_connection_when_it_is_hung_up_on(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system then refuses to close our side. That must end this connection alone, and quietly."""
    refused: list[int] = []

    def write_eof(_: object) -> None:
        refused.append(1)
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr("asyncio.selector_events._SelectorSocketTransport.write_eof", write_eof)

    async def go() -> tuple[bool, bool]:
        async with server_of(app_of(two_engines(), max_body_bytes=4096)) as port:
            client = connect(port)
            await send(client, f"{GENERATE}{LAST}Content-Length: {1 << 40}\r\n\r\n")
            with suppress(ConnectionError):
                while not refused:
                    await send(client, b" " * (1 << 16))
                    await asyncio.sleep(0.01)
            async with asyncio.timeout(DEADLINE_S):
                await read_all(client)
            return bool(refused), await is_alive(port)

    assert asyncio.run(go()) == (True, True)
    assert "Traceback" not in caplog.text


def test_a_fault_in_parsing_one_connection_costs_the_others_nothing(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They parse in each other's turns: the faulty one comes first, in the other's call."""
    parse = BoundedProtocol._parse_part

    def faulty(self: BoundedProtocol) -> bool:
        if b"faulty" in self._unparsed:
            raise RuntimeError("a bug")
        return parse(self)

    monkeypatch.setattr(BoundedProtocol, "_parse_part", faulty)

    async def go() -> tuple[bytes, list[int]]:
        async with server_of(app_of(two_engines())) as port, httpx.AsyncClient(timeout=DEADLINE_S) as other:
            bad = connect(port)
            await send(bad, "GET /faulty HTTP/1.1\r\n")
            body = {"prompt": "x", "max_tokens": 2}
            answers = [await other.post(f"http://127.0.0.1:{port}/generate", json=body) for _ in range(3)]
            return await read_all(bad), [answer.status_code for answer in answers]

    assert asyncio.run(go()) == (b"", [200] * 3)
    assert "could not be parsed" in caplog.text


def test_open_files_are_raised_as_far_as_needed_and_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = (1024, 5000)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))
    assert [allow_open_files(n) for n in (100, 4096, 10_000)] == [1024, 4096 + 256, 5000]
    assert asked == [(4096 + 256, 5000), (5000, 5000)]


def test_one_connection_too_many_is_told(connect: Connect) -> None:
    async def go() -> tuple[bytes, bool]:
        async with server_of(app_of(two_engines(), max_connections=3)) as port:
            held = [connect(port) for _ in range(3)]
            for client in held:
                await send(client, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b"200 OK" in await _some(client)
            extra = connect(port)
            received = await read_all(extra)
            held.pop().close()
            await asyncio.sleep(0.05)
            after = await is_alive(port)
            for client in (*held, extra):
                client.close()
            return received, after

    received, after = asyncio.run(go())
    status, error = parsed(received)
    assert (status, error["type"]) == (503, "overloaded_error")
    assert b"retry-after: 1" in received
    assert "3 connections" in error["message"]
    assert after


STREAM = {"prompt": "a", "max_tokens": 40, "stream": True}


def said(body: bytes) -> list[str]:
    """The texts of a stream's events but the last, which is the whole answer; its last line is checked."""
    *events, _, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: "))["text"] for event in events]


def test_a_stream_says_the_same_in_chunks_and_where_there_are_none(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks pass `send` by; what HTTP/1.0 or another server gets does not."""
    through_send: list[bytes] = []
    plain_send = RequestResponseCycle.send

    async def noting_send(cycle: RequestResponseCycle, message: Any) -> None:
        through_send.append(message.get("body", b""))
        await plain_send(cycle, message)

    monkeypatch.setattr(RequestResponseCycle, "send", noting_send)

    async def go() -> tuple[list[str], dict[str, tuple[list[str], int]]]:
        answers = {}
        app = app_of(two_engines())
        async with server_of(app) as port:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                for turn in ("first", "second"):
                    content = (await client.post("/generate", json=STREAM)).content
                    answers[turn] = said(content), len(through_send)
                    through_send.clear()
            old = connect(port)
            await send(old, generate(STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
            head, _, content = (await read_all(old)).partition(b"\r\n\r\n")
            assert b"chunked" not in head
            answers["HTTP/1.0"] = said(content), len(through_send)
            other = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=other, base_url="http://127.0.0.1") as client:
                elsewhere = said((await client.post("/generate", json=STREAM)).content)
        return elsewhere, answers

    elsewhere, answers = asyncio.run(go())
    assert elsewhere
    assert {"".join(texts) for texts, _ in answers.values()} == {"".join(elsewhere)}
    # The head, and the end; without chunks every event, the whole answer and [DONE] too.
    num_old = len(answers["HTTP/1.0"][0])
    assert [num for _, num in answers.values()] == [2, 2, 2 + num_old + 2]
