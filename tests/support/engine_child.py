"""The process of scripted engines: `python -m tests.support.engine_child OPTIONS N`, N its end of the channel.

OPTIONS, as JSON: step_s of a step; rows that share one; gate, a file without which opening waits; hang_at, the step
that never ends; poison_at, the step that raises as a lost GPU does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import msgspec

from service.engine.device.device_thread import DeviceThread
from service.engine.loop import EngineLoop
from service.engine.scheduler import Scheduler
from service.engine.supervision import FaultLimits
from service.host.channel.messages import Open, ToEngine
from service.host.channel.socket import ThreadEnd
from service.host.limits import busy_poll_s
from service.host.server import HostServer, run, take_in
from service.settings import load_settings
from service.store.progress import Progress
from tests.support.fake_engine import FakeHost
from tests.support.scripted_runner import Hang, ScriptedRunner, raising

OFFSET = 65


def main() -> None:
    options = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = ThreadEnd(socket.socket(fileno=int(sys.argv[2])), msgspec.msgpack.Decoder(ToEngine))
    opening = channel.read_one()
    assert isinstance(opening, Open)
    settings = load_settings(**opening.settings)

    def open_host(on_progress: Progress) -> FakeHost:
        on_progress("loading nothing", 0, 0)
        while "gate" in options and not Path(options["gate"]).exists():
            time.sleep(0.01)
        device_thread = DeviceThread()
        limits = FaultLimits(settings.engine_restarts, step_timeout_s=settings.step_timeout_s)
        engines: dict[str, EngineLoop] = {}
        for name in settings.variants:
            runner = ScriptedRunner(offset=OFFSET, step_s=options.get("step_s", 0.005))
            if "hang_at" in options:
                runner.on_read = Hang(options["hang_at"])
            if "poison_at" in options:
                runner.on_read = raising(RuntimeError("CUDA error: secret"), options["poison_at"])
            scheduler = Scheduler(
                num_blocks=2000, block_size=4, max_num_requests=options.get("rows", 64), max_batched_tokens=256
            )
            engines[name] = EngineLoop(
                name, scheduler, runner, device_thread=device_thread, max_model_len=4096, limits=limits
            ).start()
        return FakeHost(engines, busy_poll_s=busy_poll_s(settings, is_gpu=False))

    print(f"engine {os.getpid()}", file=sys.stderr, flush=True)
    run(HostServer(open_host, channel.send, partial(take_in, channel)), channel)


if __name__ == "__main__":
    main()
