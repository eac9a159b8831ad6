"""The sizes that steps are padded to, so that a step captured once fits many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Numbers of requests of captured decode steps."""

TOKENS = (
    *(16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024),
    *(1280, 1536, 1792, 2048, 2560, 3072, 4096, 5120, 6144, 8192),
)
"""Numbers of token rows of captured steps with prompts. From 256 on at most a quarter of a step is padding; from 513
to 1024, where prompts of 512 tokens beside a few decodes are, at most a ninth."""

REQUESTS = (16, 64, 256, 512)
"""Numbers of requests of captured steps with prompts. An empty request costs programs of the attention kernels that
only end."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """The sizes that a step is padded to.

    num_tokens, num_requests: token rows and requests, padding included; as many requests sample.
    is_decode: whether each request has one token row and samples after it, so that num_tokens == num_requests.
    """

    num_tokens: int
    num_requests: int
    is_decode: bool = False


def shapes_of(max_tokens: int, max_requests: int) -> list[Shape]:
    """The shapes that hold every step of so many tokens and requests, as far as the sizes reach, smallest first."""
    decodes = [Shape(count, count, is_decode=True) for count in _up_to(DECODES, max_requests)]
    requests = _up_to(REQUESTS, max_requests)
    mixed = {Shape(tokens, min(tokens, count)) for tokens in _up_to(TOKENS, max_tokens) for count in requests}
    return decodes + sorted(mixed)


MIN_GAIN = 0.98
"""A larger shape replaces another only if it takes less than this share of its time; the rest is noise."""


def without_slow(shapes: Iterable[Shape], times_s: Mapping[Shape, float]) -> list[Shape]:
    """Without shapes that a larger one beats: a library's product may be slow at one size and not at the next."""
    found = list(shapes)

    def is_beaten(shape: Shape) -> bool:
        return any(
            other.num_tokens > shape.num_tokens
            and other.num_requests == shape.num_requests
            and times_s[other] < MIN_GAIN * times_s[shape]
            for other in found
        )

    return [shape for shape in found if not is_beaten(shape)]


def _up_to(sizes: tuple[int, ...], largest: int) -> list[int]:
    """The sizes below largest, and largest itself unless it is beyond all of them."""
    below = [size for size in sizes if size < largest]
    return [*below, largest] if largest <= sizes[-1] else below
