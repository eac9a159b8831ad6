"""The fault table's own books: what a client saw, what fails a case, and that a failed case fails the script."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import report
from benchmarks.faults import __main__ as script
from benchmarks.faults.bench import PROMPTS, Bench, questions
from benchmarks.faults.case import Case
from benchmarks.faults.clients import Kind, Question, Seen, encoded, parse
from benchmarks.faults.raising import AFTER, raising

QUESTION = Question("a", 3)
ANSWERS = {("w8a8", "a"): (1, 2, 3, 4)}
RIGHT = Seen(Kind.ANSWERED, 200, "length", (1, 2, 3))


def http(status: int, content: object, kind: str = "application/json", **headers: object) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    length = {} if kind == "text/event-stream" else {"content-length": len(body)}
    head: dict[str, object] = {
        "content-type": kind,
        **length,
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def stream(*events: object, is_whole: bool = True) -> bytes:
    chunks = [
        b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n" for event in events
    ]
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return http(200, body + b"0\r\n\r\n" * is_whole, "text/event-stream")


DELTAS = {"token_ids": [1]}, {"token_ids": [2, 3]}
LAST = {"id": "x", "token_ids": [1, 2, 3], "finish_reason": "length"}
ERROR = {"error": {"code": "engine_failed", "message": "a step raised"}}


@pytest.mark.parametrize(
    ("received", "kind", "said"),
    [
        (http(200, LAST), Kind.ANSWERED, "200 length"),
        (http(200, LAST)[:-1], Kind.CUT, "cut off"),
        (stream(*DELTAS, LAST, b"[DONE]"), Kind.ANSWERED, "200 length"),
        (stream(*DELTAS, LAST, b"[DONE]", is_whole=False), Kind.CUT, "cut off"),
        (stream(*DELTAS, LAST), Kind.CUT, "cut off"),
        (stream(*DELTAS), Kind.CUT, "cut off"),
        (stream(), Kind.CUT, "cut off"),
        (stream(*DELTAS, ERROR), Kind.FAILED, "200, then engine_failed"),
        (http(500, ERROR), Kind.FAILED, "500 engine_failed"),
        (http(503, {"error": {"code": "draining", "message": ""}}), Kind.REFUSED, "503 draining"),
        (b"", Kind.CUT, "cut off"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", Kind.CUT, "cut off"),
    ],
)
def test_what_a_client_saw(received: bytes, kind: Kind, said: str) -> None:
    seen = parse(received)
    assert (seen.kind, str(seen)) == (kind, said)


def test_a_stream_whose_parts_do_not_add_up_is_noticed() -> None:
    assert parse(stream(*DELTAS, LAST, b"[DONE]")).is_consistent
    assert not parse(stream(DELTAS[0], LAST, b"[DONE]")).is_consistent
    # Half an answer that looks like a whole one.
    assert not parse(stream(*DELTAS, b"[DONE]", is_whole=False)).is_consistent
    assert not parse(stream(*DELTAS, ERROR, b"[DONE]")).is_consistent
    assert parse(stream(*DELTAS, is_whole=False)).token_ids == (1, 2, 3)


def test_a_question_is_asked_as_http() -> None:
    head, _, body = encoded(QUESTION, {"x-request-id": "same"}).partition(b"\r\n\r\n")
    assert b"x-request-id: same" in head
    assert b"content-length: %d" % len(body) in head
    assert json.loads(body) == QUESTION.body


def test_questions_go_round_prompts_variants_and_streams() -> None:
    asked = questions(4 * len(PROMPTS), 8)
    assert len(set(asked)) == len(asked)


def test_the_books_of_a_good_case() -> None:
    case = Case("good")
    seen = case.take([(QUESTION, RIGHT), (QUESTION, Seen(Kind.LEFT))], ANSWERS, (Kind.ANSWERED, Kind.LEFT))
    assert seen == {"200 length": 1, "left": 1}
    assert (case.lost, case.verdict, case.has_failed) == (0, "ok", False)
    assert case.row()["accepted"] == 2


@pytest.mark.parametrize(
    ("seen", "is_lost", "complaint"),
    [
        (Seen(Kind.ANSWERED, 200, "length", (1, 2, 4)), True, "another answer than in a quiet run"),
        (Seen(Kind.ANSWERED, 200, "length", (1, 2)), True, "another answer"),
        (Seen(Kind.ANSWERED, 200, "length", (1, 2, 3), is_consistent=False), True, "another answer"),
        (Seen(Kind.CUT, 200, "", (2,)), True, "another answer"),
        (Seen(Kind.CUT, 200, "", (1,)), True, "unexpected: cut off"),
        (Seen(Kind.SILENT), True, "unexpected: no end"),
        (Seen(Kind.FAILED, 500, "engine_failed"), False, "unexpected: 500 engine_failed"),
        (Seen(Kind.REFUSED, 503, "queue_full", headers={"retry-after": "1"}), False, "unexpected: 503 queue_full"),
    ],
)
def test_what_fails_a_case(seen: Seen, is_lost: bool, complaint: str) -> None:
    case = Case("bad")
    case.take([(QUESTION, RIGHT), (QUESTION, seen)], ANSWERS)
    assert case.has_failed
    assert complaint in case.verdict
    assert case.lost == is_lost


@pytest.mark.parametrize("headers", [{}, {"retry-after": "0"}, {"retry-after": "soon"}])
def test_a_503_must_say_when_to_come_again(headers: dict[str, str]) -> None:
    case = Case("bad")
    case.take([(QUESTION, Seen(Kind.REFUSED, 503, "queue_full", headers=headers))], ANSWERS, (Kind.REFUSED,))
    assert "without Retry-After" in case.verdict
    assert case.ends == {}


@pytest.mark.parametrize("how", ["once", "always"])
def test_an_op_that_raises_from_when_it_is_told(tmp_path: Path, how: str) -> None:
    trigger = tmp_path / "trigger"
    op = raising(lambda x: 2 * x, trigger, how == "once")
    assert [op(1) for _ in range(2 * AFTER)] == [2] * 2 * AFTER
    trigger.touch()
    assert [op(1) for _ in range(AFTER - 1)] == [2] * (AFTER - 1)
    for _ in range(1 if how == "once" else 3):
        with pytest.raises(RuntimeError, match="planted"):
            op(1)
    assert trigger.exists() == (how == "always")
    if how == "once":
        assert op(1) == 2


async def broken(_: Bench, case: Case) -> None:
    case.done = "one | two"
    case.take([(QUESTION, RIGHT)], ANSWERS)
    case.expect_equal(1, 2, "ones")


async def raises(_: Bench, case: Case) -> None:
    raise RuntimeError("no server")


async def fine(_: Bench, case: Case) -> None:
    case.take([(QUESTION, RIGHT)], ANSWERS)


async def skipped(_: Bench, case: Case) -> None:
    case.skipped = "needs root"


@pytest.mark.parametrize(
    ("cases", "is_failure"),
    [((fine,), False), ((fine, skipped), False), ((fine, broken), True), ((raises, fine), True)],
)
def test_a_failed_case_fails_the_script_and_stands_in_its_table(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    cases: tuple[script.Run, ...],
    is_failure: bool,
) -> None:
    async def ask_in_quiet() -> None:
        pass

    bench = SimpleNamespace(ask_in_quiet=ask_in_quiet)
    monkeypatch.setattr(Bench, "make", lambda *_: bench)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(script, "CASES", {run.__name__: (run.__name__, run) for run in cases})
    out = tmp_path / "faults.json"
    monkeypatch.setattr("sys.argv", ["benchmarks/faults/__main__.py", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert bool(ended.value.code) == is_failure
    result = json.loads(out.read_text())
    assert result["run"]["command"] == "python -m benchmarks.faults"
    assert [row["case"] for row in result["rows"]] == [run.__name__ for run in cases]
    heading, rule, *lines = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in (heading, rule, *lines)} == {len(script.HEADING) + 1}
    verdicts = {"fine": "ok", "skipped": "skipped: needs root", "broken": "FAILED: ones: 1, expected 2"}
    for run, line in zip(cases, lines, strict=True):
        assert verdicts.get(run.__name__, "FAILED: RuntimeError: no server") in line


def test_cases_are_chosen_by_name() -> None:
    assert script._names("crowd,soak") == ["crowd", "soak"]
    with pytest.raises(argparse.ArgumentTypeError, match="no case 'flood'; the cases are crowd,"):
        script._names("crowd,flood")


def test_a_package_is_named_as_one_repeats_it() -> None:
    assert report._as_module(["/x/benchmarks/faults/__main__.py", "--cases", "ids"]) == [
        "-m",
        "benchmarks.faults",
        "--cases",
        "ids",
    ]
