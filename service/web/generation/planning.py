"""From a body to what an engine is asked: the checks that every route makes before an engine sees a request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from service.engine.api import SamplingParams
from service.errors import InvalidRequest, PromptTooLong
from service.settings import Settings
from service.text.protocols import TokenizerLike
from service.web.schemas.bodies import Sampling

THREAD_CHARS = 4096
"""Encoding a shorter text takes less time than the way to another thread and back."""


class Room(NamedTuple):
    """A prompt in a context: its tokens, what the context holds, and the body's fields to blame.

    prompt: field that the prompt came in. limit: field that asks for a number of tokens.
    """

    num_prompt: int
    max_model_len: int
    prompt: str = "prompt"
    limit: str = "max_tokens"


async def text_ids(text: str, tokenizer: TokenizerLike, param: str) -> list[int]:
    """Token ids of a text.

    Raises:
        InvalidRequest: there are none.
    """
    if not text:
        return _some([], param)
    is_long = len(text) > THREAD_CHARS
    return _some(await asyncio.to_thread(tokenizer.encode, text) if is_long else tokenizer.encode(text), param)


async def chat_ids(messages: Sequence[dict[str, str]], tokenizer: TokenizerLike, is_open: bool = True) -> list[int]:
    """Token ids of a conversation by the model's chat template; is_open as in `TokenizerLike.apply_chat`.

    Raises:
        InvalidRequest: it is empty, or the template refuses it.
    """
    if not messages:
        return _some([], "messages")
    is_long = sum(len(message["content"]) for message in messages) > THREAD_CHARS
    ids = (
        await asyncio.to_thread(tokenizer.apply_chat, messages, is_open)
        if is_long
        else tokenizer.apply_chat(messages, is_open)
    )
    return _some(ids, "messages")


def known_ids(ids: list[int], tokenizer: TokenizerLike, param: str) -> list[int]:
    """The ids as they are.

    Raises:
        InvalidRequest: there are none, or one lies outside the vocabulary.
    """
    limit = tokenizer.vocab_size - 1
    for token_id in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token_id <= limit:
            raise InvalidRequest(
                f"`{param}` holds {token_id}, outside the vocabulary: ids run from 0 to {limit}", param
            )
    return _some(ids, param)


def fitting(asked: int | None, default: int | None, room: Room, settings: Settings) -> int:
    """How many tokens may be generated: as asked, or else the default, or else (None) all that the context leaves.

    Raises:
        PromptTooLong: the context leaves no room for a single token, or the prompt is above max_prompt_tokens.
        InvalidRequest: the context leaves less than was asked for, or max_tokens_limit allows less.
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
    """Seconds that a request may take: as asked, or else the server's limit.

    Raises:
        InvalidRequest: more was asked for than the limit.
    """
    limit_s = settings.request_timeout_s
    if asked_s is not None and asked_s > limit_s:
        raise InvalidRequest(
            f"`timeout_s` is {asked_s:g}, which is above this server's limit of {limit_s:g} s; send at most that",
            "timeout_s",
        )
    return limit_s if asked_s is None else asked_s


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


def sampling_params(body: Sampling, tokenizer: TokenizerLike, max_tokens: int) -> SamplingParams:
    """What the engine is told of the fields that every route shares."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        # A filter that lets every token pass, which saves the sampler a sort.
        top_k=body.top_k if body.top_k < tokenizer.vocab_size else 0,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        ignore_eos=body.ignore_eos,
    )


def _some(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise InvalidRequest(f"`{param}` is empty; send at least one token", param)
    return ids
