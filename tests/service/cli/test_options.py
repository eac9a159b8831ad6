"""One settings class as flags, variables and a TOML file: who wins, what is refused, what help and shells show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Never, Protocol

import pytest
import typer
from pydantic import Field, SecretStr
from pydantic.fields import FieldInfo
from typer.core import TyperGroup
from typer.testing import CliRunner

from quant.analysis.gpus import GPUS
from service import cli
from service.cli import options
from service.cli.options import takes_settings
from service.errors import InvalidSettings
from service.settings import INT8_SCHEMES, Settings, load_settings
from service.settings.fields import Panel, choices_of, is_secret, leaves, panels

ROOT = Path(__file__).parents[3]
FIELDS = Settings.model_fields
SECRET = "correct-horse-battery"


class Serve(Protocol):
    def __call__(self, *arguments: object) -> Settings | str: ...


def settings_of(served: Settings | str) -> Settings:
    assert isinstance(served, Settings), served
    return served


def words_of(served: Settings | str) -> str:
    assert isinstance(served, str), served
    return served


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("OTTAVA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a settings file and gives its path."""

    def write(text: str) -> Path:
        path = tmp_path / "ottava.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Runs `ottava serve` up to its settings: those, or what was said instead."""
    found: list[Settings] = []

    def stop(settings: Settings, _watch: object) -> Never:
        found.append(settings)
        raise InvalidSettings("enough")

    monkeypatch.setattr("service.host.assemble.assemble", stop)
    monkeypatch.setattr("service.telemetry.logs.configure_logging", lambda *_: None)

    def run(*arguments: object) -> Settings | str:
        found.clear()
        result = CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])
        assert result.exit_code == 1, result.stderr
        return found[0] if found else result.stderr.removeprefix("error: ").removesuffix("\n")

    return run


def values_of(name: str, field: FieldInfo) -> object:
    """A value other than the default, as a Python object, for a field of any kind."""
    special = {
        "max_grammar_compile_bytes": 64 << 20,
        "config": None,
        "alpha": 0.25,
        "variants": ("w8a8",),
        "public_routes": ("info",),
        "allowed_hosts": ("llm.example", "[::2]"),
        "cors_origins": ("https://a.example",),
        "block_size": 32,
        "shadow_rate": 0.5,
        "max_num_requests": 7,
        "max_draft_tokens": 5,
        "tensor_parallel": 2,
        "host": "localhost",
    }
    if name in special:
        return special[name]
    kinds, words = leaves(field.annotation), choices_of(field)
    if bool in kinds:
        return not field.default
    if words:
        return next(word for word in words if word != field.default)
    if float in kinds:
        return 12.5
    if int in kinds:
        return 4096 if field.default != 4096 else 2048
    return Path("/some/where") if Path in kinds else "some-name"


CHANGED = {name: values_of(name, field) for name, field in FIELDS.items() if not is_secret(field) and name != "config"}


def as_text(value: object) -> str:
    return (
        ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )


def as_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return repr(list(value))
    return f"'{value}'" if isinstance(value, str | Path) else str(value)


def as_flags(name: str, value: object) -> list[str]:
    flag = name.replace("_", "-")
    if name == "model":
        return [str(value)]
    return [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", as_text(value)]


@pytest.mark.parametrize("name", CHANGED)
def test_every_field_is_a_flag_a_variable_and_a_key(
    name: str, monkeypatch: pytest.MonkeyPatch, toml: Callable[[str], Path], served: Serve
) -> None:
    wanted = CHANGED[name]
    assert wanted != FIELDS[name].get_default(call_default_factory=True)
    by_file = served("--config", toml(f"{name} = {as_toml(wanted)}"))
    by_flag = served(*as_flags(name, wanted))
    monkeypatch.setenv(f"OTTAVA_{name.upper()}", as_text(wanted))
    by_variable = served()
    for settings in (by_file, by_flag, by_variable):
        assert isinstance(settings, Settings), settings
        assert getattr(settings, name) == wanted
    assert by_flag == by_variable


def test_a_flag_beats_a_variable_the_file_and_the_default(
    monkeypatch: pytest.MonkeyPatch, toml: Callable[[str], Path], served: Serve
) -> None:
    config = toml("port = 1\nmax_waiting = 1\nlog_level = 'debug'\ncuda_graphs = false\n")
    monkeypatch.setenv("OTTAVA_PORT", "2")
    monkeypatch.setenv("OTTAVA_MAX_WAITING", "2")
    settings = settings_of(served("--config", config, "--port", 3, "--cuda-graphs"))
    assert (settings.port, settings.max_waiting, settings.log_level) == (3, 2, "debug")
    assert (settings.cuda_graphs, settings.block_size) == (True, 64)
    assert settings.config == config


def test_the_file_is_named_by_a_variable_too_and_never_found_by_chance(
    monkeypatch: pytest.MonkeyPatch, toml: Callable[[str], Path], served: Serve
) -> None:
    config = toml("port = 9")
    monkeypatch.chdir(config.parent)
    assert settings_of(served()).port == 8000
    monkeypatch.setenv("OTTAVA_CONFIG", "ottava.toml")
    assert settings_of(served()).port == 9
    assert load_settings().port == 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "{path}: unknown key 'prot'; the nearest known one is 'port'"),
        ("port = '80'", "{path}: port = '80' must be an integer (TCP port"),
        ("port = true", "{path}: port = True must be an integer"),
        ("port = 80.5", "{path}: port = 80.5 must be an integer"),
        ("alpha = '0.5'", "{path}: alpha = '0.5' must be an integer or a number"),
        ("host = 1", "{path}: host = 1 must be a string"),
        ("cuda_graphs = 1", "{path}: cuda_graphs = 1 must be true or false"),
        ("cors_origins = 3", "{path}: cors_origins = 3 must be a string or a list"),
        ("port = 65536", "port = 65536: Input should be less than or equal to 65535, set in {path} (TCP port"),
        ("config = 'x.toml'", "{path}: key 'config' = 'x.toml' names another file"),
        ("[serve]\nport = 1", "{path}: unknown key 'serve'"),
        ("port =", "the settings file {path} cannot be read: "),
        (f"api_keys = ['{SECRET}']", "{path}: api_keys = (hidden) must be a string"),
    ],
)
def test_a_file_that_cannot_be_is_told_in_one_line(
    text: str, said: str, toml: Callable[[str], Path], served: Serve
) -> None:
    path = toml(text)
    line = words_of(served("--config", path))
    assert line.startswith(said.format(path=path)), line
    assert "\n" not in line
    assert SECRET not in line


def test_a_file_that_is_not_there(served: Serve, tmp_path: Path) -> None:
    assert f"the settings file {tmp_path}/none.toml cannot be read" in words_of(
        served("--config", tmp_path / "none.toml")
    )


def test_a_bad_variable_is_named_as_the_place(monkeypatch: pytest.MonkeyPatch, served: Serve) -> None:
    monkeypatch.setenv("OTTAVA_PORT", "eighty")
    assert re.match(
        r"port = 'eighty': Input should be a valid integer.*, set by OTTAVA_PORT \(TCP port", words_of(served())
    )


def test_variables_of_the_chat_do_not_stop_the_server(monkeypatch: pytest.MonkeyPatch, served: Serve) -> None:
    monkeypatch.setenv("OTTAVA_URL", "http://x")
    monkeypatch.setenv("OTTAVA_API_KEY", SECRET)
    assert isinstance(served(), Settings)


def test_a_switch_cannot_be_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli.app, ["serve", "--random-weights", "--no-random-weights"])
    assert result.exit_code == 2
    assert "contradict each other" in result.stderr


def test_secrets_are_neither_flags_nor_shown(monkeypatch: pytest.MonkeyPatch, served: Serve) -> None:
    monkeypatch.setenv("OTTAVA_API_KEYS", f"anna:{SECRET}")
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    flags = {flag for command in group.commands.values() for p in command.params for flag in p.opts}
    assert "--api-keys-file" in flags
    assert "--api-keys" not in flags
    shown = CliRunner().invoke(cli.app, ["serve", "--help"]).stdout
    assert "OTTAVA_API_KEYS" in shown
    assert SECRET not in shown
    monkeypatch.setenv("OTTAVA_PORT", "99999")
    assert SECRET not in words_of(served())


def test_help_shows_each_setting_in_its_panel_with_its_default() -> None:
    shown = CliRunner().invoke(cli.app, ["serve", "--help"]).stdout
    blocks = {
        m[1]: " ".join(re.sub(r"[│\n]", " ", m[2]).split()) for m in re.finditer(r"╭─ (.*?) ─+╮\n(.*?)╰", shown, re.S)
    }
    for name, panel in panels(FIELDS).items():
        if name == "model" or is_secret(FIELDS[name]):
            continue
        text = blocks[panel]
        assert re.search(rf"--(no-)?{name.replace('_', '-')} ", text), name
        assert " ".join((FIELDS[name].description or "").split()) in text
    assert "[default: 8000]" in blocks["HTTP"]
    assert "[default: on]" in blocks["Memory and steps"]
    assert f"One of {', '.join(INT8_SCHEMES)}." in blocks["Model"]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["", "serve", "cluster", "chat", "quantize", "evaluate", "tune", "roofline"])
def test_no_help_is_cut_off(monkeypatch: pytest.MonkeyPatch, command: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = CliRunner().invoke(cli.app, [*command.split(), "--help"]).stdout
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= columns
    examples = [line for line in shown.splitlines() if line.strip().startswith("$ ")]
    assert len(examples) >= 2
    assert f"ottava {command}" in examples[0]


def test_a_new_field_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grown(Settings):
        greeting: Literal["hello", "goodbye"] = Field(default="hello", description="What is said first.")
        pin: SecretStr | None = Field(default=None, description="Opens the door.")

    fields = Grown.model_fields
    monkeypatch.setattr(options, "FIELDS", fields)
    monkeypatch.setattr(options, "PANELS", panels(fields))
    given: dict[str, object] = {}
    app = typer.Typer()

    @app.command()
    @takes_settings("greeting")
    def greet(**settings: object) -> None:
        given.update(settings)

    assert CliRunner().invoke(app, ["--greeting", "goodbye"]).exit_code == 0
    assert given == {"greeting": "goodbye"}
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert "What is said first. One of hello, goodbye. [default: hello]" in shown
    assert "─ Logs ─" in shown
    assert is_secret(fields["pin"])


def test_every_field_has_a_panel_and_no_panel_comes_twice() -> None:
    headings = [mark.title for field in FIELDS.values() for mark in field.metadata if isinstance(mark, Panel)]
    assert len(set(headings)) == len(headings)
    assert "" not in panels(FIELDS).values()


COMPLETIONS: dict[str, set[str]] = {
    "ottava ": {"serve", "cluster", "chat", "bench", "quantize", "evaluate", "tune", "roofline"},
    "ottava quantize a b --scheme ": set(INT8_SCHEMES),
    "ottava serve --scheme zero": {"zeroquant", "zeroquant-lkd"},
    "ottava serve --log-level ": {"debug", "info", "warning", "error"},
    "ottava serve --variants w8a8,": {"w8a8,fp16"},
    "ottava serve --no-cuda": {"--no-cuda-graphs"},
    "ottava evaluate --schemes fp16,rtn-t": {"fp16,rtn-token"},
    "ottava roofline llama-3.1-8b --gpu ": set(GPUS),
    "ottava roofline llama-3": {"llama-3.1-8b", "llama-3.1-70b"},
    "ottava chat --variant ": {"w8a8", "fp16"},
}

COMPLETE = """
import contextlib, io, json, os, sys
from service.cli import main

lines, sys.argv = json.loads(sys.argv[1]), sys.argv[:1]
said = {}
os.environ["_OTTAVA_COMPLETE"] = "complete_bash"
for line in lines:
    os.environ |= {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    code = None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as exit:
            code = exit.code
    said[line] = [code, out.getvalue(), "torch" in sys.modules]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def completed() -> dict[str, tuple[int, str, bool]]:
    """Of each line: exit code, what bash would offer at its end, and whether torch was imported; from one process."""
    command = [sys.executable, "-c", COMPLETE, json.dumps(list(COMPLETIONS))]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    return {line: (code, out, has_torch) for line, (code, out, has_torch) in json.loads(done.stdout).items()}


@pytest.mark.parametrize("line", COMPLETIONS)
def test_a_shell_completes(completed: dict[str, tuple[int, str, bool]], line: str) -> None:
    code, out, has_torch = completed[line]
    assert set(out.split()) == COMPLETIONS[line]
    assert (code, has_torch) == (0, False)


def test_the_script_for_completion_is_shown() -> None:
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "service", "--show-completion", "bash"]
    done = subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "complete -o default -F _ottava_completion ottava" in done.stdout
    assert "_OTTAVA_COMPLETE=complete_bash" in done.stdout
