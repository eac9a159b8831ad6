"""What the README tells a user to type exists."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from service.cli import app
from service.web.schemas.generate import GenerateRequest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_curl_body_is_a_valid_request():
    bodies = re.findall(r"-d '(\{.*?\})'", README, re.DOTALL)
    assert bodies
    for body in bodies:
        assert GenerateRequest.model_validate_json(body)


def test_every_ottava_command_and_option_exists():
    commands = typer.main.get_command(app).commands
    lines = re.findall(rf"ottava ({'|'.join(commands)})\b([^`\n]*)", README)
    assert {name for name, _ in lines} >= {"serve", "quantize", "evaluate", "tune", "roofline"}
    for name, rest in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known | {"--help"}, (name, rest)


def test_every_make_target_and_linked_file_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
