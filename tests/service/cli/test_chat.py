"""`ottava chat` against the real app over fake engines, and against servers that misbehave."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
from typer.testing import CliRunner, Result

from service import cli
from service.cli import session
from service.cli.session import Session, read_question
from service.cli.verdict import comparison_lines, metrics_line, printable
from service.engine.api import SamplingParams
from service.errors import ChatError
from service.tools.chat_client import Chat, open_client
from service.web.schemas.generate import GenerateResponse
from tests.support.browser import page_app, served
from tests.support.fake_engine import FakeEngine

Reply = str | Callable[[list[int], SamplingParams], str]
KEY = "correct-horse-battery"


class Talk(Protocol):
    def __call__(self, url: str, lines: list[str | type[BaseException]], **options: object) -> str: ...


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.upper().startswith("OTTAVA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def engines(w8a8: Reply = "hello there", fp16: Reply = "hello world", **options: Any) -> dict[str, FakeEngine]:
    options = {"max_model_len": 4096, **options}
    return {"w8a8": FakeEngine("w8a8", w8a8, **options), "fp16": FakeEngine("fp16", fp16, **options)}


def last_turns(prompt_ids: list[int], _params: SamplingParams) -> str:
    """What the model was sent, so that a test can read it."""
    return bytes(prompt_ids).decode().replace("\n", "|")


def ask(url: str, *arguments: str, piped: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, ["chat", "--url", url, *arguments], input=piped)


def test_a_question_as_an_argument_or_from_a_pipe() -> None:
    with served(page_app(engines())) as url:
        for result in (ask(url, "hi"), ask(url, piped="hi\n")):
            assert (result.exit_code, result.stdout) == (0, "hello there\n")
            assert result.stderr.startswith("w8a8 · TTFT ")
            assert result.stderr.endswith(" tokens/s · 12 tokens\n")


def test_what_is_sent() -> None:
    with served(page_app(engines(last_turns, last_turns))) as url:
        assert ask(url, "--system", "Be brief.", piped="two\nlines\n").stdout == "system:Be brief.|user:two|lines|\n"
        cut = ask(url, "hi", "--max-tokens", "3", "--variant", "fp16")
        assert cut.stdout == "use\n"
        assert cut.stderr.startswith("fp16 · ")
        assert cut.stderr.endswith("ended by length\n")


def test_a_comparison_from_a_pipe_keeps_the_baseline_off_stdout() -> None:
    with served(page_app(engines())) as url:
        result = ask(url, "hi", "--compare")
    assert (result.exit_code, result.stdout) == (0, "hello there\n")
    said = result.stderr.splitlines()
    assert [line.split(" ")[0] for line in said] == ["w8a8", "fp16", "speed-up", "the"]
    assert "58% of the tokens agree" in said[2]
    assert said[3] == "the texts part after 6 tokens: w8a8 'there', fp16 'world'"


def test_keys() -> None:
    with served(page_app(engines(), api_keys=f"anna:{KEY}")) as url:
        refused = ask(url, "hi")
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert "the server answered 401: this needs an API key" in refused.stderr
        assert ask(url, "hi", "--api-key", KEY).stdout == "hello there\n"
        by_variable = CliRunner().invoke(cli.app, ["chat", "hi"], env={"OTTAVA_API_KEY": KEY, "OTTAVA_URL": url})
        assert by_variable.stdout == "hello there\n"
        wrong = ask(url, "hi", "--api-key", KEY + "x")
        assert wrong.exit_code == 1
        assert KEY not in wrong.stderr
    helped = CliRunner().invoke(cli.app, ["chat", "--help"], env={"OTTAVA_API_KEY": KEY})
    assert KEY not in helped.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hi", "--url", "localhost:8000"], "url 'localhost:8000' is no address of a server; write it as http://"),
        (["hi", "--url", "ftp://x"], "is no address of a server"),
        (["hi", "--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9 ("),
        ([" "], "nothing was asked"),
        ([], "nothing was asked"),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(cli.app, ["chat", *arguments], input="")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {said}") or said in result.stderr
    assert result.stderr.count("\n") == 1


def test_how_to_start_a_server_is_told() -> None:
    result = ask("http://127.0.0.1:9", "hi")
    assert "start one with `ottava serve`, or say where it is with --url" in result.stderr


def test_the_server_s_refusals_are_told_in_its_words() -> None:
    with served(page_app(engines())) as url:
        unknown = ask(url, "hi", "--variant", "int3")
        assert unknown.stderr.startswith("error: the server answered 404: `variant` is 'int3'")
        long = ask(url, "x" * 5000)
        assert "the server answered 400: the prompt has" in long.stderr
        assert {unknown.exit_code, long.exit_code} == {1}


def test_a_failure_in_the_middle_of_an_answer() -> None:
    with served(page_app(engines(fail_at=3))) as url:
        result = ask(url, "hi")
    assert result.exit_code == 1
    assert result.stdout == "hel"
    assert "error: the server gave up: the engine of variant 'w8a8' failed" in result.stderr


DELTA = {"id": "1", "variant": "w8a8", "text": "hel", "token_ids": [1]}


@contextmanager
def scripted(body: bytes, status: int = 200) -> Iterator[str]:
    """A server that answers every POST with the same bytes and hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 200, "the answer broke off"),
        (b"data: " + json.dumps(DELTA).encode() + b"\n\n", 200, "the answer broke off"),
        (b"data: [DONE]\n\n", 200, "the server sent no answer"),
        (b"data: {}\n\n", 200, "'{}' is no event of ottava; is --url right?"),
        (b"data: [1]\n\n", 200, "'[1]' is no event of ottava"),
        (b"data: nonsense\n\n", 200, "'nonsense' is no event of ottava"),
        (b"<h1>Bad gateway</h1>", 502, "the server answered 502: '<h1>Bad gateway</h1>', which is no answer of ottava"),
        (b'{"error": 3}', 500, "which is no answer of ottava"),
        (b"\xff" * 5000, 500, "the server answered 500: "),
    ],
)
def test_servers_that_misbehave(body: bytes, status: int, said: str) -> None:
    with scripted(body, status) as url:
        result = ask(url, "hi")
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(result.stderr) < 1000


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_line_ends_at_a_line_feed_alone(end: bytes) -> None:
    """Also behind a server or proxy that sends other separators as they are."""
    text = "a\u2028b\u2029c\x85d"
    with served(page_app(engines(text))) as url:
        sent = httpx.post(f"{url}/generate", json={"prompt": "x", "stream": True}).text
        assert ask(url, "hi").stdout == f"{text}\n"
    body = "".join(
        "data: " + (data if data == "[DONE]" else json.dumps(json.loads(data), ensure_ascii=False)) + "\n\n"
        for data in (part.removeprefix("data: ") for part in sent.split("\n\n") if part)
    )
    assert "\u2028" in body
    with scripted(body.encode().replace(b"\n", end)) as url:
        assert ask(url, "hi").stdout == f"{text}\n"


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """A conversation with typed lines; a KeyboardInterrupt among them is Ctrl-C at the prompt."""

    def run(url: str, lines: list[str | type[BaseException]], **options: object) -> str:
        typed = iter(lines)

        def read(_prompt: str) -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(session, "input", read, raising=False)
        with open_client(url, None) as client:
            Session(Chat(client, None, None, False, **options), url).run()
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


def test_a_conversation(talk: Talk) -> None:
    with served(page_app(engines(last_turns))) as url:
        said = talk(
            url,
            [
                "hi",
                "",
                "/reset",
                "again",
                KeyboardInterrupt,
                "/variant fp16",
                "/compare",
                "who",
                "/variant",
                "/quit",
                "no",
            ],
        )
    lines = said.splitlines()
    assert lines[0].startswith(f"SmolLM2-135M-Instruct at {url}: w8a8, fp16. ")
    assert "user:hi|" in lines
    assert "user:again|" in lines
    assert "/quit or Ctrl-D leaves" in lines
    assert "fp16 answers from now on" in lines
    assert "user:no|" not in lines


def test_answers_become_part_of_the_conversation(talk: Talk) -> None:
    with served(page_app(engines(last_turns))) as url:
        said = talk(url, ["one", "two"]).splitlines()
    assert "user:one|" in said
    assert "user:one|assistant:user:one||user:two|" in said


def test_a_comparison_shows_both_under_their_names(talk: Talk) -> None:
    with served(page_app(engines())) as url:
        said = talk(url, ["/compare on", "hi"])
    assert "comparing is on\n[w8a8]\nhello there\n\n[fp16]\nhello world\nw8a8 · TTFT" in said
    assert "the texts part after 6 tokens" in said


def test_the_commands_explain_themselves(talk: Talk) -> None:
    with served(page_app(engines())) as url:
        said = talk(url, ["/help", "/bogus", "/compare maybe"])
    for name in ("/reset", "/variant", "/compare", "/help", "/quit", '"""'):
        assert f"\n{name} " in said
    assert "/bogus is no command; there are /reset, /variant, /compare, /help, /quit" in said
    assert "/compare maybe is neither on nor off" in said


def test_an_error_ends_the_answer_and_not_the_program(talk: Talk) -> None:
    with served(page_app(engines(last_turns))) as url:
        said = talk(url, ["/variant int3", "hi", "/variant", "again"])
    assert "error: the server answered 404: `variant` is 'int3'" in said
    assert "user:again|\n" in said


def test_ctrl_c_cancels_the_answer_and_not_the_program(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = engines("a long answer " * 20, delay_s=0.005)
    seen: list[str] = []

    def interrupt_once(text: str) -> str:
        seen.append(text)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(session, "printable", interrupt_once)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with served(page_app(slow)) as url:
        said = talk(url, ["one", "/help", "two"], max_tokens=30)
        # The server noticed: the first request was freed before it had all its tokens.
        assert len(slow["w8a8"].freed[0].output) < 30
        assert slow["w8a8"].active == set()
    assert "cancelled; the question is forgotten" in said
    assert bytes(slow["w8a8"].submitted[1].prompt_ids) == b"user:two\n"


def test_no_server_at_the_start_of_a_conversation(talk: Talk) -> None:
    with pytest.raises(ChatError, match="no server answers"):
        talk("http://127.0.0.1:9", ["hi"])


def test_the_history_is_its_owner_s_alone(talk: Talk, tmp_path: Path) -> None:
    with served(page_app(engines())) as url:
        talk(url, ["hi"])
    path = tmp_path / "state" / "ottava" / "chat-history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_is_told(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with served(page_app(engines())) as url:
        said = talk(url, ["hi"])
    assert "error: the history is not kept: " in said
    assert "hello there" in said


@pytest.mark.parametrize(
    ("typed", "question"),
    [
        (["hi"], "hi"),
        (["  hi "], "hi"),
        (['"""one', "two", 'three"""'], "one\ntwo\nthree"),
        (['"""', "one", '"""'], "one"),
        (['"""one"""'], "one"),
        (['say """'], 'say """'),
    ],
)
def test_questions_of_several_lines(typed: list[str], question: str) -> None:
    lines = iter(typed)
    assert read_question(lambda _: next(lines)) == question
    assert list(lines) == []


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\tc\nd\x9b\r") == "a\ufffd[31mb\ufffd\tc\nd\ufffd\ufffd"
    assert printable("naïve 👩‍👩‍👧 日本") == "naïve 👩‍👩‍👧 日本"


def answer(text: str, variant: str = "w8a8", **changes: object) -> dict[str, Any]:
    metrics: dict[str, float | None] = dict.fromkeys(
        ("queue_ms", "prefill_ms", "ttft_ms", "itl_ms", "tpot_ms", "e2e_ms", "tokens_per_s")
    )
    metrics |= {
        "prompt_tokens": 1,
        "generated_tokens": 0,
        "cached_tokens": 0,
        "accepted_tokens": 0,
        "batch_size_mean": 0.0,
    }
    usage = {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}
    return {
        "id": "1",
        "variant": variant,
        "text": text,
        "token_ids": [],
        "finish_reason": "stop",
        "usage": usage,
        "metrics": metrics,
    } | changes


def compared(ours: str, theirs: str, contended: bool = False) -> list[str]:
    body = answer(
        ours,
        baseline=answer(theirs, "fp16"),
        speedup=dict.fromkeys(("ttft", "tpot", "e2e", "tokens_per_s")),
        agreement={"common_prefix_tokens": 3, "match_ratio": 0.5, "logprob_delta_mean": None},
        contended=contended,
    )
    return list(comparison_lines(GenerateResponse.model_validate(body)))


def test_what_was_not_measured_is_a_dash() -> None:
    assert metrics_line(GenerateResponse.model_validate(answer(""))) == "w8a8 · TTFT - · - tokens/s · 0 tokens"
    assert compared("a", "b")[0] == "speed-up - in tokens/s, - in TTFT · 50% of the tokens agree"
    assert "the times are not clean" in compared("a", "b", contended=True)[0]
    assert list(comparison_lines(GenerateResponse.model_validate(answer("")))) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("same", "same", "the texts are the same"),
        ("abc", "ab", "the texts part after 3 tokens: w8a8 'c', fp16 ''"),
        ("a\x1b", "a\nb", r"the texts part after 3 tokens: w8a8 '\x1b', fp16 '\nb'"),
        ("x" + "y" * 40, "x", f"the texts part after 3 tokens: w8a8 '{'y' * 32}'..., fp16 ''"),
    ],
)
def test_where_texts_part(ours: str, theirs: str, said: str) -> None:
    assert compared(ours, theirs)[1] == said
