"""An engine that asks for commands before it sleeps, and the server that lets it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from service.busy_poll import BusyPoll
from service.engine.api import SamplingParams
from service.engine.messages import News, Submit
from service.host.channel.messages import Opened, ToEngine, ToWeb
from service.host.server import HostServer
from tests.service.kinds import StartEngine
from tests.support.fake_engine import FakeEngine, FakeHost
from tests.support.scripted_runner import ScriptedRunner


def submit(number: int) -> Submit:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    return Submit("w8a8", number, number, f"r{number}", [1, 2], params, time.perf_counter(), 0)


def test_an_engine_that_rests_takes_what_has_come_itself(engine_of: StartEngine) -> None:
    """The second request comes by no other way."""
    engine = engine_of(ScriptedRunner())
    told: queue.SimpleQueue[News] = queue.SimpleQueue()
    takers: list[str] = []

    def take() -> None:
        takers.append(threading.current_thread().name)
        if len(takers) == 3:
            engine.put(submit(2))

    engine.serve(told.put, BusyPoll(take, lambda: engine.has_work, 20.0))
    engine.put(submit(1))
    ended: list[int] = []
    while len(ended) < 2:
        ended += [each.handle for each in told.get(timeout=20).ended]
    assert ended == [1, 2]
    assert set(takers) == {"engine-w8a8"}
    # It stops as soon as it is told to.
    begun_s = time.monotonic()
    engine.stop()
    assert time.monotonic() - begun_s < 10


def opened(take: Callable[[Callable[[ToEngine], None]], object] | None) -> tuple[HostServer, FakeEngine, Opened]:
    sent: list[ToWeb] = []
    engine = FakeEngine("w8a8")
    server = HostServer(lambda _: FakeHost({"w8a8": engine}, busy_poll_s=1.5), sent.append, take)
    assert server.open()
    return server, engine, next(message for message in sent if isinstance(message, Opened))


def test_the_web_and_the_engines_poll_as_the_host_says() -> None:
    received: list[Callable[[ToEngine], None]] = []
    server, engine, message = opened(received.append)
    assert message.busy_poll_s == 1.5
    assert engine.busy_poll is not None
    engine.active = set()
    threading.Timer(0.02, engine.active.add, (object(),)).start()
    engine.busy_poll.ask()
    assert received[0] == server.receive


def test_nobody_polls_where_engines_and_web_share_an_interpreter() -> None:
    _, engine, message = opened(None)
    assert message.busy_poll_s == 0
    assert engine.busy_poll is None


def test_a_variant_that_has_failed_for_good_keeps_nobody_from_it() -> None:
    received: list[Callable[[ToEngine], None]] = []
    _, engine, _ = opened(received.append)
    assert engine.busy_poll is not None
    engine.active.add(object())  # type: ignore[arg-type]
    engine.busy_poll.ask()
    assert not received, "it has work"
    engine.fail(RuntimeError("it is gone"))
    engine.busy_poll.ask()
    assert received
