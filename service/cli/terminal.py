"""The commands' output on stderr: errors in one line, and progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from quant.errors import QuantError
from service.errors import BenchError, ChatError, StartupError
from service.later import Later

LINE_EVERY_S = 10.0
"""Seconds between two lines of one stage if no bars can be drawn."""

OnProgress = Callable[..., None]

err = Console(stderr=True)
torch = Later("torch")


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn an error that the user can fix into one line on stderr and exit code 1."""
    try:
        yield
    except (StartupError, ChatError, BenchError, QuantError, OSError) as error:
        raise _told(error) from error
    # Evaluated, and torch imported, only for an error that is none of the above.
    except torch.OutOfMemoryError as error:
        raise _told(error) from error


def say_error(message: str) -> None:
    """Print an error in one line on stderr: markup is escaped, and lines of a library's message are joined."""
    line = escape(" ".join(part.strip() for part in message.splitlines()))
    err.print(f"[bold red]error:[/] {line}", highlight=False, soft_wrap=True)


def _told(error: BaseException) -> typer.Exit:
    say_error(str(error))
    return typer.Exit(1)


@contextmanager
def progress(say: Callable[[str], None] | None = None) -> Iterator[OnProgress]:
    """A `Progress` that shows bars on a terminal, and lines elsewhere.

    say: called with each line; None prints to stderr, prefixed with the program's name.
    """
    if not sys.stderr.isatty():
        yield Lines(say or _print)
        return
    with _bars() as bars:
        on_progress = Bars(bars)
        yield on_progress
        on_progress.finish()


def _print(line: str) -> None:
    err.print(f"ottava: {escape(line)}", highlight=False, soft_wrap=True)


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
        console=err,
    )


class Bars:
    """Shows a bar per stage; one without a known length pulses until the next stage begins."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str = "", /) -> None:
        if stage not in self._tasks:
            self.finish()
            self._tasks[stage] = self._bars.add_task(stage, total=total or None, detail="")
        counted = f"{done} of {total}, {detail}" if detail else ""
        self._bars.update(self._tasks[stage], completed=done, detail=counted)

    def finish(self) -> None:
        """Show every stage as done."""
        for task in self._bars.tasks:
            length = task.total or 1
            self._bars.update(task.id, total=length, completed=length)


class Lines:
    """Prints a line when a stage begins, and one every LINE_EVERY_S while it lasts."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._stage = ""
        self._said_s = 0.0

    def __call__(self, stage: str, done: int, total: int, detail: str = "", /) -> None:
        now_s = self._clock()
        if stage == self._stage and now_s - self._said_s < LINE_EVERY_S:
            return
        self._stage, self._said_s = stage, now_s
        counted = f": {done} of {total}" if total and done else ""
        self._say(f"{stage}{counted}{', ' + detail if detail else ''}")
