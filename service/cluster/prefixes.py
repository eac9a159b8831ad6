"""Chooses a replica: the one that knows the longest prefix of a prompt, unless its queue is too long."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

R = TypeVar("R")

CHUNK_BYTES = 256
"""Bytes of text per key: about the 64 tokens of a block of the KV cache, the least that a cache can share."""

CHUNK_IDS = 64
MAX_CHUNKS = 128
"""Keys of one prompt, so that hashing takes at most about 0.1 ms."""

MAX_KEYS = 200_000
"""Keys that are remembered, in about 40 MB. The least recently used ones are forgotten first."""


def prefix_keys(body: bytes) -> tuple[bytes, ...]:
    """Hashes of the first chunk, the first two chunks, and so on, of the prompt in a request's JSON body.

    Two prompts share their first n keys if and only if they begin with the same n chunks and ask for the same variant
    or model. Only whole chunks count. Empty for a body that is not JSON or has no prompt: the replica will refuse it.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(request, dict):
        return ()
    chunks = _chunks(request)[:MAX_CHUNKS]
    named = [request.get("variant"), request.get("model")]
    key, keys = json.dumps(named).encode(), []
    for chunk in chunks:
        key = blake2b(key + chunk, digest_size=16).digest()
        keys.append(key)
    return tuple(keys)


def ranked(loads: Mapping[R, int], known: Mapping[R, int], bound: int) -> list[R]:
    """The replicas, best first.

    Those whose load is at most `bound` above the least come first, the longest known prefix leading, then the lower
    load; after them the others by load. So a known prefix can cost a request at most `bound` places in a queue.

    Args:
        loads: requests that each replica has; equal ones keep this order.
        known: leading keys of the prompt that each replica has seen; missing: none.
        bound: of the difference in load.
    """
    if not loads:
        return []
    limit = min(loads.values()) + bound

    def rank(replica: R) -> tuple[bool, int, int]:
        load = loads[replica]
        is_busy = load > limit
        return is_busy, 0 if is_busy else -known.get(replica, 0), load

    return sorted(loads, key=rank)


class KnownPrefixes:
    """Which replica has seen which prefix. Bounded, thread-safe, and nothing in it is more than a hint."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, keys: Sequence[bytes], replica: str) -> None:
        """Remember that a replica has been sent a prompt with these keys."""
        with self._lock:
            for key in keys:
                self._seen.setdefault(key, set()).add(replica)
            # The longest prefix is the first to be forgotten: without a shorter one it could not be found any more.
            for key in reversed(keys):
                self._seen.move_to_end(key)
            while len(self._seen) > self._max_keys:
                self._seen.popitem(last=False)

    def lengths(self, keys: Sequence[bytes], replicas: Iterable[str]) -> dict[str, int]:
        """How many leading keys each of these replicas has seen; those that have seen none are left out."""
        lengths: dict[str, int] = {}
        left = set(replicas)
        with self._lock:
            for length, key in enumerate(keys, 1):
                left &= self._seen.get(key, set())
                if not left:
                    break
                lengths.update(dict.fromkeys(left, length))
        return lengths

    def keep(self, replicas: Iterable[str]) -> None:
        """Forget every replica but these."""
        kept = set(replicas)
        with self._lock:
            for key, seen in list(self._seen.items()):
                seen.intersection_update(kept)
                if not seen:
                    del self._seen[key]


def _chunks(request: dict[str, Any]) -> list[bytes]:
    """The prompt in whole chunks, whichever field it is in."""
    ids = request.get("prompt_ids")
    prompt = request.get("prompt")
    if isinstance(ids, list):
        return _parts(ids)
    if isinstance(prompt, list):
        # OpenAI's form: token ids, or several prompts, of which the first decides.
        first = prompt[0] if prompt else ""
        if isinstance(first, int):
            return _parts(prompt)
        prompt = first
        if isinstance(first, list):
            return _parts(first)
    # The Responses API calls the conversation `input`, which may be a text.
    messages = request.get("messages", request.get("input"))
    heads = [request[name] for name in ("instructions", "system") if request.get(name)]
    if isinstance(messages, list):
        prompt = "".join(json.dumps(part, sort_keys=True, ensure_ascii=False) for part in (*heads, *messages))
    elif prompt is None and isinstance(messages, str):
        prompt = json.dumps(heads, sort_keys=True, ensure_ascii=False) + messages
    if not isinstance(prompt, str):
        return []
    text = prompt.encode("utf-8", "surrogatepass")
    return [text[start : start + CHUNK_BYTES] for start in range(0, len(text) - CHUNK_BYTES + 1, CHUNK_BYTES)]


def _parts(ids: list[Any]) -> list[bytes]:
    whole = range(0, len(ids) - CHUNK_IDS + 1, CHUNK_IDS)
    return [json.dumps(ids[start : start + CHUNK_IDS]).encode() for start in whole]
