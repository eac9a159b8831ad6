"""Turns OpenAI's request bodies into plans, and refuses contradicting parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from starlette.types import Receive

from service.engine.api import SamplingParams
from service.errors import InvalidRequest
from service.text.json.schema import json_rules
from service.text.protocols import TokenizerLike
from service.text.reasoning import CLOSING, MARKERS, OPENING, ReasoningParser
from service.text.stops import Ending
from service.web.generation.planning import (
    Room,
    allowed_timeout,
    chat_ids,
    ending_of,
    fitting,
    known_ids,
    num_logprobs,
    refuse_dear,
    sampling_params,
    text_ids,
)
from service.web.generation.rules import compiled_rules
from service.web.generation.run import Plan
from service.web.generation.tool_use import (
    Answering,
    TextRules,
    ToolUse,
    is_continued,
    shown_messages,
    shown_tools,
    tool_use,
)
from service.web.openai.requests import MAX_CHOICES, ChatRequest, CompletionRequest, OpenAIRequest, ResponseFormat
from service.web.state import Serving

NUM_LAST = 48
"""Tokens at the end of a prompt in which a template opens the reasoning; for tokenizers that spell it, too."""
NUM_SEEDS = 1 << 63


class Prompt(NamedTuple):
    """A prompt. text: as the client sent it, or decoded from its ids if it is to be echoed."""

    ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class Order:
    """The fields shared by all choices of a request."""

    id: str
    route: str
    variant: str
    ending: Ending
    shows_logprobs: bool
    continues: bool
    received_s: float
    timeout_s: float

    def plans(self, prompts: Sequence[tuple[list[int], SamplingParams]], n: int) -> list[Plan]:
        """n plans for each prompt; the i-th uses seed + i."""
        return [
            Plan(
                id=self.id if len(prompts) * n == 1 else f"{self.id}-{place * n + i}",
                variant=self.variant,
                prompt_ids=ids,
                params=params if params.seed is None else replace(params, seed=(params.seed + i) % NUM_SEEDS),
                ending=self.ending,
                shows_logprobs=self.shows_logprobs,
                continues=self.continues,
                received_s=self.received_s,
                route=self.route,
                timeout_s=self.timeout_s,
            )
            for place, (ids, params) in enumerate(prompts)
            for i in range(n)
        ]


class ChatPlan(NamedTuple):
    """How the answers to a conversation are made and read.

    use: how they may call tools; None if not at all.
    is_opened: whether they begin inside the model's reasoning; None if they hold none.
    """

    plans: list[Plan]
    use: ToolUse | None
    is_opened: bool | None

    def answering(self) -> Answering:
        """What reads one answer."""
        return Answering(self.use, None if self.is_opened is None else ReasoningParser(is_open=self.is_opened))


async def completion_plans(
    id_: str,
    body: CompletionRequest,
    variant: str,
    serving: Serving,
    received_s: float,
    *,
    receive: Receive | None = None,
) -> tuple[list[Prompt], list[Plan]]:
    """The prompts, and n plans for each. receive: as in `Compiling.compile`.

    Raises:
        InvalidRequest: a parameter is out of range or contradicts another one.
        PromptTooLong: as `fitting`.
        NotReady, EngineFailed: as `Serving.engine`.
    """
    engine = serving.engine(variant)
    _refuse_lone_stream_options(body)
    _refuse_unseen_answers(body)
    serving.count_answers(len(body.prompt) * body.n, "n" if body.n > 1 else "prompt")
    prompts = [await _prompt(prompt, serving, body.echo) for prompt in body.prompt]
    asked = _asked_tokens(body)
    wanted = []
    for prompt in prompts:
        room = Room(len(prompt.ids), engine.max_model_len, "prompt", _limit_of(body))
        # The log-probabilities of a prompt come with a first token; with max_tokens 0 that token is then hidden.
        max_tokens = max(1, fitting(asked, body.max_tokens, room, serving.settings))
        params = sampling_params(
            body,
            serving,
            max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        wanted.append((prompt.ids, params))
    num_asked = body.n * sum(num_logprobs(params, len(ids)) for ids, params in wanted)
    refuse_dear(num_asked, body.n * len(prompts), serving.settings)
    timeout_s = allowed_timeout(body.timeout_s, serving.settings)
    grammar = await compiled_rules(
        body,
        _text_rules(body),
        None,
        serving,
        [engine],
        until_s=received_s + timeout_s,
        timeout_s=timeout_s,
        num_answers=len(wanted) * body.n,
        receive=receive,
    )
    if grammar is not None:
        wanted = [(ids, replace(params, grammar=grammar)) for ids, params in wanted]
    order = Order(
        id=id_,
        route="/v1/completions",
        variant=variant,
        ending=ending_of(body, serving.tokenizer, grammar=grammar),
        shows_logprobs=body.logprobs is not None,
        continues=True,
        received_s=received_s,
        timeout_s=timeout_s,
    )
    return prompts, order.plans(wanted, body.n)


async def chat_prompt(body: ChatRequest, serving: Serving) -> tuple[list[int], ToolUse | None]:
    """Token ids of a conversation, and how its answers may call tools.

    Raises as `tool_use`, `shown_messages` and `chat_ids`.
    """
    use = tool_use(body, serving.tokenizer)
    messages = shown_messages(body.messages, serving.tokenizer)
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    variables = {**effort, **body.chat_template_kwargs}
    return await chat_ids(messages, serving, body.add_generation_prompt, shown_tools(body, use), variables), use


async def chat_plans(
    id_: str,
    body: ChatRequest,
    variant: str,
    serving: Serving,
    received_s: float,
    *,
    route: str = "/v1/chat/completions",
    most_tokens: int | None = None,
    receive: Receive | None = None,
) -> ChatPlan:
    """How the answers are made and read.

    most_tokens: as many at most where the body says no number, fewer where the context or the server's limit is less.
    receive: as in `Compiling.compile`.

    Raises as `completion_plans`, `tool_use` and `shown_messages` and, where answers are held to a grammar, as
    `json_grammar`, `call_grammar` and `Engine.compile`.
    """
    engine = serving.engine(variant)
    _refuse_lone_stream_options(body)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest(
            f"`top_logprobs` is {body.top_logprobs}, but `logprobs` is false; send `logprobs` true as well",
            "top_logprobs",
        )
    serving.count_answers(body.n, "n")
    ids, use = await chat_prompt(body, serving)
    room = Room(len(ids), engine.max_model_len, "messages", _limit_of(body))
    # Without a number of tokens, as many as may have log-probabilities.
    priced = serving.settings.max_logprobs // (body.n * ((body.top_logprobs or 0) + 1))
    most = priced if body.logprobs else most_tokens
    max_tokens = fitting(_asked_tokens(body), most, room, serving.settings)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling_params(body, serving, max_tokens, logprobs=logprobs)
    refuse_dear(body.n * num_logprobs(params, len(ids)), body.n, serving.settings)
    timeout_s = allowed_timeout(body.timeout_s, serving.settings)
    grammar = await compiled_rules(
        body,
        _text_rules(body),
        use,
        serving,
        [engine],
        until_s=received_s + timeout_s,
        timeout_s=timeout_s,
        num_answers=body.n,
        receive=receive,
    )
    if grammar is not None:
        params = replace(params, grammar=grammar)
    order = Order(
        id=id_,
        route=route,
        variant=variant,
        ending=ending_of(body, serving.tokenizer, MARKERS.union(() if use is None else use.format.markers), grammar),
        shows_logprobs=body.logprobs,
        continues=body.add_generation_prompt and is_continued(body.messages),
        received_s=received_s,
        timeout_s=timeout_s,
    )
    # A grammar leaves no room for reasoning.
    reasons = serving.tokenizer.has_reasoning and grammar is None
    opened = is_opened(ids, serving.tokenizer) if reasons else None
    return ChatPlan(order.plans([(ids, params)], body.n), use, opened)


async def _prompt(prompt: str | list[int], serving: Serving, is_echoed: bool) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(await text_ids(prompt, serving, "prompt"), prompt)
    ids = known_ids(prompt, serving, "prompt")
    if not is_echoed:
        return Prompt(ids, "")
    decoder = serving.tokenizer.detokenizer()
    return Prompt(ids, "".join(map(decoder.push, ids)) + decoder.flush())


def is_opened(prompt_ids: Sequence[int], tokenizer: TokenizerLike) -> bool:
    """Whether a prompt ends inside the model's reasoning."""
    decoder = tokenizer.detokenizer((), MARKERS)
    text = "".join(map(decoder.push, prompt_ids[-NUM_LAST:])) + decoder.flush()
    return text.rfind(OPENING) > text.rfind(CLOSING)


def _text_rules(body: OpenAIRequest) -> TextRules | None:
    """The rules for `response_format` or `structured_outputs`; None for any text."""
    found = [_schema_rules(body.response_format)] if isinstance(body, ChatRequest) else []
    found += [TextRules(name, wanted.rules) for name, wanted in body.constraints()]
    given = [rules for rules in found if rules is not None]
    if len(given) > 1:
        first, second = given[:2]
        raise InvalidRequest(
            f"`{second.param}` and `{first.param}` both say what the answer is; send one of them", second.param
        )
    return given[0] if given else None


def _schema_rules(wanted: ResponseFormat | None) -> TextRules | None:
    """The rules for `response_format`; None for any text."""
    if wanted is None:
        return None
    if (wanted.json_schema is not None) != (wanted.type == "json_schema"):
        remedy = "send it as well" if wanted.json_schema is None else 'send the type "json_schema", or leave it out'
        raise InvalidRequest(
            f"`response_format.type` is {wanted.type!r}, which does not go with "
            f"{'no' if wanted.json_schema is None else 'a'} `json_schema`; {remedy}",
            "response_format",
        )
    if wanted.type == "text":
        return None
    schema = None if wanted.json_schema is None else wanted.json_schema.schema_
    return TextRules("response_format", lambda: json_rules(schema))


def _limit_of(body: OpenAIRequest) -> str:
    """The field that says how many tokens to generate."""
    return "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"


def _asked_tokens(body: OpenAIRequest) -> int | None:
    newer = body.max_completion_tokens
    older = body.max_tokens if "max_tokens" in body.model_fields_set else None
    if newer is not None and older is not None and newer != older:
        raise InvalidRequest(
            f"`max_tokens` is {older} and `max_completion_tokens` is {newer}; send one of them", "max_tokens"
        )
    return older if newer is None else newer


def _refuse_lone_stream_options(body: OpenAIRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(
            "`stream_options` is sent, but `stream` is false; send `stream` true as well, or leave it out",
            "stream_options",
        )


def _refuse_unseen_answers(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of != body.n:
        raise InvalidRequest(
            f"`best_of` is {body.best_of} and `n` is {body.n}: every answer that is generated is returned; "
            f"send {body.n}, or leave it out",
            "best_of",
        )
    if len(body.prompt) * body.n > MAX_CHOICES:
        raise InvalidRequest(
            f"`prompt` has {len(body.prompt)} entries and `n` is {body.n}, which makes {len(body.prompt) * body.n} "
            f"answers; the limit is {MAX_CHOICES}; send the rest in another request",
            "prompt",
        )
