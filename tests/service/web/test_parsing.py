"""Bodies in many small chunks: what they cost, who waits for them, and when their connection is closed."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import h11
import pytest
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer
from hypothesis import example, given
from hypothesis import strategies as st

from service.web.connection import LINGER_BYTES, REST_BYTES
from service.web.parsing import TURN_S, ChunksReader, ParsingTurns, QuickConnection, framed_chunk, read_head
from tests.support.fuzz import thorough
from tests.support.harness import app_of, server_of, two_engines

HEAD = "HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
BYTE = b"1\r\na\r\n"
Reader = Callable[[ReceiveBuffer], h11.Data | h11.EndOfMessage | None]


def read(reader: Reader, parts: list[bytes]) -> tuple[bytes, bool, str, bytes, int]:
    """(body, whether it has ended, why it is invalid, what follows it, events) of a body that comes in these parts."""
    buffer, body, num_events = ReceiveBuffer(), b"", 0
    for part in parts:
        buffer += part
        while True:
            try:
                event = reader(buffer)
            except h11.LocalProtocolError as error:
                return body, False, str(error), b"", num_events
            if event is None:
                break
            num_events += 1
            if isinstance(event, h11.EndOfMessage):
                return body, True, "", bytes(buffer), num_events
            body += event.data
    return body, False, "", bytes(buffer), num_events


@st.composite
def bodies(draw: st.DrawFn) -> list[bytes]:
    """The parts in which a chunked body arrives; it may be broken anywhere and have another request behind it."""
    chunks = draw(st.lists(st.binary(min_size=1, max_size=9), max_size=12))
    extension = draw(st.sampled_from([b"", b";a=b", b"; \t", b" ", b"\t", b";", b";\r", b";x\ny", b"z"]))
    wire = b"".join(b"%x%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    wire += draw(st.sampled_from([b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"", b"G\r\n", b"00000\r\n\r\n"]))
    wire += draw(st.sampled_from([b"", b"GET / HTTP/1.1\r\n\r\n"]))
    at = draw(st.integers(0, len(wire)))
    wire = draw(st.sampled_from([wire, wire[:at] + b"\n" + wire[at:], wire[:at] + wire[at + 1 :]]))
    cuts = sorted(draw(st.lists(st.integers(0, len(wire)), max_size=4)))
    return [wire[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True)]


@given(bodies())
@thorough
def test_chunks_are_read_as_h11_reads_them(parts: list[bytes]) -> None:
    assert read(ChunksReader(), parts)[:4] == read(ChunkedReader(), parts)[:4]


@pytest.mark.parametrize("chunk", [BYTE, b"1;\r\na\r\n", b"1 \r\na\r\n", b"01;a=b\r\na\r\n"])
def test_what_arrives_together_is_one_event_however_many_chunks_it_is(chunk: bytes) -> None:
    body, is_done, *_, num_events = read(ChunksReader(), [chunk * 5000 + b"0\r\n\r\n"])
    assert (body, is_done, num_events) == (b"a" * 5000, True, 2)


def test_a_long_extension_takes_no_longer_than_its_bytes() -> None:
    """With a pattern that backtracks this takes a minute."""
    assert read(ChunksReader(), [BYTE + b"1;" + b" " * 200_000])[0] == b"a"


FIELDS = st.sampled_from(
    [
        b"Host: localhost",
        b"host:localhost",
        b"Content-Length: 5",
        b"content-length: 5, 5",
        b"Content-Length: 7",
        b"Content-Length: -5",
        b"Content-Length: \xb2",
        b"Content-Length: " + b"1" * 21,
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip",
        b"Expect: 100-continue",
        b"Connection: close",
        b"Connection: keep-alive, Upgrade",
        b"Upgrade: websocket",
        b"Accept: */*",
        b"accept: text/html;q=0.9, */*",
        b"X-Empty:",
        b"X-Blank: ",
        b"X-Tab:\tvalue\t",
        b"X-Obs: caf\xe9",
        b"X-Control: a\x01b",
        b"X-Nul: a\x00b",
        b"X-Spaces:   a   b   ",
        b"x_under.score!: 1",
        b"X Space: 1",
        b" folded",
        b": no name",
        b"no colon",
    ]
)


@st.composite
def heads(draw: st.DrawFn) -> list[bytes]:
    """The parts in which a request arrives; its head may be unusual or broken."""
    method = draw(st.sampled_from([b"GET", b"POST", b"POST", b"HEAD", b"CONNECT", b"get", b""]))
    target = draw(st.sampled_from([b"/", b"/v1?a=b", b"/", b"/v1?a=b", b"*", b"http://a/", b"/a b", b"/\xe9"]))
    version = draw(st.sampled_from([*[b"HTTP/1.1"] * 4, b"HTTP/1.0", b"HTTP/2.0", b"http/1.1", b"HTTP/1.1 "]))
    fields = draw(st.sampled_from([[b"Host: localhost"], []])) + draw(st.lists(FIELDS, max_size=4))
    end = draw(st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"]))
    head = end.join([b"%b %b %b" % (method, target, version), *fields, b"", b""])
    wire = draw(st.sampled_from([b"", b"\r\n"])) + head + draw(st.sampled_from([b"", b"hello", b"hello" + head]))
    cuts = sorted(draw(st.lists(st.integers(0, len(wire)), max_size=3)))
    return [wire[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True)]


def events(connection: h11.Connection, parts: list[bytes]) -> list[object]:
    """The events of a request that comes in these parts, or why it is invalid, and the states after it."""
    found: list[object] = []
    try:
        for part in filter(None, parts):
            connection.receive_data(part)
            while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                found.append(event)
                if isinstance(event, h11.Request):
                    found.append(event.headers.raw_items())
    except h11.RemoteProtocolError as error:
        found.append((str(error), error.error_status_hint))
    return [*found, connection.states, connection.trailing_data, connection.they_are_waiting_for_100_continue]


@given(heads())
@example([b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Two: a  b\r\nContent-Length: 5\r\n\r\nhello"])
@thorough
def test_heads_are_read_as_h11_reads_them(parts: list[bytes]) -> None:
    assert events(QuickConnection(h11.SERVER), parts) == events(h11.Connection(h11.SERVER), parts)


def test_a_plain_head_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: ReceiveBuffer) -> None:
        raise AssertionError("read line by line")

    monkeypatch.setattr("service.web.parsing.maybe_read_from_IDLE_client", slow)
    buffer = ReceiveBuffer()
    buffer += b"POST / HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nContent-Length: 5\r\n\r\nhello"
    head = read_head(buffer)
    assert head is not None
    assert list(head.headers) == [(b"host", b"a"), (b"accept", b"*/*"), (b"content-length", b"5")]
    assert bytes(buffer) == b"hello"


@pytest.mark.parametrize("value", [b" " * 15_000, b"a " * 7_500, b"a" * 15_000 + b"\x00"], ids=["blank", "gaps", "nul"])
def test_a_long_head_takes_no_longer_than_its_bytes(value: bytes) -> None:
    """With a pattern that backtracks this takes minutes."""
    data = b"GET / HTTP/1.1\r\nHost: a\r\nX: b%b\r\nY: b%b\r\n" % (value, value)
    assert events(QuickConnection(h11.SERVER, 1 << 20), [data]) == events(h11.Connection(h11.SERVER, 1 << 20), [data])


class Clock:
    """A clock that parsing alone moves on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Sender:
    """A connection that has sent so many parts, each of which takes so long to parse."""

    def __init__(self, name: str, num_parts: int, part_s: float, clock: Clock, parsed: list[str]) -> None:
        self._name, self._num_parts, self._part_s, self._clock, self._parsed = name, num_parts, part_s, clock, parsed

    def parse(self) -> bool:
        self._parsed.append(self._name)
        self._num_parts -= 1
        self._clock.now_s += self._part_s
        return self._num_parts > 0


def test_connections_parse_in_turns_and_leave_the_loop_between() -> None:
    parsed: list[str] = []

    async def go() -> None:
        clock = Clock()
        turns = ParsingTurns(clock)
        for name in "abc":
            turns.add(Sender(name, 4, 0.4 * TURN_S, clock, parsed))
        while len([each for each in parsed if each != "|"]) < 12:
            parsed.append("|")
            await asyncio.sleep(0)

    asyncio.run(go())
    # a parses at once until the turn's time is over; from then on each has its turn, three parts between two of others.
    assert "".join(parsed).replace("||", "|") == "aaa|abc|bcb|cbc"


def test_small_requests_do_not_wait_for_a_turn() -> None:
    parsed: list[str] = []

    async def go() -> None:
        clock = Clock()
        turns = ParsingTurns(clock)
        for name in "ab":
            turns.add(Sender(name, 1, 0.1 * TURN_S, clock, parsed))
        assert parsed == ["a", "b"]

    asyncio.run(go())


@pytest.mark.parametrize("route", ["GET /health", "GET /", "POST /generate", "GET /nowhere"])
@pytest.mark.parametrize("framing", ["chunks", "length"])
def test_a_client_that_sends_on_after_its_answer_is_hung_up_on(route: str, framing: str) -> None:
    """No timer may be what ends it: they are longer than the test."""
    head = HEAD.replace("Transfer-Encoding: chunked", f"Content-Length: {4 << 20}") if framing == "length" else HEAD

    async def go() -> bytes:
        app = app_of(two_engines(), api_keys="anna:anna-key-1", receive_timeout_s=1e6, keep_alive_s=10**6)
        async with server_of(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{route} {head}".encode())
            answer = await reader.readuntil(b"\r\n\r\n")
            writer.write(BYTE * (2 * REST_BYTES // len(BYTE)))
            # Still open for what the client sends, which is dropped, up to a limit.
            try:
                await reader.read()
                for _ in range(2 * LINGER_BYTES >> 20):
                    writer.write(bytes(1 << 20))
                    await writer.drain()
                # On a busy machine the hang-up is seen later than the last of these is sent: a byte at a time shows it.
                for _ in range(1000):
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.01)
            except ConnectionError:
                return answer
            raise AssertionError("it reads on for ever")

    answer = asyncio.run(go())
    assert (
        int(answer.split()[1]) == {"GET /health": 200, "GET /": 200, "POST /generate": 401, "GET /nowhere": 401}[route]
    )


def test_a_connection_whose_answered_request_is_short_goes_on() -> None:
    async def go() -> list[bytes]:
        async with server_of(app_of(two_engines(), api_keys="anna:anna-key-1")) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answers = []
            for _ in range(5):
                writer.write(f"POST /generate {HEAD}".encode())
                answers.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(BYTE * 5000 + b"0\r\n\r\n")
                await reader.readuntil(b"}}")
            writer.close()
            return answers

    assert [answer.split()[1] for answer in asyncio.run(go())] == [b"401"] * 5


def test_a_body_in_chunks_of_one_byte_is_answered_like_any_other() -> None:
    body = b'{"prompt": "a", "max_tokens": 3' + b" " * 200_000 + b"}"
    wire = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"

    async def go() -> tuple[bytes, bytes]:
        async with server_of(app_of(two_engines())) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answers = []
            for _ in range(2):
                writer.write(f"POST /generate {HEAD}".encode() + wire)
                answers.append(await reader.readuntil(b"\r\n\r\n"))
                await reader.readuntil(b"}}")
            writer.close()
            return answers[0], answers[1]

    assert [answer.split()[1] for answer in asyncio.run(go())] == [b"200", b"200"]


def chunked_answer() -> QuickConnection:
    """A connection that has sent the head of an answer whose length nobody knows yet."""
    connection = QuickConnection(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert [type(connection.next_event()) for _ in range(2)] == [h11.Request, h11.EndOfMessage]
    connection.send(h11.Response(status_code=200, headers=[]))
    return connection


@pytest.mark.parametrize("end", [h11.EndOfMessage(), h11.ConnectionClosed()], ids=["end", "closed"])
def test_chunks_are_sent_until_the_answer_ends_or_the_client_has_left(end: h11.Event) -> None:
    connection = chunked_answer()
    before = connection.sends_chunks
    assert connection.send(h11.Data(data=b"abc")) == framed_chunk(b"abc") == b"3\r\nabc\r\n"
    with suppress(h11.LocalProtocolError):
        connection.send(end)
    assert (before, connection.sends_chunks) == (True, False)
    with pytest.raises(h11.LocalProtocolError):
        connection.send(h11.Data(data=b"abc"))
