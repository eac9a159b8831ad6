"""Grammars over the real server: web, engine, and the processes in which they are compiled on trial."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.processes import children, free_port, is_running, served
from tests.support.tiny_models import save_tiny_model

START_S = 120.0
SLOW = "root ::= " + " ".join(f'(x ("," x){{0,{990 - i % 500}}})?' for i in range(2500)) + '\nx ::= "a" | "b" x'
"""Takes half a minute."""
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    scratch = tmp_path_factory.mktemp("server")
    save_tiny_model(scratch / "model")
    port = free_port()
    words = [sys.executable, "-m", "service", "serve", str(scratch / "model"), "--port", str(port)]
    words += ["--variants", "fp16", "--max-grammar-compile-s", "60", "--cache-dir", str(scratch / "cache")]
    keys = {"OTTAVA_API_KEYS": "anna:anna-key-1,ben:ben-key-1", "OTTAVA_PUBLIC_ROUTES": "info,metrics"}
    with served(words, f"http://127.0.0.1:{port}/ready", scratch / "log", START_S, keys):
        yield f"http://127.0.0.1:{port}"


def ask(url: str, body: dict[str, Any], key: str = "anna", timeout_s: float = 90.0) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}-key-1"}
    return httpx.post(url + TEXT, json={"prompt": "a", "max_tokens": 24, **body}, headers=headers, timeout=timeout_s)


def until(condition: Any) -> None:
    end_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def trials_parent(url: str) -> int:
    """The process that trials are forked from: the only child of the engine, which is the only one of the web."""
    (engine,) = children(web_of(url))
    (parent,) = children(engine)
    return parent


def web_of(url: str) -> int:
    """The server's process, by its command line."""
    port = url.rpartition(":")[2]
    return next(pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _listens(pid, port))


def _listens(pid: int, port: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    return "serve" in words and port in words


def test_every_kind_holds_the_answer(url: str) -> None:
    regex = r"[A-Z][a-z]{2,4}-\d"
    text = ask(url, {"structured_outputs": {"regex": regex}}).json()["choices"][0]["text"]
    assert re.fullmatch(regex, text)
    text = ask(url, {"guided_grammar": 'root ::= "x" ("y" | "z")'}).json()["choices"][0]["text"]
    assert text in ("xy", "xz")
    assert ask(url, {"guided_choice": ["yes", "no"]}).json()["choices"][0]["text"] in ("yes", "no")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"guided_regex": "(?=a)"}, "guided_regex", "Lookahead"),
        ({"structured_outputs": {"grammar": "root ::= b"}}, "structured_outputs", 'Rule "b" is not defined'),
        ({"guided_grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000}, "guided_grammar", "grammar"),
    ],
)
def test_what_is_not_valid_is_refused_by_name(url: str, body: dict[str, Any], param: str, words: str) -> None:
    response = ask(url, body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", param)
    assert words in error["message"]


def test_the_deadline_ends_a_compilation(url: str) -> None:
    parent = trials_parent(url)
    response = ask(url, {"guided_grammar": SLOW, "timeout_s": 0.5})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    until(lambda: not children(parent))


def test_leaving_ends_a_compilation_and_other_keys_never_wait_for_it(url: str) -> None:
    parent = trials_parent(url)

    async def go() -> int:
        headers = {"authorization": "Bearer anna-key-1"}
        async with httpx.AsyncClient(headers=headers, timeout=60) as client:
            body = {"prompt": "a", "guided_grammar": SLOW}
            slow = asyncio.ensure_future(client.post(url + TEXT, json=body))
            while not children(parent):
                await asyncio.sleep(0.02)
            other = await asyncio.to_thread(ask, url, {"guided_choice": ["other", "key"]}, "ben")
            assert children(parent), "the slow one must still be compiled"
            slow.cancel()
            return other.status_code

    assert asyncio.run(go()) == 200
    until(lambda: not children(parent))


def test_nothing_outlives_the_web(url: str) -> None:
    """The last test: it ends the server."""
    parent = trials_parent(url)
    code = (
        "import httpx, sys\n"
        "headers = {'authorization': 'Bearer anna-key-1'}\n"
        "httpx.post(sys.argv[1], json={'prompt': 'a', 'guided_grammar': sys.argv[2]}, headers=headers, timeout=60)"
    )
    command = [sys.executable, "-c", code, url + TEXT, SLOW]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL):
        until(lambda: children(parent))
        (trial,) = children(parent)
        os.kill(web_of(url), signal.SIGKILL)
    until(lambda: not is_running(parent) and not is_running(trial))
