"""The app that clients are tried on: a fake engine that answers as a model with tools would."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI

from service.engine.api import SamplingParams
from service.text.tools.hermes import HERMES
from tests.support.fake_engine import ByteTokenizer
from tests.support.harness import app_of, two_engines

CITY = {"city": "Bonn", "degrees": 21}
SUNNY = "It is 21 degrees in Bonn."
HELLO = "Hello."
RESULT = "21 degrees"
FINAL = "final_result"
"""The tool that pydantic-ai adds for its output."""
SHELLS = {"exec_command": "cmd", "Bash": "command"}
"""Tools of Codex and Claude Code, among many, and the argument that holds what they run."""
COMMAND = f"echo {RESULT}"


def reply(prompt_ids: list[int], params: SamplingParams) -> str:
    """JSON where a schema wants it, a call where tools are shown and none has been answered, else text."""
    prompt = "".join(line for line in bytes(prompt_ids).decode().splitlines(True) if not line.startswith("variables:"))
    is_answered = RESULT in prompt or "\ntool:" in prompt
    if not prompt.startswith("tools:"):
        return json.dumps(CITY) if params.grammar is not None else SUNNY if is_answered else HELLO
    shown = [tool["function"] for tool in json.loads(prompt.partition("\n")[0].removeprefix("tools:"))]
    wanted = [tool for tool in shown if (tool["name"] == FINAL) == is_answered]
    if not wanted and params.grammar is None:
        return SUNNY
    called = next((tool for tool in shown if tool["name"] in SHELLS), (wanted or shown)[0])
    names = called.get("parameters", {}).get("properties", {})
    arguments = {name: value for name, value in known(called["name"]).items() if name in names}
    return f'<tool_call>\n{{"name": "{called["name"]}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def known(tool: str) -> dict[str, Any]:
    """What a tool may be called with."""
    return {SHELLS[tool]: COMMAND} if tool in SHELLS else CITY


def clients_app(**settings: Any) -> FastAPI:
    engines = two_engines(reply=reply, max_model_len=1 << 17, tokens_per_step=4)
    return app_of(engines, tokenizer=ByteTokenizer(HERMES), **settings)
