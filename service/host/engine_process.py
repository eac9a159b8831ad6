"""The process of the engines: `python -m service.host.engine_process N`, N the number of its end of the channel.

It lives as long as the web that started it: once the other end of the channel is closed, it is gone within moments,
whatever its engines are at, and with it the memory that it held.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from functools import partial
from typing import NoReturn

import msgspec

from service.host.channel.messages import Open, ToEngine
from service.host.channel.socket import ThreadEnd
from service.host.machine import quiet_libraries
from service.host.reloader import open_host
from service.host.server import HostServer
from service.process import end_process, settle, start_thread
from service.settings import load_settings
from service.telemetry.logs import configure_logging

STOP_S = 1.0
"""For a step to end; one that takes longer ends with the process."""

logger = logging.getLogger(__name__)


def main() -> NoReturn:
    """Serve the web at the other end until it wants an end, or is gone."""
    # A terminal sends Ctrl-C to both processes, a supervisor its SIGTERM: what they mean for the engines, the web says.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))


def serve(end: socket.socket) -> NoReturn:
    """Open what the first message names, and serve it."""
    channel = ThreadEnd(end, msgspec.msgpack.Decoder(ToEngine), on_gone=lambda: end_process(1))
    opening = channel.read_one()
    if not isinstance(opening, Open):
        end_process(1)
    settings = load_settings(**opening.settings)
    configure_logging(settings, sys.stderr, "engine")
    quiet_libraries()
    server = HostServer(partial(open_host, settings), channel.send)
    run(server, channel)


def run(server: HostServer, channel: ThreadEnd[ToEngine]) -> NoReturn:
    """Open the server's host, and serve it until the other end wants an end, or is gone."""
    start_thread("channel", _read, channel, server)
    if not server.open():
        # What was said must be read before the end of the stream is.
        server.stopped.result()
        end_process(1)
    settle()
    server.stopped.result()
    server.stop(STOP_S)
    end_process(0)


def _read(channel: ThreadEnd[ToEngine], server: HostServer) -> None:
    try:
        channel.read_all(server.receive)
    except Exception:
        # Deaf, it would hold its requests for ever; dead, it is replaced.
        logger.exception("the engine cannot take what the web sends")
        end_process(1)
    end_process(0)


if __name__ == "__main__":
    main()
