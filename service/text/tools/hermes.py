"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes and Qwen write it."""

from __future__ import annotations

from uuid import uuid4

from service.text.tools.format import Format, Frame, plain_head


def call_id() -> str:
    """An id as OpenAI's look."""
    return f"call_{uuid4().hex[:24]}"


def unchanged(id_: str) -> str:
    """The id that a client sent: the chat templates of this format take any."""
    return id_


HERMES = Format(
    name="hermes",
    opening="<tool_call>",
    closing="</tool_call>",
    markers=("<tool_call>", "</tool_call>"),
    frame=Frame(
        before_name='<tool_call>\n{"name": "',
        after_name='", "arguments": ',
        end="}\n</tool_call>",
        separator="\n",
    ),
    head=plain_head,
    makes_id=call_id,
    adapts_id=unchanged,
)
