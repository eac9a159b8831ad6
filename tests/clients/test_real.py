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
from tests.clients.record import Recorder, shortened
from tests.support.harness import until

FOLDER = Path(__file__).parent
PROGRAMS = {path.stem: path for path in sorted((FOLDER / "programs").iterdir()) if path.is_file()}
PYTHON = os.environ.get("CLIENTS_PYTHON", str(FOLDER.parent.parent / ".venv-clients/bin/python"))
RUN_BY = {".py": PYTHON, ".mjs": "node", ".sh": "bash"}
VERSIONS: dict[str, str] = {
    **dict(
        line.replace("[openai]", "").split("==")
        for line in (FOLDER / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ),
    **json.loads((FOLDER / "package.json").read_text(encoding="utf-8"))["dependencies"],
}
PACKAGES = {
    "anthropic_python": "anthropic",
    "claude_code": "@anthropic-ai/claude-code",
    "codex": "@openai/codex",
    "langchain": "langchain-openai",
    "langchain_js": "@langchain/openai",
    "lite_llm": "litellm",
    "llama_index": "llama-index-llms-openai-like",
    "openai_python": "openai",
    "openai_responses": "openai",
    "pydantic_agents": "pydantic-ai-slim",
    "vercel_ai_sdk": "ai",
}


async def ran(program: Path) -> tuple[int | None, str, Recorder]:
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
            RUN_BY[program.suffix],
            str(program),
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
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_client_gets_what_it_asks_for(name: str) -> None:
    program = PROGRAMS[name]
    if program.suffix != ".py" and not (FOLDER / "node_modules").exists():
        pytest.skip("its packages are npm's, which is not here")
    code, output, recorder = asyncio.run(ran(program))
    assert code == 0, output[-3000:]
    assert recorder.requests
    if os.environ.get("RECORD"):
        package = PACKAGES[name]
        content = {"client": f"{package} {VERSIONS[package]}", "requests": shortened(recorder.requests)}
        path = FOLDER / "recorded" / f"{name}.json"
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_every_program_names_its_package() -> None:
    assert sorted(PACKAGES) == sorted(PROGRAMS)
    assert set(PACKAGES.values()) <= set(VERSIONS)
