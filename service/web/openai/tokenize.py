"""POST /tokenize and /detokenize: texts and conversations as token ids and back, in the shapes of vLLM's clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Annotated, Any, Self, TypeVar

import msgspec
from fastapi import APIRouter, Depends
from pydantic import AfterValidator, BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from service.errors import InvalidRequest
from service.text.protocols import TokenizerLike
from service.web.failures import CountedRoute
from service.web.generation.planning import chat_ids, spelled
from service.web.generation.tool_use import shown_messages
from service.web.openai.inert import Nothing
from service.web.openai.requests import ChatMessage
from service.web.openapi import failures
from service.web.schemas.bodies import NullIsAbsent, Text, empty
from service.web.schemas.tools import MAX_TOOLS, ToolDefinition, encodable
from service.web.state import Serving, serving_of

MAX_TOKENS = 1 << 17
"""Most tokens of a request: an answer of about 1 MB, and of 4 with the tokens' texts."""
THREAD_TOKENS = 1024
"""Beyond this many, their texts are made on a thread: that takes about 1 us for each."""

T = TypeVar("T")

router = APIRouter(route_class=CountedRoute, tags=["openai"], responses=failures(400, 401, 404, 422, 429, 503))
Shared = Annotated[Serving, Depends(serving_of)]


class TokenizeRequest(NullIsAbsent):
    """Body of POST /tokenize: a text or a conversation."""

    model: str | None = Field(None, description="NAME, NAME:VARIANT or VARIANT, see /v1/models; none: the first there.")
    prompt: Text | None = Field(None, description="A text, as /v1/completions takes it.")
    messages: list[ChatMessage] | None = Field(
        None, min_length=1, fail_fast=True, description="A conversation, in the model's chat template."
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Add the tokens that the model expects around a text; none: with `prompt`. Accepted with "
        "`messages`: false, since the chat template writes them.",
    )
    add_generation_prompt: bool = Field(
        True, description="End a conversation inside the assistant's turn, as /v1/chat/completions does."
    )
    continue_final_message: bool = Field(
        False, description="Leave the last message open, which must be the assistant's; with `messages`."
    )
    return_token_strings: bool = Field(False, description="Also the text of each token.")
    tools: list[ToolDefinition] = empty(list, max_length=MAX_TOOLS, description="Shown to the chat template.")
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(encodable)] = empty(
        dict, description='Variables for the chat template, such as {"enable_thinking": false}.'
    )
    chat_template: Nothing = Field(None, description="Accepted: null; the model's own is used.")
    mm_processor_kwargs: Nothing = Field(None, description="Accepted: null; content is text.")

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("not_one", "send one of `prompt` and `messages`")
        return self


class TokenizeResponse(BaseModel):
    """The tokens, as a generation would take them."""

    count: int = Field(description="Number of tokens.")
    max_model_len: int = Field(description="Tokens of prompt and answer together that the model takes.")
    tokens: list[int]
    token_strs: list[str] | None = Field(
        None, description="The text of each, `bytes:` and hexadecimal if it is part of a character; if asked for."
    )


class DetokenizeRequest(NullIsAbsent):
    """Body of POST /detokenize."""

    model: str | None = Field(None, description="NAME, NAME:VARIANT or VARIANT, see /v1/models; none: the first there.")
    tokens: list[Annotated[int, Field(ge=0)]] = Field(
        max_length=MAX_TOKENS, fail_fast=True, description="Token ids from 0 to `vocab_size` - 1 of /info."
    )


class DetokenizeResponse(BaseModel):
    """The text of the tokens, special ones by their names."""

    prompt: str


@router.post("/tokenize", response_model=TokenizeResponse, summary="Token ids of a text or a conversation")
async def tokenize(body: TokenizeRequest, serving: Shared) -> Response:
    """What a generation would take as its prompt; nothing is computed."""
    engine = serving.engine(serving.models.variant_of(body.model))
    ids = await _ids(body, serving)
    if len(ids) > MAX_TOKENS:
        field = "messages" if body.prompt is None else "prompt"
        raise InvalidRequest(f"`{field}` has {len(ids)} tokens; at most {MAX_TOKENS} are listed: split it", field)

    def answer() -> bytes:
        texts = {"token_strs": list(map(serving.tokenizer.token_text, ids))} if body.return_token_strings else {}
        return msgspec.json.encode({"count": len(ids), "max_model_len": engine.max_model_len, "tokens": ids, **texts})

    return Response(await _made(answer, len(ids)), media_type="application/json")


@router.post("/detokenize", response_model=DetokenizeResponse, summary="The text of token ids")
async def detokenize(body: DetokenizeRequest, serving: Shared) -> Response:
    """The text that the tokens make, which need not be complete characters."""
    serving.engine(serving.models.variant_of(body.model))
    limit = serving.vocab_size - 1
    if max(body.tokens, default=0) > limit:
        raise InvalidRequest(
            f"`tokens` holds {max(body.tokens)}, outside the vocabulary: ids run from 0 to {limit}; send only those",
            "tokens",
        )
    text = await _made(lambda: _text(body.tokens, serving.tokenizer), len(body.tokens))
    return Response(msgspec.json.encode({"prompt": text}), media_type="application/json")


async def _ids(body: TokenizeRequest, serving: Serving) -> list[int]:
    if body.messages is None:
        return await spelled(body.prompt or "", serving, "prompt", adds_special=body.add_special_tokens is not False)
    if body.add_special_tokens:
        raise InvalidRequest(
            "`add_special_tokens` is true beside `messages`, whose chat template writes them itself; leave it out",
            "add_special_tokens",
        )
    if body.continue_final_message and body.messages[-1].role != "assistant":
        raise InvalidRequest(
            f"`continue_final_message` is true, but the last message is of the role {body.messages[-1].role!r}; leave "
            "it out, or end with the assistant's message",
            "continue_final_message",
        )
    tools = [tool.shown() for tool in body.tools] or None
    if tools and serving.tokenizer.tool_format is None:
        raise InvalidRequest(
            "`tools` are sent, but this model's chat template has no tools in a format that is served; leave them out",
            "tools",
        )
    is_open = body.add_generation_prompt or body.continue_final_message
    messages = shown_messages(body.messages, serving.tokenizer)
    return await chat_ids(messages, serving, is_open, tools, body.chat_template_kwargs)


async def _made(make: Callable[[], T], num_tokens: int) -> T:
    return await asyncio.to_thread(make) if num_tokens > THREAD_TOKENS else make()


def _text(ids: Sequence[int], tokenizer: TokenizerLike) -> str:
    decoder = tokenizer.detokenizer((), tokenizer.special_ids)
    return "".join(chain(map(decoder.push, ids), (decoder.flush(),)))
