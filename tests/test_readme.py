"""What README and manual tell a user to type exists, and what README and quickstart show runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from service.cli import app
from service.web.messages.requests import MessagesRequest
from service.web.openai.requests import ChatRequest, CompletionRequest
from service.web.openai.tokenize import DetokenizeRequest, TokenizeRequest
from service.web.responses.requests import ResponsesRequest
from service.web.routes.admin import ReloadRequest
from service.web.schemas.generate import GenerateRequest
from tests.support.pages import MANUAL, PAGES, QUICKSTART, README, ROOT, Block, console_blocks, name_of, text_of
from tests.support.tiny_models import save_tiny_model

BODIES: dict[str, type[BaseModel]] = {
    "/generate": GenerateRequest,
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/admin/reload": ReloadRequest,
}
NOT_YET = {"--in-process"}
BLOCKS = [*console_blocks(README), *console_blocks(QUICKSTART)]
QUANTIZE, SERVE = "ottava quantize FOLDER OUT --calibration text.txt", "ottava serve OUT --baseline FOLDER"
"""What the quickstart makes and serves; here the fixture types it."""

COMMAND_S, START_S = 120.0, 120.0


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_every_curl_body_is_a_valid_request(page: Path) -> None:
    for block in console_blocks(page):
        for command in block.commands:
            for path, body in re.findall(r"localhost:8000(/\S+).*? -d '(\{.*\})'", command):
                assert BODIES[path].model_validate_json(body), command


def test_the_readme_asks_for_a_comparison() -> None:
    assert any("/generate" in command for block in console_blocks(README) for command in block.commands)


def the_tool() -> typer.core.TyperGroup:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return group


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_ottava_command_and_option_exists(page: Path) -> None:
    commands = the_tool().commands
    for name, rest in re.findall(rf"ottava ({'|'.join(commands)})\b([^`\n]*)", text_of(page)):
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known | {"--help"} | NOT_YET, (name, rest)


def test_the_manual_shows_every_command() -> None:
    shown = set(re.findall(r"ottava ([a-z]+)", "".join(text_of(page) for page in MANUAL)))
    assert shown >= set(the_tool().commands)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_make_target_exists(page: Path) -> None:
    makefile = text_of(ROOT / "Makefile")
    for target in re.findall(r"(?:`|\$ )make ([a-z-]+)", text_of(page)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 130


class Sandbox:
    """A folder that holds what the pages name, and a server of it."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self._folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OTTAVA_")}
        own = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OTTAVA_URL": f"http://127.0.0.1:{self.port}",
            "CURL_HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._environment = kept | own
        command = folder / "bin" / "ottava"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m service "$@"\n')
        command.chmod(0o755)
        (folder / ".curlrc").write_text("fail-with-body\n")
        (folder / "text.txt").write_text("".join(map(text_of, MANUAL)))
        save_tiny_model(folder / "FOLDER")

    def run(self, command: str) -> str:
        """What a command prints; it must succeed."""
        typed = command.replace("localhost:8000", f"localhost:{self.port}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", typed],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert done.returncode == 0, f"{typed}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    def serve(self, command: str) -> subprocess.Popen[bytes]:
        """The server that a command starts, on the sandbox's port; it is ready."""
        log = self._folder / "log"
        with log.open("wb") as out:
            typed = f"exec {command} --port {self.port}"
            server = subprocess.Popen(
                ["bash", "-c", typed], cwd=self._folder, env=self._environment, stdout=out, stderr=out
            )
        end_s = time.monotonic() + START_S
        while not self._is_ready():
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end_s, log.read_text()[-2000:]
            time.sleep(0.1)
        return server

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=COMMAND_S):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A tiny random model, quantized and served as the quickstart says."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    made = Sandbox(tmp_path_factory.mktemp("sandbox"))
    made.run(QUANTIZE)
    server = made.serve(SERVE)
    try:
        yield made
    finally:
        server.terminate()
        assert server.wait(COMMAND_S) == 0


def test_the_quickstart_quantizes_and_serves_as_the_sandbox_does() -> None:
    commands = [command for block in console_blocks(QUICKSTART) for command in block.commands]
    assert {QUANTIZE, SERVE} <= set(commands)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.reason is None], ids=lambda b: f"{b.page}: {b.commands[0][:30]}"
)
def test_what_is_shown_runs(block: Block, sandbox: Sandbox) -> None:
    for command in block.commands:
        if command not in (QUANTIZE, SERVE):
            sandbox.run(command)


def test_the_answer_that_the_readme_shows_has_the_real_shape(sandbox: Sandbox) -> None:
    [shown] = re.findall(r"```json\n(.*?)```", text_of(README), re.DOTALL)
    [command] = [command for block in console_blocks(README) if block.reason is None for command in block.commands]
    answer = json.loads(sandbox.run(command))
    assert places(json.loads(shown)) <= places(answer)


def test_blocks_that_do_not_run_need_what_a_test_has_not() -> None:
    assert {block.commands[0].split()[0] for block in BLOCKS if block.reason is not None} == {"make"}


def places(value: object, at: str = "") -> set[str]:
    """The places of all values in nested objects."""
    if not isinstance(value, dict):
        return {at}
    return {place for key, part in value.items() for place in places(part, f"{at}.{key}")}
