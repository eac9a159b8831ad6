"""Runs the clients themselves. RECORD=1 rewrites what they sent in `recorded/`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path

import pytest
import uvicorn

from service.web.uvicorn_config import server_config
from tests.clients.app import clients_app
from tests.clients.record import Recorder
from tests.support.harness import until

FOLDER = Path(__file__).parent
PROGRAMS = sorted(path.stem for path in (FOLDER / "programs").glob("*.py"))
PYTHON = os.environ.get("CLIENTS_PYTHON", str(FOLDER.parent.parent / ".venv-clients/bin/python"))
VERSIONS = dict(
    line.replace("[openai]", "").split("==")
    for line in (FOLDER / "requirements.txt").read_text(encoding="utf-8").splitlines()
)
PACKAGES = {
    "langchain": "langchain-openai",
    "lite_llm": "litellm",
    "llama_index": "llama-index-llms-openai-like",
    "openai_python": "openai",
    "pydantic_agents": "pydantic-ai-slim",
}


async def ran(program: str) -> tuple[int | None, str, Recorder]:
    """The exit code, the output and the requests of a program."""
    app = clients_app()
    recorder = Recorder(app)
    listener = socket.create_server(("127.0.0.1", 0))
    config = server_config(app, app.state.serving.settings, log_level="error")
    config.app = recorder
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started and app.state.serving.is_ready)
        process = await asyncio.create_subprocess_exec(
            PYTHON,
            str(FOLDER / "programs" / f"{program}.py"),
            f"http://127.0.0.1:{listener.getsockname()[1]}/v1",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]},
        )
        output, _ = await process.communicate()
        return process.returncode, output.decode(), recorder
    finally:
        server.should_exit = True
        await serving
        listener.close()


@pytest.mark.clients
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_client_gets_what_it_asks_for(program: str) -> None:
    code, output, recorder = asyncio.run(ran(program))
    assert code == 0, output[-3000:]
    assert recorder.requests
    if os.environ.get("RECORD"):
        package = PACKAGES[program]
        content = {"client": f"{package} {VERSIONS[package]}", "requests": recorder.requests}
        path = FOLDER / "recorded" / f"{program}.json"
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_every_program_names_its_package() -> None:
    assert sorted(PACKAGES) == PROGRAMS
    assert set(PACKAGES.values()) <= set(VERSIONS)
