"""The attacks of `benchmarks.attacks` say what was sent and answered."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.attacks import BAD, ask, chunks_of_one_byte, requests_of


class Refusing(BaseHTTPRequestHandler):
    """Answers 401 with the key that was sent, and reads no body in chunks."""

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        told = {"key": self.headers.get("Authorization"), "body": self.rfile.read(length).decode()}
        content = json.dumps(told).encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_requests_are_sent_with_the_key_and_counted_by_status(port: int) -> None:
    connection, response = ask(port, "/generate", {"prompt": "a"}, BAD)
    assert json.loads(response.read()) == {"key": f"Bearer {BAD}", "body": '{"prompt": "a"}'}
    connection.close()
    said = requests_of("/generate", {"prompt": "a"})(port, 0.05)
    count, _, rest = said.partition(" x ")
    assert int(count) > 0
    assert rest == "HTTP 401"


def test_a_server_that_hangs_up_ends_no_attack(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    said = chunks_of_one_byte(head)(port, 0.1)
    assert said.endswith(" MB sent")
