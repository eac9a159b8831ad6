"""`ottava chat`: a conversation in the terminal, with the speed of each answer."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated

import typer

from service.cli.options import complete
from service.cli.session import Session, ask_once
from service.cli.terminal import told_in_one_line
from service.errors import ChatError
from service.tools.chat_client import Chat, open_client

EXAMPLES = """
Examples:
  $ ottava chat            # while `ottava serve` runs in another terminal
  $ ottava chat --compare --system "Answer in one sentence."
  $ ottava chat "Why is the sky blue?" --variant fp16
  $ echo "Why is the sky blue?" | ottava chat > answer.txt
  $ OTTAVA_API_KEY=SECRET ottava chat --url https://llm.example.org

In a conversation, three double quotes begin and end a question of several
lines, Ctrl-C cancels an answer, and /help lists the commands.
"""

URL = "http://127.0.0.1:8000"


def chat(
    question: Annotated[
        str | None,
        typer.Argument(
            help="Ask only this; left out: a conversation, or one question from a pipe.", metavar="QUESTION"
        ),
    ] = None,
    url: Annotated[str, typer.Option(help="Address of the server.", envvar="OTTAVA_URL")] = URL,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Variant to ask.", show_default="the server's first", autocompletion=complete(["w8a8", "fp16"])
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also ask the fp16 baseline, and compare.")] = False,
    system: Annotated[str | None, typer.Option(help="System message before the conversation.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.", show_default="0")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="API key of the server; if given as a flag, every user of this machine can read it.",
            envvar="OTTAVA_API_KEY",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Talk to a running server, and show the speed of each answer.

    From a pipe, or with QUESTION, one answer goes to stdout and its times to stderr.
    """
    with told_in_one_line(), closing(open_client(url, api_key)) as client:
        conversation = Chat(client, system, variant, compare, temperature=temperature, max_tokens=max_tokens)
        if question is None and sys.stdin.isatty():
            Session(conversation, url).run()
            return
        asked = sys.stdin.read() if question is None else question
        if not asked.strip():
            raise ChatError("nothing was asked: type a question behind `ottava chat`, or send one through a pipe")
        ask_once(conversation, asked.strip())
