"""Responses and events are read the same however the network splits them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.tools.bench.http import BadResponse, Events, Response

BODY = b'data: {"a": 1}\n\n: ping\n\ndata: [DONE]\n\n'


def split(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def chunked(body: bytes, sizes: list[int]) -> bytes:
    out, at = b"", 0
    for size in sizes:
        piece = body[at : at + size]
        at += size
        if piece:
            out += f"{len(piece):X};x=y\r\n".encode() + piece + b"\r\n"
    rest = body[at:]
    out += (f"{len(rest):x}\r\n".encode() + rest + b"\r\n") if rest else b""
    return out + b"0\r\ntrailer: 1\r\n\r\n"


@given(
    sizes=st.lists(st.integers(1, 20), max_size=8),
    places=st.lists(st.integers(0, 400), max_size=12),
    form=st.sampled_from(["chunked", "sized", "closed"]),
)
def test_a_response_split_anywhere(sizes: list[int], places: list[int], form: str) -> None:
    heads = {"chunked": b"Transfer-Encoding: chunked", "sized": b"Content-Length: %d" % len(BODY), "closed": b"X: y"}
    sent = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n" + heads[form] + b"\r\n\r\n"
    sent += chunked(BODY, sizes) if form == "chunked" else BODY
    response = Response()
    body = b"".join(response.feed(piece) for piece in split(sent, places))
    assert response.is_complete == (form != "closed")
    response.end()
    assert (response.is_complete, response.status, body) == (True, 200, BODY)
    assert response.can_reuse == (form != "closed")


@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=6),
    newline=st.sampled_from(["\n", "\r\n"]),
    space=st.sampled_from(["", " "]),
    places=st.lists(st.integers(0, 400), max_size=12),
)
def test_events_split_anywhere(texts: list[str], newline: str, space: str, places: list[int]) -> None:
    sent = "".join(f": comment{newline}event: x{newline}data:{space or ' '}{text}{newline}{newline}" for text in texts)
    events = Events()
    found = [event for piece in split(sent.encode(), places) for event in events.feed(piece)]
    assert found == [text.encode() for text in texts]


@given(sizes=st.lists(st.integers(1, 20), max_size=8))
def test_chunks_that_come_one_by_one(sizes: list[int]) -> None:
    """As they do on a quiet network, whatever is inside: a size, line ends, nothing."""
    response, body = Response(), b""
    response.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    tricky = [b"\r\n", b"5\r\nabc\r\n", *(b"x" * size for size in sizes)]
    for piece in tricky:
        body += response.feed(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    # Two in one piece, and one in two.
    body += response.feed(b"1\r\na\r\n1\r\nb\r\n")
    body += response.feed(b"1\r\n") + response.feed(b"c\r\n") + response.feed(b"0\r\n\r\n")
    assert (response.is_complete, body) == (True, b"".join(tricky) + b"abc")


def test_an_event_of_two_lines_without_a_space_and_one_that_has_no_end() -> None:
    events = Events()
    assert events.feed(b"data:a\ndata: b\n\nid: 1\n\ndata: c\n") == [b"a\nb"]
    assert events.feed(b"\n") == [b"c"]


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nabc",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000,
    ],
)
def test_what_is_no_response(sent: bytes) -> None:
    with pytest.raises(BadResponse):
        Response().feed(sent)


@pytest.mark.parametrize(
    ("head", "can_reuse"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nConnection: close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n", False),
    ],
)
def test_which_connections_take_another_request(head: bytes, can_reuse: bool) -> None:
    response = Response()
    response.feed(head)
    assert (response.is_complete, response.can_reuse) == (True, can_reuse)
