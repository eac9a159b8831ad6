"""`ottava bench` as a user runs it: against the real app over fake engines, and against servers that misbehave."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service import cli
from service.cli.bench import Line
from service.tools.bench import bench as tool
from service.tools.bench.bench import order
from service.tools.bench.drive import Tally
from tests.support.browser import page_app, served
from tests.support.fake_engine import FakeEngine

KEY = "correct-horse-battery"
VLLM_KEYS = {
    *(
        "date",
        "endpoint_type",
        "backend",
        "label",
        "model_id",
        "tokenizer_id",
        "num_prompts",
        "request_rate",
        "burstiness",
    ),
    *("max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("max_output_tokens_per_s", "max_concurrent_requests"),
}
WORDS = ("mean", "median", "std", "p50", "p90", "p99")
TIME_KEYS = {f"{word}_{time}_ms" for time in ("ttft", "tpot", "itl", "e2el") for word in WORDS}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("OTTAVA_")]:
        monkeypatch.delenv(name)
    # The command has no torch in its process, whose objects take a quarter of a second to visit.
    monkeypatch.setattr(tool, "settle", lambda: None)


def engines(**options: Any) -> dict[str, FakeEngine]:
    options = {"max_model_len": 4096, **options}
    return {"w8a8": FakeEngine("w8a8", **options), "fp16": FakeEngine("fp16", **options)}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(page_app(engines())) as found:
        yield found


def bench(url: str, *arguments: object) -> Result:
    # Lateness is of the machine that runs the tests.
    words = [*map(str, arguments), "--max-lateness", "1e9", "--input-len", "6", "--output-len", "5", "--warmup", "1"]
    return CliRunner().invoke(cli.app, ["bench", "--url", url, *words])


def test_one_load_is_written_with_the_keys_of_vllm(url: str, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    result = bench(url, "--burst", 6, "--json", file, "--detailed", "--label", "L", "--goodput", "ttft:1e9", "e2el:1e9")
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found) >= VLLM_KEYS | TIME_KEYS
    assert (found["completed"], found["failed"], found["num_prompts"], found["label"]) == (6, 0, 6, "L")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (36, 30)
    assert (found["backend"], found["request_rate"], found["model_id"]) == ("openai", "inf", "SmolLM2-135M-Instruct")
    assert found["request_goodput"] == pytest.approx(6 / found["duration"])
    assert found["output_lens"] == [5] * 6
    assert found["errors"] == [""] * 6
    own = found["ottava"]
    assert (own["valid"], own["tokens_counted_by"], own["errors"]) == (True, ["usage"], {})
    assert own["inputs"] == "random token ids from 7 to 234"
    assert own["server"]["model"] == "SmolLM2-135M-Instruct"
    assert "6 of 6 requests answered" in result.stdout
    assert "6 within the SLOs" in result.stdout


def test_both_variants_take_turns_and_are_compared(url: str, tmp_path: Path) -> None:
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    result = bench(
        url, "--variants", "w8a8,fp16", "--rates", "400,800", "--requests", 4, "--route", "generate", "--json", file,
        "--picture", picture,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text(encoding="utf-8"))
    points = found["points"]
    assert [(point["request_rate"], point["ottava"]["name"]) for point in points] == [
        (400, "w8a8"), (400, "fp16"), (800, "w8a8"), (800, "fp16")
    ]  # fmt: skip
    # Two rounds of 4.
    assert {(point["num_prompts"], point["completed"], point["total_output_tokens"]) for point in points} == {
        (8, 8, 40)
    }
    assert {point["ottava"]["itl_between"] for point in points} == {"tokens"}
    ratios = found["ottava"]["compared"][0]["ratios"]
    assert set(ratios) == {"w8a8"}
    measured = ratios["w8a8"]["ttft_p50"]
    expected = points[1]["p50_ttft_ms"] / points[0]["p50_ttft_ms"]
    assert measured["ratio"] == pytest.approx(expected)
    assert len(measured["rounds"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "how many times better than fp16" in result.stdout


def test_every_other_round_goes_backwards() -> None:
    assert [list(order(("a", "b"), number)) for number in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_variants_get_the_same_requests() -> None:
    found = engines()
    with served(page_app(found)) as url:
        assert bench(url, "--variants", "w8a8,fp16", "--burst", 5).exit_code == 0
    asked = [[tuple(request.prompt_ids) for request in engine.submitted[-10:]] for engine in found.values()]
    assert sorted(asked[0]) == sorted(asked[1])
    assert len(set(asked[0])) == 10


def test_chat_sends_text_and_says_so(url: str) -> None:
    result = bench(url, "--concurrency", 2, "--requests", 3, "--route", "chat")
    assert result.exit_code == 0, result.output
    assert "/v1/chat/completions takes no token ids: text is sent instead" in result.stdout


def test_shared_prefixes_and_a_dataset(url: str, tmp_path: Path) -> None:
    assert bench(url, "--burst", 4, "--prefixes", "2:20", "--turns", 2).exit_code == 0
    file = tmp_path / "lines.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n', encoding="utf-8")
    assert bench(url, "--burst", 2, "--dataset", file, "--route", "chat").exit_code == 0
    refused = bench(url, "--burst", 2, "--dataset", file)
    assert refused.exit_code == 1
    assert "add --route chat" in refused.stderr


def test_a_sweep_ends_at_saturation(url: str, tmp_path: Path) -> None:
    """No request meets the SLO, so the first rate is saturated."""
    file = tmp_path / "out.json"
    result = bench(url, "--rate", 500, "--sweep", "--requests", 2, "--goodput", "ttft:0", "--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["ottava"]["why_saturated"] == "0 of 2 requests met the SLOs"


def test_a_generator_that_is_late_says_so(url: str, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    arguments = ["--rate", "500", "--requests", "3", "--max-lateness", "0", "--json", str(file), "--output-len", "2"]
    result = CliRunner().invoke(cli.app, ["bench", "--url", url, *arguments])
    assert result.exit_code == 0
    assert "INVALID" in result.stdout
    assert json.loads(file.read_text(encoding="utf-8"))["ottava"]["valid"] is False


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    result = bench(url, "--burst", 1)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: no server answers at {url} (")
    assert "`ottava serve`" in result.stderr
    assert "--url" in result.stderr


def test_nothing_answered_is_a_failure() -> None:
    """The probe and the warm-up are answered, nothing after them is."""
    found = engines()
    with served(page_app(found)) as url:

        def refuse_all() -> None:
            for engine in found.values():
                engine.max_waiting = 0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tool, "settle", refuse_all)
            result = bench(url, "--burst", 3)
    assert result.exit_code == 1
    assert "none of 3 requests" in result.stderr
    assert "HTTP 503 queue_full" in result.stderr


@pytest.mark.parametrize("is_file", [True, False])
def test_the_key_is_sent_and_never_shown(is_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, out = tmp_path / "key", tmp_path / "out.json"
    keys.write_text(f"{KEY}\n", encoding="utf-8")
    server_keys = tmp_path / "keys"
    server_keys.write_text(f"me:{KEY}\n", encoding="utf-8")
    with served(page_app(engines(), api_keys_file=server_keys)) as url:
        refused = bench(url, "--burst", 2)
        if not is_file:
            monkeypatch.setenv("OTTAVA_API_KEY", KEY)
        result = bench(url, "--burst", 2, "--json", out, *(["--api-key-file", keys] if is_file else []))
    assert refused.exit_code == 1
    assert "401" in refused.stderr
    assert "OTTAVA_API_KEY" in refused.stderr
    assert result.exit_code == 0, result.output
    assert KEY not in result.output + result.stderr + out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "exactly one of --rate, --rates, --concurrency, --burst is needed, not none"),
        (["--rate", 1, "--burst", 2], "not --rate and --burst"),
        (["--burst", 2, "--sweep"], "--sweep starts at --rate"),
        (["--rates", "1,x"], "no list of rates"),
        (["--burst", 2, "--turns", 2], "--turns needs --prefixes"),
        (["--burst", 2, "--prefixes", "4"], "COUNT:TOKENS"),
        (["--burst", 2, "--route", "x"], "none of completions, chat, generate"),
        (["--burst", 2, "--variants", "a", "--model", "b"], "contradict"),
        (["--burst", 2, "--route", "generate", "--model", "b"], "takes no --model"),
        (["--burst", 2, "--variants", "a,"], "empty name"),
        (["--burst", 2, "--extra-body", "3"], "no JSON object"),
        (["--burst", 2, "--goodput", "x:3"], "NAME:MILLISECONDS"),
        (["--burst", 2, "--json", "/nowhere/x.json"], "--json /nowhere/x.json cannot be written"),
        (["--burst", 2, "--picture", "x.svg"], "must end in .png"),
        (["--burst", 2, "--variants", "w8a8,int4"], "HTTP 404"),
        (["--burst", 2, "--extra-body", '{"unknown": 1}'], "unknown"),
    ],
)
def test_what_is_refused(url: str, arguments: list[object], said: str) -> None:
    result = bench(url, *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.startswith("error: ")


def test_what_is_no_address() -> None:
    for url in ("127.0.0.1:8000", "ftp://x", "http://", "http://x:99999"):
        result = bench(url, "--burst", 1)
        assert (result.exit_code, "is no address of a server" in result.stderr) == (1, True), url


def test_progress_is_one_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally(total=9, sent=5, done=2, failed=1, tokens=40, elapsed_s=4.0, last_late_ms=0.25)
    with Line() as line:
        line("2 requests/s", tally)
        line("2 requests/s", tally)
        line("4 requests/s", tally)
    told = "5 of 9 sent, 3 in flight, 1 failed, 10 tokens/s, late 0.2 ms"
    said = capsys.readouterr().err
    assert said == f"ottava: 2 requests/s: 4 s, {told}\nottava: 4 requests/s: 4 s, {told}\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Line() as line:
        line("2 requests/s", tally)
        line("2 requests/s", tally)
    said = capsys.readouterr().err
    assert said.count("\r\x1b[K2 requests/s: 4 s, 5 of 9 sent") == 2
    assert said.endswith("\r\x1b[K")


def test_a_picture_needs_matplotlib(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "find_spec", lambda name: None)
    result = bench(url, "--burst", 1, "--picture", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "pip install 'ottava[plot]'" in result.stderr
