"""The overhead benchmark's arithmetic, its reader of streams, its paced engine, and all of it once in small."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest

from benchmarks.overhead import (
    ALONE,
    GENERATE,
    Cost,
    arguments,
    first_row,
    full_rate,
    measured,
    rate,
    rig_of,
    settings_of,
    stream_row,
    table,
)
from benchmarks.overhead_client import token_times
from benchmarks.paced import PacedRunner, made_tokenizer
from service.engine.api import SamplingParams
from service.engine.request import Request
from service.engine.scheduler import Scheduler
from tests.support.narrowed import present

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(event: str) -> bytes:
    data = b"data: " + event.encode() + b"\n\n"
    return b"%x\r\n" % len(data) + data + b"\r\n"


def test_rates_are_of_the_whole_and_of_the_time_in_which_all_stream() -> None:
    times = [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]]
    assert rate(0.0, times) == 8 / 5
    assert full_rate(times) == 4 / 2
    with pytest.raises(ValueError, match="no moment"):
        full_rate([[1.0, 2.0], [2.0, 3.0]])


def test_a_ratio_is_that_of_its_round() -> None:
    rates = {ALONE: [100.0, 50.0, 100.0], GENERATE: [90.0, 49.0, 99.0]}
    row = stream_row(GENERATE, rates, rates, Cost(1000, 0.05, 0.04, 0.01, [0.5]), 64)
    assert row["tokens_per_s_ratio_p50"] == 0.98
    assert row["tokens_per_s_ratio_p20"] == 0.9
    assert row["process_us_per_token"] == pytest.approx(50.0)
    assert row["holds"]
    assert not stream_row(GENERATE, rates | {GENERATE: [94.0, 46.0, 94.0]}, rates, Cost(1, others=[0.0]), 64)["holds"]


def test_what_is_added_is_paired_and_must_hold_both_ways() -> None:
    row = first_row(GENERATE, [0.0075, 0.0085], [0.0060, 0.0070])
    assert row["added_ms_p99"] == pytest.approx(1.5)
    assert row["added_ms_of_p99s"] == pytest.approx(1.5)
    assert row["holds"]
    crossed = first_row(GENERATE, [0.0090, 0.0070], [0.0060, 0.0080])
    assert crossed["added_ms_of_p99s"] < 2 < crossed["added_ms_p99"]
    assert not crossed["holds"]
    assert "goal" not in first_row(ALONE, [0.006], [0.006])


def test_tokens_are_timed_by_the_arrival_of_their_events_end() -> None:
    events = [
        chunk('{"token_ids": [1]}'),
        chunk('{"token_ids": [2, 3]}'),
        chunk('{"metrics": {"generated_tokens": 3}}'),
    ]
    last = chunk("[DONE]") + b"0\r\n\r\n"
    arrivals = [(1.0, HEAD + events[0] + events[1][:9]), (2.0, events[1][9:]), (3.0, events[2] + last)]
    assert token_times(arrivals, "/generate") == [1.0, 2.0, 2.0]


@pytest.mark.parametrize(("told", "times"), [(2, [1.0, 2.0]), (4, [1.0, 2.0, 2.0, 2.0])])
def test_tokens_of_an_event_that_does_not_count_them_are_its_share_of_the_text(told: int, times: list[float]) -> None:
    choices = [
        chunk('{"choices": [{"text": " a"}]}'),
        chunk(f'{{"choices": [{{"text": " b c d", "metrics": {{"generated_tokens": {told}}}}}]}}'),
    ]
    last = chunk("[DONE]") + b"0\r\n\r\n"
    assert token_times([(1.0, HEAD + choices[0]), (2.0, choices[1] + last)], "/v1/completions") == times


@pytest.mark.parametrize(
    "body",
    [
        HEAD + chunk('{"token_ids": [1]}') + chunk('{"metrics": {"generated_tokens": 2}}') + chunk("[DONE]"),
        HEAD + chunk('{"error": {"message": "stopped"}, "token_ids": []}'),
        HEAD.replace(b"200 OK", b"503 Service Unavailable") + chunk("[DONE]"),
    ],
    ids=["lost token", "no end", "refused"],
)
def test_a_stream_that_is_not_whole_is_no_measurement(body: bytes) -> None:
    with pytest.raises(ValueError, match="/generate"):
        token_times([(1.0, body + b"0\r\n\r\n")], "/generate")


def test_a_paced_step_takes_its_time_from_the_end_of_the_one_before() -> None:
    scheduler, runner = (
        Scheduler(num_blocks=8, block_size=16, max_num_requests=2, max_batched_tokens=64),
        PacedRunner([5, 6, 7], 0.5),
    )
    for number in range(2):
        scheduler.add(Request(str(number), [1, 2], SamplingParams(3, ignore_eos=True), 0.0, 0))
    started_s = time.perf_counter()
    launched = []
    for _ in range(2):
        step = present(scheduler.schedule(0.0))
        launched.append((step, runner.execute(step)))
    assert time.perf_counter() - started_s < 0.5
    results = [handle.read() for _, handle in launched]
    assert results[1].time_s - started_s >= 1
    assert results[0].token_ids == [5, [5, 6, 7][97 % 3]]
    assert results[1].token_ids == [6, [6, 7, 5][97 % 3]]


def test_a_made_vocabulary_gives_every_token_a_text_and_every_text_back() -> None:
    tokenizer = made_tokenizer(1000)
    assert tokenizer.vocab_size == 1000
    text = "na\u00efve: 2 \u20ac\n"
    decoder = tokenizer.detokenizer()
    assert "".join(map(decoder.push, tokenizer.encode(text))) + decoder.flush() == text
    assert all(tokenizer.detokenizer((0,)).push(token_id).startswith(" ") for token_id in (256, 999))
    with pytest.raises(ValueError, match="at least 256"):
        made_tokenizer(100)


def test_the_whole_in_small() -> None:
    words = "--engine paced --shape llama-2-13b --step-ms 1 --streams 3 --prompt 32 --tokens 24 --rounds 1 --requests 2"
    args = arguments(words.split())
    rig = rig_of(args, settings_of(args))
    try:
        rows = asyncio.run(measured(rig, args))
    finally:
        # What serving left out of collections is other tests' too.
        gc.unfreeze()
    assert [row["way"] for row in rows if row["what"] == "streams"] == ["engine alone", "/generate", "/v1/completions"]
    firsts = [row for row in rows if row["what"] == "first token"]
    assert {row["requests"] for row in firsts} == {2}
    assert sum("goal" in row for row in firsts) == 4
    certificate = dict.fromkeys(("device", "cores", "engine", "event loop", "commit", "is real-time"), "?")
    lines = table(certificate | {"load before": [0.1], "load after": [0.2]}, rows).splitlines()
    assert len([line for line in lines if line.startswith("| /")]) == 7
