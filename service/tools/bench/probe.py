"""What the server is and takes, found out by a few small requests before any load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from service.errors import BenchError
from service.tools.bench.client import REFUSED, Client, Exchange, unreachable
from service.tools.bench.dialects import Dialect, error_message
from service.tools.bench.drive import Planned, Stream, Tally
from service.tools.bench.prompts import Ids, Material, Prompt, Words
from service.tools.bench.record import Record

TOP_ID = 30000
"""First guess of an id that a vocabulary holds."""
MIN_TOP_ID = 100
FEW_WORDS, MORE_WORDS = 8, 40


@dataclass(frozen=True, slots=True)
class Prober:
    """Asks one model by one route. extra: fields of every body."""

    client: Client
    dialect: Dialect
    model: str | None
    extra: Mapping[str, Any]

    async def ask(self, prompt: Prompt) -> Record:
        """One answer of one token or so; its record may be a failure."""
        body = self.dialect.body(prompt, self.model) | dict(self.extra) | {"max_tokens": prompt.max_tokens}
        record = Record(0.0, self.client.clock())
        stream = Stream(Planned(self.client.target.request(self.dialect.path, body)), self.dialect, record, Tally(1))
        await self.client.ask(stream.exchange)
        stream.finish()
        if record.error == REFUSED:
            raise BenchError(unreachable(self.client.target, record.detail))
        return record

    async def material(self, wants_ids: bool) -> tuple[Material, str]:
        """What random prompts are made of here, and a note of why it is not what was wanted.

        Raises:
            BenchError: the server answers neither ids nor text.
        """
        if not wants_ids:
            return await self._words(), ""
        if not self.dialect.takes_ids:
            return await self._words(), f"{self.dialect.path} takes no token ids: text is sent instead"
        if (await self.ask(_ids([1]))).error is not None:
            words = await self._words()
            return words, "the server refuses token ids: text is sent instead"
        top = TOP_ID
        while (await self.ask(_ids([top]))).error is not None:
            top //= 2
            if top < MIN_TOP_ID:
                return Ids(1, MIN_TOP_ID), f"only ids up to {MIN_TOP_ID} are sent: the server refused larger ones"
        # The first ids are often control tokens.
        return Ids(max(1, top // 30), top), ""

    async def _words(self) -> Words:
        rng = Random(0)  # noqa: S311 (no secret is drawn)
        few = await self._count(Words().make(FEW_WORDS, rng))
        more = await self._count(Words().make(MORE_WORDS, rng))
        if few is None or more is None or more <= few:
            return Words()
        slope = (more - few) / (MORE_WORDS - FEW_WORDS)
        return Words(slope, max(0.0, few - slope * FEW_WORDS))

    async def _count(self, text: str) -> int | None:
        record = await self.ask(Prompt((("user", text),), 1))
        if record.error is not None:
            raise BenchError(
                f"{self.client.target.url}{self.dialect.path} answers {record.error}: "
                f"{record.detail or 'no reason given'}{remedy(record.error)}"
            )
        return record.prompt_tokens


def remedy(error: str) -> str:
    """What to try after an error, if that is known."""
    if error.startswith(("HTTP 401", "HTTP 403")):
        return "; give the key in the variable OTTAVA_API_KEY or with --api-key-file"
    if error.startswith("HTTP 404"):
        return "; is --url, --route or --model right?"
    if error.startswith(("HTTP 400", "HTTP 422")):
        return "; if it is a field that this server does not know, try --no-ignore-eos"
    if error.startswith("HTTP 503"):
        return "; wait until the server is ready"
    return ""


async def first_model(client: Client) -> str:
    """The first name that GET /v1/models lists.

    Raises:
        BenchError: it lists none.
    """
    found = await _get(client, "/v1/models")
    try:
        return str(json.loads(found.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        status = found.response.status
        raise BenchError(
            f"GET {client.target.url}/v1/models answers {status} and names no model ({error_message(found.body)})"
            f"{remedy(f'HTTP {status}') or '; name one with --model'}"
        ) from error


async def server_info(client: Client) -> dict[str, Any]:
    """What GET /info of an ottava says of model, device, variants and versions; empty of other servers."""
    found = await _get(client, "/info")
    if found.response.status != 200:
        return {}
    try:
        info = json.loads(found.body)
        return {name: info[name] for name in ("model", "device", "variants", "versions") if name in info}
    except (ValueError, TypeError):
        return {}


async def _get(client: Client, path: str) -> Exchange:
    found = await client.get(path)
    if found.failure is not None:
        raise BenchError(unreachable(client.target, found.failure[1]))
    return found


def _ids(ids: list[int]) -> Prompt:
    return Prompt((("user", ids),), 1)
