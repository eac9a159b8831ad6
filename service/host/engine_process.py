"""The engines' process: `python -m service.host.engine_process N`, where N is the descriptor of its end of the channel.

It exits at once when the other end of the channel is closed, whatever its engines are doing, so that no GPU memory
stays allocated after the web has died.
"""

from __future__ import annotations

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
from service.host.server import HostServer, run, take_in
from service.process import end_process
from service.settings import load_settings
from service.telemetry.logs import configure_logging
from service.text.grammars.trials import TrialParent, forked_parent


def main() -> NoReturn:
    """Serve the web at the other end of the channel until it sends `Stop` or exits."""
    # A terminal sends Ctrl-C, and a supervisor SIGTERM, to both processes: the web decides when the engines stop.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Now, while there are no threads and no GPU is in use: what is imported is shared, 6 MB instead of 180 are its own.
    serve(socket.socket(fileno=int(sys.argv[1])), forked_parent())


def serve(end: socket.socket, trials: TrialParent | None = None) -> NoReturn:
    """Load the settings of the first message, which must be `Open`, and serve them. trials: see `RulesCompiler`."""
    channel = ThreadEnd(end, msgspec.msgpack.Decoder(ToEngine), on_gone=lambda: end_process(1))
    opening = channel.read_one()
    if not isinstance(opening, Open):
        end_process(1)
    settings = load_settings(**opening.settings)
    configure_logging(settings, sys.stderr, "engine")
    quiet_libraries()
    server = HostServer(partial(open_host, settings, trials=trials), channel.send, partial(take_in, channel))
    run(server, channel)


if __name__ == "__main__":
    main()
