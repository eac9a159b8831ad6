"""Checks a request body and turns it into prompt ids and sampling parameters, for all generation routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from service.engine.api import RECOMMENDED, SamplingParams
from service.errors import InvalidRequest, PromptTooLong
from service.settings import Settings
from service.telemetry.record import current
from service.text.protocols import TokenizerLike
from service.text.stops import Ending
from service.web.generation.deadlines import late
from service.web.schemas.bodies import Sampling
from service.web.state import Serving

THREAD_CHARS = 4096
"""Longer texts are encoded on a thread; encoding a shorter one takes less time than switching threads."""

MESSAGE_CHARS = 64
"""Characters that take as long to encode as the chat template takes for a message."""


class Room(NamedTuple):
    """A prompt's length, the context's length, and the body's fields to name in errors.

    prompt: field of the prompt. limit: field of the number of tokens to generate.
    """

    num_prompt: int
    max_model_len: int
    prompt: str = "prompt"
    limit: str = "max_tokens"


async def text_ids(text: str, serving: Serving, param: str) -> list[int]:
    """Token ids of a text.

    Raises:
        InvalidRequest: the text has no tokens, or one for which the model has no row.
    """
    return _some(await spelled(text, serving, param), param)


async def spelled(text: str, serving: Serving, param: str, *, adds_special: bool = True) -> list[int]:
    """As `text_ids`, but a text may have no tokens. adds_special: see `TokenizerLike.encode`."""
    encode, is_long = serving.tokenizer.encode, len(text) > THREAD_CHARS
    ids = await asyncio.to_thread(encode, text, adds_special) if is_long else encode(text, adds_special)
    return _known_rows(ids, serving, param)


async def chat_ids(
    messages: Sequence[dict[str, Any]],
    serving: Serving,
    is_open: bool = True,
    tools: Sequence[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation in the model's chat template; the last three as in `TokenizerLike.apply_chat`.

    Raises:
        InvalidRequest: the conversation is empty, the template refuses it, or the model has no row for one of its
            tokens.
    """
    if not messages:
        return _some([], "messages")
    tokenizer = serving.tokenizer
    num_chars = sum(len(message["content"]) for message in messages) + MESSAGE_CHARS * len(messages)
    has_calls = tools or any("tool_calls" in message for message in messages)
    ids = (
        await asyncio.to_thread(tokenizer.apply_chat, messages, is_open, tools, variables)
        if num_chars > THREAD_CHARS or has_calls
        else tokenizer.apply_chat(messages, is_open, tools, variables)
    )
    return _some(_known_rows(ids, serving, "messages"), "messages")


def known_ids(ids: list[int], serving: Serving, param: str) -> list[int]:
    """Check token ids sent by a client and return them.

    All ids that the model can generate are accepted, including those that its tokenizer does not know.

    Raises:
        InvalidRequest: ids is empty, or the model has no row for one.
    """
    limit = serving.vocab_size - 1
    for token_id in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token_id <= limit:
            raise InvalidRequest(
                f"`{param}` holds {token_id}, outside the vocabulary: ids run from 0 to {limit}; send only those", param
            )
    return _some(ids, param)


def fitting(asked: int | None, default: int | None, room: Room, settings: Settings) -> int:
    """The number of tokens to generate: asked, else default, else as many as fit in the context.

    Without asked, the result is also cut to what fits and to max_tokens_limit.

    Raises:
        PromptTooLong: the prompt fills the context, or is above max_prompt_tokens.
        InvalidRequest: asked is more than fits in the context or than max_tokens_limit.
    """
    _refuse_above_limits(asked, room, settings)
    num_left = room.max_model_len - room.num_prompt
    if num_left < 1:
        raise PromptTooLong(
            f"the prompt has {room.num_prompt} tokens; the context holds {room.max_model_len}, prompt and answer "
            f"together; shorten the prompt to at most {room.max_model_len - 1} tokens, or serve with a larger "
            "--max-model-len",
            room.prompt,
        )
    if asked is None:
        return min(n for n in (num_left, default, settings.max_tokens_limit) if n is not None)
    if asked > num_left:
        raise InvalidRequest(
            f"`{room.limit}` is {asked}, but a prompt of {room.num_prompt} tokens leaves {num_left} of the context's "
            f"{room.max_model_len}; the largest possible here is {num_left}",
            room.limit,
        )
    return asked


def allowed_timeout(asked_s: float | None, settings: Settings) -> float:
    """Seconds that a request may take: asked_s, or the server's limit if None.

    Raises:
        InvalidRequest: asked_s is above the limit.
    """
    limit_s = settings.request_timeout_s
    if asked_s is not None and asked_s > limit_s:
        raise InvalidRequest(
            f"`timeout_s` is {asked_s:g}, which is above this server's limit of {limit_s:g} s; send at most that",
            "timeout_s",
        )
    return limit_s if asked_s is None else asked_s


@asynccontextmanager
async def in_time(until_s: float, timeout_s: float) -> AsyncIterator[None]:
    """Cancel what is done inside at until_s, from `time.perf_counter`. timeout_s: for the message.

    Raises:
        DeadlineExceeded: it was not done by then.
    """
    try:
        async with asyncio.timeout(until_s - time.perf_counter()):
            yield
    except TimeoutError as error:
        raise late(timeout_s) from error


def num_logprobs(params: SamplingParams, num_prompt: int) -> int:
    """Log-probabilities that an answer of max_tokens contains, those of its prompt included."""
    of_answer = 0 if params.logprobs is None else params.max_tokens * (params.logprobs + 1)
    return of_answer + (0 if params.prompt_logprobs is None else num_prompt * (params.prompt_logprobs + 1))


def refuse_dear(num_asked: int, num_answers: int, settings: Settings) -> None:
    """Refuse a request for too many log-probabilities: their answer takes memory and time of everybody.

    Raises:
        InvalidRequest: num_asked, of all answers together, is above max_logprobs.
    """
    if num_asked > settings.max_logprobs:
        raise InvalidRequest(
            f"`logprobs` asks for {num_asked} log-probabilities: {num_answers} answers x tokens, with `echo` those of "
            f"the prompt too, x (likeliest tokens + 1); this server's limit is {settings.max_logprobs} a request; ask "
            "for fewer answers, tokens or likeliest tokens",
            "logprobs",
        )


def _refuse_above_limits(asked: int | None, room: Room, settings: Settings) -> None:
    max_prompt, max_asked = settings.max_prompt_tokens, settings.max_tokens_limit
    if max_prompt is not None and room.num_prompt > max_prompt:
        raise PromptTooLong(
            f"the prompt has {room.num_prompt} tokens; this server takes at most {max_prompt}; shorten the prompt",
            room.prompt,
        )
    if max_asked is not None and asked is not None and asked > max_asked:
        raise InvalidRequest(
            f"`{room.limit}` is {asked}; this server generates at most {max_asked} per request; ask for fewer",
            room.limit,
        )


def sampling_params(
    body: Sampling,
    serving: Serving,
    max_tokens: int,
    *,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The engine's parameters: from the fields that all routes share, and from those of one route, given here.

    What the body leaves out is what the model's generation_config.json recommends, if that is used.

    Raises:
        InvalidRequest: a token id is outside the vocabulary, or `min_tokens` is above max_tokens.
    """
    _refuse_unknown_ids(body, serving.vocab_size)
    if body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"`min_tokens` is {body.min_tokens}, but the answer has at most {max_tokens} tokens; send at most that",
            "min_tokens",
        )
    chosen = {
        name: getattr(body, name) if name in body.model_fields_set else value
        for name, value in {**_own(body), **serving.host.info.sampling_defaults}.items()
    }
    top_k = int(chosen["top_k"])
    ends = set(body.stop_token_ids)
    # The engine's own end tokens are not sampled early either.
    held = {i for i in serving.tokenizer.eos_ids if i < serving.vocab_size} if body.min_tokens else set()
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=chosen["temperature"],
        # A top_k of the whole vocabulary filters nothing; 0 saves the sampler a sort.
        top_k=top_k if top_k < serving.vocab_size else 0,
        top_p=chosen["top_p"],
        min_p=chosen["min_p"],
        repetition_penalty=chosen["repetition_penalty"],
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=tuple((int(token), value) for token, value in body.logit_bias.items() if value),
        end_ids=tuple(sorted(ends)),
        held_ids=tuple(sorted(ends | held)) if body.min_tokens else (),
        min_tokens=body.min_tokens,
        seed=body.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        ignore_eos=body.ignore_eos,
        priority=body.priority,
        owner=key_name(),
        salt="" if serving.settings.prefix_sharing else key_name(),
    )


def refuse_early_ends(body: Sampling, grammar: str | None) -> None:
    """Raise InvalidRequest if the answer may be complete before it may end."""
    if grammar is not None and body.min_tokens:
        raise InvalidRequest(
            f"`min_tokens` is {body.min_tokens}, but the answer is held to a grammar, which says where it ends; leave "
            "`min_tokens` out",
            "min_tokens",
        )


def ending_of(
    body: Sampling, tokenizer: TokenizerLike, markers: Collection[str] = (), grammar: str | None = None
) -> Ending:
    """What ends the text of an answer. markers: special tokens that its parser must see."""
    named = {name for name in tokenizer.special_ids if any(name in stop for stop in body.stop)} if body.stop else set()
    shown = named.union(markers) if body.skip_special_tokens else {*tokenizer.special_ids, *markers}
    # The end token ends an answer that is held to a grammar in any case.
    ends = frozenset() if body.ignore_eos and grammar is None else tokenizer.eos_ids
    return Ending(
        stops=tuple(body.stop),
        token_ids=ends.union(body.stop_token_ids),
        is_included=body.include_stop_str_in_output,
        min_tokens=body.min_tokens,
        shown=frozenset(shown),
    )


def _own(body: Sampling) -> dict[str, float]:
    """The route's own defaults of what a model may recommend."""
    return {name: getattr(body, name) for name in RECOMMENDED}


def _refuse_unknown_ids(body: Sampling, vocab_size: int) -> None:
    for name, ids in (("stop_token_ids", body.stop_token_ids), ("logit_bias", map(int, body.logit_bias))):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"`{name}` names token {token_id}, outside the vocabulary: ids run from 0 to {vocab_size - 1}; "
                    "send only those",
                    name,
                )


def key_name() -> str:
    """The name of the API key that the present request came with."""
    record = current.get()
    return "" if record is None else record.key


def _known_rows(ids: list[int], serving: Serving, param: str) -> list[int]:
    """Token ids that the tokenizer made of a client's text, if the model has a row for each.

    A tokenizer may know more tokens than the model, for instance a [PAD] that was added for training.
    """
    found = max(ids, default=0)
    if found >= serving.vocab_size:
        raise InvalidRequest(
            f"`{param}` spells {serving.tokenizer.token_text(found)!r}, which is token {found}: the tokenizer knows "
            f"it, but the model's token ids run from 0 to {serving.vocab_size - 1}; leave it out of the text",
            param,
        )
    return ids


def _some(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise InvalidRequest(f"`{param}` is empty; send at least one token", param)
    return ids
