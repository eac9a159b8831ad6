"""Has what an answer is held to compiled: `compiled_rules`."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Receive

from service.engine.api import Engine
from service.web.generation.planning import in_time, key_name, refuse_early_ends
from service.web.generation.tool_use import TextRules, ToolUse, answer_rules, blaming
from service.web.schemas.bodies import Sampling
from service.web.state import Serving


async def compiled_rules(
    body: Sampling,
    of_text: TextRules | None,
    use: ToolUse | None,
    serving: Serving,
    engines: Sequence[Engine],
    *,
    until_s: float,
    timeout_s: float,
    num_answers: int = 1,
    receive: Receive | None,
) -> str | None:
    """The rules that the answers to a body are held to, which the engines have compiled; None for any text.

    of_text: as in `answer_rules`.   until_s, timeout_s: as in `in_time`.   num_answers, receive: as in
    `Compiling.compile`.

    Raises as `answer_rules`, `Compiling.compile`, `in_time` and `refuse_early_ends`.
    """
    if of_text is None and use is None:
        return None
    async with in_time(until_s, timeout_s):
        rules = await answer_rules(of_text, use, serving.tokenizer)
        if rules is not None:
            with blaming(of_text, use):
                await serving.compiling.compile(rules, engines, key_name(), num_answers, receive)
    refuse_early_ends(body, rules)
    return rules
