"""Messages over the channel: whole however they are cut, in order, and never waited for."""

from __future__ import annotations

import asyncio
import threading
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.api import FinishReason, SamplingParams
from service.engine.messages import Ended, Fault, Finish, Gauges, Logprob, News, Submit, error_of, fault_of
from service.errors import OttavaError, leaves
from service.host.channel import socket as channel
from service.host.channel.messages import Call, ToEngine, ToWeb
from service.host.channel.socket import Frames, LoopEnd, ThreadEnd, framed, pair

TO_ENGINE = msgspec.msgpack.Decoder(ToEngine)
TO_WEB = msgspec.msgpack.Decoder(ToWeb)
MESSAGES = [
    Submit("w8a8", 1, 7, "r", [1, 2, 128_000], SamplingParams(temperature=0.5, grammar="root ::= x"), 1.5, 2**62),
    Finish("fp16", 7, FinishReason.ABORT),
    Call(3, "reload", None),
]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_messages_come_whole_however_the_bytes_are_cut(sizes: list[int]) -> None:
    data, frames = b"".join(map(framed, MESSAGES)), Frames(TO_ENGINE)
    got: list[ToEngine] = []
    for size in sizes:
        part, data = data[:size], data[size:]
        got += frames.push(part)
    assert got + frames.push(data) == MESSAGES


def test_news_is_what_it_was() -> None:
    news = News(
        "w8a8",
        Gauges(1, 2, 3, 4, 5, 6, 7, 8, 9),
        2,
        12.5,
        [7, 8],
        [5, 6],
        logprobs=[(1, Logprob(float("-inf"), [(6, -0.5)]))],
        ended=[Ended(8, FinishReason.STOP, 12.5), Ended(9, FinishReason.ABORT, 12.5, Fault("EngineFailed", "why"))],
    )
    (got,) = Frames(TO_WEB).push(framed(news))
    assert got == news


@pytest.mark.parametrize("kind", list(leaves()), ids=lambda kind: kind.__name__)
def test_every_error_comes_back_as_it_was(kind: type[OttavaError]) -> None:
    error = error_of(fault_of(kind("why", "field")))
    assert (type(error), error.message, error.param, error.status) == (kind, "why", "field", kind.status)


def test_an_error_that_is_none_of_ours_tells_its_class_alone() -> None:
    assert "secret" not in error_of(fault_of(KeyError("secret"))).message


def test_who_does_not_read_keeps_nobody_and_gets_everything_in_order() -> None:
    """Far more than the kernel's buffer holds."""
    ours, theirs = pair()
    end, far = ThreadEnd(ours, TO_ENGINE), ThreadEnd(theirs, TO_ENGINE)
    got: list[ToEngine] = []
    sent = [Call(number, "compile", "x" * 2000) for number in range(10_000)]
    longest_s = 0.0
    for message in sent:
        began_s = time.perf_counter()
        end.send(message)
        longest_s = max(longest_s, time.perf_counter() - began_s)
    assert end._num_unsent > 0
    reader = threading.Thread(target=far.read_all, args=(got.append,))
    reader.start()
    while len(got) < len(sent) and reader.is_alive():
        time.sleep(0.01)
    end.close()
    reader.join(10)
    assert got == sent
    for socket in (ours, theirs):
        socket.close()


def test_messages_are_in_order_whichever_thread_takes_them() -> None:
    """One sleeps until there is something to read, and two ask all the time."""
    ours, theirs = pair()
    end, far = ThreadEnd(ours, TO_ENGINE), ThreadEnd(theirs, TO_ENGINE)
    got: list[ToEngine] = []

    def ask() -> None:
        while far.take(got.append):
            pass

    readers = [threading.Thread(target=ask) for _ in range(2)]
    readers.append(threading.Thread(target=far.read_all, args=(got.append,)))
    for reader in readers:
        reader.start()
    sent = [Call(number, "compile", "x" * 50) for number in range(2_000)]
    for message in sent:
        end.send(message)
    end.close()
    for reader in readers:
        reader.join(20)
    assert not any(reader.is_alive() for reader in readers)
    assert got == sent
    for one in (ours, theirs):
        one.close()


def test_whoever_asks_has_what_has_come_and_waits_for_nothing() -> None:
    ours, theirs = pair()
    end, far = ThreadEnd(ours, TO_ENGINE), ThreadEnd(theirs, TO_ENGINE)
    got: list[ToEngine] = []
    assert far.take(got.append)
    assert got == []
    for message in MESSAGES:
        end.send(message)
    assert far.take(got.append)
    assert got == MESSAGES
    end.close()
    assert not far.take(got.append)
    for one in (ours, theirs):
        one.close()


def test_who_never_reads_counts_as_gone_before_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_BACKLOG_BYTES", 1 << 20)
    ours, theirs = pair()
    gone = threading.Event()
    end = ThreadEnd(ours, TO_ENGINE, gone.set)
    for number in range(100):
        end.send(Call(number, "compile", "x" * 200_000))
        if gone.is_set():
            break
    assert gone.is_set()
    assert end._num_unsent < 2 << 20
    theirs.close()
    end.send(MESSAGES[0])  # to nobody: no error
    ours.close()


def test_the_end_of_one_side_is_seen_by_the_other() -> None:
    async def go() -> list[ToWeb]:
        ours, theirs = pair()
        gone = asyncio.Event()
        got: list[ToWeb] = []
        end = LoopEnd(TO_WEB, got.append, gone.set)
        await end.attach(ours)
        far = ThreadEnd(theirs, TO_ENGINE)
        far.send(News("w8a8", Gauges()))
        end.send(MESSAGES[0])
        assert await asyncio.to_thread(far.read_one) == MESSAGES[0]
        far.close()
        theirs.close()
        await asyncio.wait_for(gone.wait(), 5)
        end.send(MESSAGES[0])
        return got

    assert asyncio.run(go()) == [News("w8a8", Gauges())]
    ours, theirs = pair()
    got: list[ToEngine] = []
    ours.close()
    ThreadEnd(theirs, TO_ENGINE).read_all(got.append)
    assert got == []
    theirs.close()
