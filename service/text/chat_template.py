"""Renders a conversation with the model's chat template.

The variables and filters are those that templates of the Hugging Face Hub expect.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from quant.checkpoint.json_file import read_json
from quant.errors import CheckpointError
from service.errors import InvalidRequest, UnsupportedModel, first_line
from service.text.reasoning import OPENING
from service.text.sandbox import BoundedEnvironment, OutOfBudget
from service.text.tools.formats import format_of

logger = logging.getLogger(__name__)

PARAM = "messages"
INSTEAD = "send `prompt` with the whole text instead"
TOOL_USE = "tool_use"
"""The name of a template for conversations with tools, beside the default one."""
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A Jinja template in a sandbox, because it is part of an untrusted model.

    A template that does not compile, or that does not come to an end, refuses every conversation: the model can still
    continue texts.

    Args:
        source: the template's text.
        special_tokens: name -> text of the special tokens that it may use, such as `bos_token`.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
        )
        environment.add_filter("tojson", _to_json)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self._special_tokens = dict(special_tokens)
        self.knows_developers = "developer" in source
        self.tool_format = format_of(source)
        """How the model writes calls of tools; None if the template knows none, or has another format."""
        self.has_reasoning = OPENING in source
        """Whether the model thinks before it answers; see `service.text.reasoning`."""
        self._environment = environment
        self._template: jinja2.Template | None = None
        self.fault: str | None = None
        """Why the template refuses every conversation; None if it does not."""
        try:
            self._template = environment.from_string(source)
            # Found here, since at a request it would take that long each time.
            self._rendered(messages=[{"role": "user", "content": "x"}], add_generation_prompt=True)
        except OutOfBudget as error:
            self.fault = f"does not come to an end: {error}"
        except Exception as error:  # noqa: BLE001 (Python compiles what Jinja made of it, and may raise anything)
            if self._template is None:
                self.fault = f"is not valid: {_words(error)}"
        self.takes_later_system = self.fault is None and self._shows_later_system()
        """Whether a system message may come after others, and is shown then."""

    def _shows_later_system(self) -> bool:
        mark = secrets.token_hex(8)
        messages = [{"role": "user", "content": "x"}, {"role": "system", "content": mark}]
        try:
            return mark in self._rendered(messages=messages, add_generation_prompt=True)
        except Exception:  # noqa: BLE001 (a template may raise anything)
            return False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        is_open: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: at least one, each with `role` and `content`, which is a text. Those that call tools have
                `tool_calls` as OpenAI's do, but for the arguments, which are objects.
            is_open: end the text inside the assistant's turn: at the start of a new message or, if the last one is the
                assistant's and calls no tools, at the end of its content.
            tools: as OpenAI's; None for none.
            variables: others that the template may know, such as `enable_thinking`.

        Raises:
            InvalidRequest: the template refuses these messages, fails on them, does not come to an end, or is broken.
        """
        if self.fault is not None:
            raise InvalidRequest(f"the model's chat template {self.fault}; {INSTEAD}", PARAM)
        shown = [dict(message) for message in messages]
        continues = is_open and shown[-1]["role"] == "assistant" and not shown[-1].get("tool_calls")
        # A random mark shows where the last message ends in the rendered text.
        mark = f"<{secrets.token_hex(16)}>"
        if continues:
            shown[-1]["content"] += mark
        try:
            text = self._rendered(
                **{
                    **(variables or {}),
                    "messages": shown,
                    "add_generation_prompt": is_open and not continues,
                    "tools": tools or None,
                }
            )
        except OutOfBudget as error:
            raise InvalidRequest(
                f"the model's chat template does not come to an end on these messages: {error}; send fewer messages, "
                "or `prompt`",
                PARAM,
            ) from error
        except jinja2.TemplateError as error:
            raise _refusal(_words(error)) from error
        except Exception as error:
            raise InvalidRequest(
                f"the model's chat template fails on these messages: {_words(error)}; {INSTEAD}", PARAM
            ) from error
        if not continues:
            return text
        before, found, _ = text.rpartition(mark)
        if not found:
            raise _refusal("it leaves out the assistant's message that is to be continued")
        return before

    def _rendered(self, **variables: object) -> str:
        template = self._template
        assert template is not None
        given = {"tools": None, "documents": None, **variables, **self._special_tokens}
        return self._environment.within_budget(lambda: template.render(given))


def _words(error: Exception) -> str:
    """What an error of a template says, with its kind unless the template wrote it."""
    if type(error) is jinja2.TemplateError:
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


def read_template(folder: Path, name: str = "default") -> ChatTemplate | None:
    """The template of this name of a model folder, or None if it has none.

    Raises:
        UnsupportedModel: a file of the folder cannot be read.
    """
    config = read_object(folder / "tokenizer_config.json")
    source = _source(folder, config) if name == "default" else _named_source(folder, config, name)
    if source is None:
        return None
    if isinstance(source, list):
        template = ChatTemplate("", {})
        template.fault = f"has no default: it has {', '.join(map(repr, source))} alone"
    else:
        template = ChatTemplate(source, special_tokens(folder))
    if template.fault is not None:
        logger.warning("%s: the chat template %s; chats are refused", folder, template.fault)
    return template


def special_tokens(folder: Path) -> dict[str, str]:
    """Name -> text of a model folder's special tokens.

    Raises:
        UnsupportedModel: a file of the folder cannot be read.
    """
    named = read_object(folder / "special_tokens_map.json") | read_object(folder / "tokenizer_config.json")
    found = {name: _text(named.get(name)) for name in SPECIAL_NAMES}
    return {name: text for name, text in found.items() if text is not None}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file does not exist.

    Raises:
        UnsupportedModel: the file cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except CheckpointError as error:
        raise UnsupportedModel(str(error)) from error


def _source(folder: Path, config: Mapping[str, Any]) -> str | list[str] | None:
    """The template's text, from its own file if there is one, else from the tokenizer's configuration.

    If several are named and none is the default, their names.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UnsupportedModel(f"{path} cannot be read: {first_line(error)}") from error
    found = read_object(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):
        named = _named(found)
        if named and "default" not in named:
            return list(named)
        found = named.get("default")
    return found if isinstance(found, str) and found else None


def _named_source(folder: Path, config: Mapping[str, Any], name: str) -> str | None:
    """The text of a template beside the default one, from its own file or from the tokenizer's configuration."""
    path = folder / "additional_chat_templates" / f"{name}.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UnsupportedModel(f"{path} cannot be read: {first_line(error)}") from error
    found = config.get("chat_template")
    named = _named(found if isinstance(found, list) else [])
    source = named.get(name)
    return source if isinstance(source, str) else None


def _named(listed: Sequence[object]) -> dict[str, object]:
    """Name -> template of a list of them; other entries are passed over."""
    objects = [each for each in listed if isinstance(each, dict)]
    return {each["name"]: each.get("template") for each in objects if isinstance(each.get("name"), str)}


def _text(token: object) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _refusal(reason: str) -> InvalidRequest:
    first = reason.partition("\n")[0]
    return InvalidRequest(f"the model's chat template refuses these messages: {first}", PARAM)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces Jinja's own filter, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's text for training; here only its content is rendered."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
