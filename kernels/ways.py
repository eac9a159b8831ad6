"""How ranks add up a branch's outputs and norm the sum, as data: (GPU, ranks, K, bucket of T) -> `Way`.

A table is a file named after the GPU, as those of `kernels.tiles`, e.g. nvidia-h100-80gb-hbm3.json:

    {"gpu": "NVIDIA H100 80GB HBM3", "ways": {"2x4096": {"64": "all_reduce_rms_norm", ...}}}

The keys are "RANKSxK" and the largest T of the bucket, one of `kernels.tiles.BUCKETS`. The user's table, which
`python -m benchmarks.collectives --write` makes in $XDG_CACHE_HOME/ottava/ways (~/.cache/ottava/ways), comes before the
package's, in `kernels/ways`. What neither has is done as in the next bucket, at most twice as large, or else plainly.
"""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from kernels.tiles import UNREADABLE, bucket, buckets, user_table

__all__ = ["Table", "Way", "choose", "most_rows", "read_ways", "user_ways"]

Way = Literal["plain", "all_reduce_rms_norm", "reduce_scatter_rms_norm"]
"""plain: the sum of NCCL or gloo, then the norm; the others are the ops of these names."""

Table: TypeAlias = dict[tuple[int, int, int], Way]
"""(ranks, K, bucket of T) -> way."""

FOLDER = Path(__file__).parent / "ways"

logger = logging.getLogger(__name__)


def choose(gpu_name: str, size: int, width: int, num_rows: int) -> Way:
    """The way for rows [T, K] of size ranks: measured if a table has it, else plain."""
    known = _ways(gpu_name)
    found = (known[size, width, limit] for limit in buckets(num_rows) if (size, width, limit) in known)
    return next(found, "plain")


def most_rows(gpu_name: str, size: int, width: int, way: Way, max_rows: int) -> int:
    """The most rows, of at most max_rows, that are done in a way; 0 if none are."""
    chosen = [limit for (ranks, k, limit), found in _ways(gpu_name).items() if (ranks, k, found) == (size, width, way)]
    return min(max_rows, max(chosen, default=0))


def user_ways(gpu_name: str) -> Path:
    """Where the table that was measured on this machine is."""
    tiles = user_table(gpu_name)
    return tiles.parent.with_name("ways") / tiles.name


def read_ways(path: Path) -> Table:
    """A table as its file has it; an empty one where there is no file.

    Raises:
        OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError (`UNREADABLE`): the file cannot be
            read, or is not a table of ways.
    """
    found: Table = {}
    if not path.is_file():
        return found
    for key, limits in json.loads(path.read_text(encoding="utf-8"))["ways"].items():
        size, width = (int(number) for number in key.split("x"))
        for limit, way in limits.items():
            if way not in get_args(Way) or bucket(int(limit)) != int(limit):
                raise ValueError(f"{way!r} for {limit} rows is no way, or {limit} is the end of no bucket")
            found[size, width, int(limit)] = way
    return found


@lru_cache(maxsize=16)
def _ways(gpu_name: str) -> Table:
    path = user_ways(gpu_name)
    shipped = read_ways(FOLDER / path.name)
    try:
        return shipped | read_ways(path)
    except UNREADABLE as error:
        logger.warning(
            "%s is not a table of ways (%r), so the package's is used; remove it, or run `python -m "
            "benchmarks.collectives --write` again",
            path,
            error,
        )
        return shipped
