"""An interactive conversation in the terminal, with commands."""

from __future__ import annotations

import os
import readline
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from service.cli.terminal import err, say_error
from service.cli.verdict import comparison_lines, metrics_line, printable
from service.errors import ChatError
from service.tools.chat_client import Chat
from service.web.schemas.generate import GenerateResponse

PROMPT, MORE = "> ", ". "
QUOTES = '"""'
HISTORY_LINES = 1000
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


def ask_once(chat: Chat, question: str) -> None:
    """Write one answer to stdout, and its times to stderr. Raises ChatError as `Chat.ask`."""
    try:
        answer = _stream(chat, question, shows_baseline=False)
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    for line in _said_of(answer):
        err.print(escape(line), highlight=False, soft_wrap=True)


class Session:
    """Reads questions and commands until the user leaves."""

    def __init__(self, chat: Chat, url: str) -> None:
        self._chat = chat
        self._url = url
        self._out = Console()
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/reset": ("clear the conversation", self._reset),
            "/variant": ("NAME: ask another variant; without a name, the default", self._set_variant),
            "/compare": ("on or off: also ask the fp16 baseline; without a word, toggle it", self._set_compare),
            "/help": ("list the commands", self._help),
            "/quit": ("leave, as Ctrl-D does", self._quit),
        }
        self._is_over = False

    def run(self) -> None:
        """Run until /quit or the end of input. Raises ChatError if no server answers at the start."""
        info = self._chat.info()
        self._note(f"{info['model']} at {self._url}: {', '.join(info['variants'])}. /help lists the commands.")
        with _history():
            while not self._is_over:
                self._turn()

    def _turn(self) -> None:
        try:
            text = read_question(input)
        except EOFError:
            self._out.print()
            self._is_over = True
            return
        except KeyboardInterrupt:
            self._out.print()
            self._note("/quit or Ctrl-D leaves")
            return
        if text.startswith("/"):
            self._obey(text)
        elif text:
            self._answer(text)

    def _answer(self, question: str) -> None:
        try:
            answer = _stream(self._chat, question, shows_baseline=True)
        except KeyboardInterrupt:
            self._out.print()
            self._note("cancelled; the question is forgotten")
        except ChatError as error:
            self._out.print()
            say_error(str(error))
        else:
            for line in _said_of(answer):
                self._note(line)

    def _obey(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name not in self._commands:
            self._note(f"{name} is no command; there are {', '.join(self._commands)}")
            return
        self._commands[name][1](argument.strip())

    def _reset(self, _: str) -> None:
        self._chat.reset()
        self._note("the conversation is cleared")

    def _set_variant(self, name: str) -> None:
        self._chat.variant = name or None
        self._note(f"{name or 'the default variant'} answers from now on")

    def _set_compare(self, word: str) -> None:
        if word not in ("", "on", "off"):
            self._note(f"/compare {word} is neither on nor off")
            return
        self._chat.compare = word == "on" or (not word and not self._chat.compare)
        self._note(f"comparing is {'on' if self._chat.compare else 'off'}")

    def _help(self, _: str) -> None:
        for name, (text, _function) in self._commands.items():
            self._note(f"{name:<9} {text}")
        self._note(f"{QUOTES:<9} begins and ends a question of several lines; Ctrl-C cancels an answer")

    def _quit(self, _: str) -> None:
        self._is_over = True

    def _note(self, text: str) -> None:
        self._out.print(escape(text), style="dim", highlight=False, soft_wrap=True)


def read_question(read: Callable[[str], str]) -> str:
    """Read a line, or several lines between three double quotes. Raises EOFError at the end of input."""
    line = read(PROMPT).strip()
    if not line.startswith(QUOTES):
        return line
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(read(MORE))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip()


def _stream(chat: Chat, question: str, shows_baseline: bool) -> GenerateResponse:
    """Write an answer to stdout as it arrives, with the variant's name above each if there are two."""
    speaker = ""
    # Closed at once if the user cancels, so that the server stops generating.
    with closing(chat.ask(question)) as items:  # type: ignore[type-var]
        for item in items:
            if isinstance(item, GenerateResponse):
                break
            if item.variant != speaker:
                if speaker and not shows_baseline:
                    continue
                if chat.compare and shows_baseline:
                    sys.stdout.write(f"{chr(10) * 2 if speaker else ''}[{item.variant}]\n")
                speaker = item.variant
            sys.stdout.write(printable(item.text) if sys.stdout.isatty() else item.text)
            sys.stdout.flush()
        else:
            raise ChatError("the server sent no answer; ask again")
    sys.stdout.write("\n")
    sys.stdout.flush()
    return item


def _said_of(answer: GenerateResponse) -> Iterator[str]:
    yield metrics_line(answer)
    if answer.baseline is not None:
        yield metrics_line(answer.baseline)
        yield from comparison_lines(answer)


@contextmanager
def _history() -> Iterator[None]:
    """Keep the input history of all conversations in a file that only its owner can read."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "ottava" / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        readline.read_history_file(path)
    except OSError as error:
        say_error(f"the history is not kept: {error}")
        yield
        return
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        readline.write_history_file(path)
