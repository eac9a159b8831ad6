"""`{"name": ..., "parameters": {...}}`, as Llama 3 writes it, on its own or behind `<|python_tag|>`."""

from __future__ import annotations

from service.text.tools.format import Format, Frame, plain_head
from service.text.tools.hermes import call_id, unchanged

LLAMA = Format(
    name="llama",
    opening="<|python_tag|>",
    closing="",
    markers=("<|python_tag|>",),
    # Its chat template refuses a conversation with two calls in one message.
    frame=Frame(before_name='{"name": "', after_name='", "parameters": ', end="}"),
    head=plain_head,
    makes_id=call_id,
    adapts_id=unchanged,
    is_bare=True,
)
