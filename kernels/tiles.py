"""Tile choices of the GEMM as data: (GPU, N, K, bucket of T) -> `Tile`. Nothing is tuned on the request path.

A tuned table is a file named after the GPU in lower case and dashes, e.g. nvidia-h100-80gb-hbm3.json:

    {"gpu": "NVIDIA H100 80GB HBM3", "capability": 90,
     "tiles": {"4096x4096": {"16": {"kernel": "plain", "block_t": 16, ...}}}}

The keys are "NxK" and the largest T of the bucket, one of `BUCKETS`. A product is looked up in the user's table, which
`ottava tune` writes to $XDG_CACHE_HOME/ottava/tiles (~/.cache/ottava/tiles), then in the package's, in `kernels/tiles`.
What both leave out takes the tile of the next bucket that either has, at most twice as large, or else the
architecture's default.
"""

from __future__ import annotations

import json
import logging
import os
import re
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

__all__ = [
    "BUCKETS",
    "KEYS_PER_TOKEN",
    "MAX_STREAM_SUMS",
    "AttentionTile",
    "Target",
    "Tile",
    "bucket",
    "buckets",
    "choose",
    "current_gpu",
    "decode_tile",
    "defaults",
    "halves_of",
    "package_table",
    "prefill_tile",
    "read_table",
    "stream_tile",
    "user_table",
    "write_table",
]

BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 576, 640, 768, 896, 1024, 1280, 1536, 2048, 4096, 8192)
"""The largest T of each bucket; narrow ones from 65 to 1536 tokens, where one more row of tiles is much of the work."""

MIN_BUCKET = BUCKETS[0]

KEYS_PER_TOKEN = 4
"""Room for dequantized keys and values for each token of a step over an int8 cache; a request without reads codes."""

STREAM_STAGES = {
    (16, 32): 12, (16, 64): 20, (16, 128): 11, (32, 32): 12, (32, 64): 12, (32, 128): 8, (64, 64): 12, (64, 128): 6,
}  # fmt: skip
"""About as many stages of the streaming kernel as fit, by tokens and columns of a tile."""

STREAM_ROWS, MAX_STREAM_SUMS = 64, 128
"""Rows of Hopper's matrix instruction, and most columns of sums that a program of the streaming kernel holds."""

MIN_INT8_DEPTH = 32
"""Least summed length of an int8 matrix instruction."""

FOLDER = Path(__file__).parent / "tiles"

UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What reading a file raises that is not a table of tiles."""

Kernel = Literal["plain", "swapped", "stream", "pingpong", "cooperative"]
Table = dict[str, Any]

logger = logging.getLogger(__name__)


class Tile(NamedTuple):
    """How one GEMM is cut into programs.

    kernel: "plain" has tokens on the matrix instruction's M side; "swapped" has the weight's rows there, so that 8
        tokens need no padding to 64 (or 16) rows. On Hopper only: "stream", for few tokens, "pingpong", for many and
        with block_n at most 128, and "cooperative", for many, with block_t 128.
    block_t, block_n, block_k: tokens, output columns and depth of one program's tile; powers of two. For "stream"
        block_k is 128, block_n 32, 64 or 128, and block_t at most 128, or 64 with 32 columns.
    group: number of token tiles that run one after the other over the same weights, which are then in the L2 cache.
    """

    kernel: Kernel
    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8


class AttentionTile(NamedTuple):
    """How attention is cut: query rows (positions x heads per key head) and keys of one step of the softmax.

    is_int8: whether a decode multiplies codes of queries and keys as such, for int8 keys; the sums are the same if not.
    in_pairs: whether a decode reads int8 values two at a time.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    is_int8: bool = False
    in_pairs: bool = False


class Target(NamedTuple):
    """A GPU: its name, which finds a table, its compute capability (90 for 9.0), which finds the defaults, its size."""

    name: str
    capability: int
    num_sms: int = 1


INTERPRETER = Target("interpreter", 80, 4)


def bucket(t: int) -> int:
    """The smallest of `BUCKETS` that is at least t, or else the last."""
    return BUCKETS[min(bisect_left(BUCKETS, t), len(BUCKETS) - 1)]


def buckets(t: int) -> tuple[int, ...]:
    """The bucket of t, and behind it those up to twice as large, which stand in where a table lacks the first."""
    first = bucket(t)
    return tuple(limit for limit in BUCKETS if first <= limit <= 2 * first)


def choose(gpu: Target, n: int, k: int, t: int) -> Tile:
    """The tile for a product of [t, k] with [n, k]^T: tuned if a table has it, else the architecture's default."""
    return _choose(gpu, n, k, bucket(t))


def current_gpu(device: torch.device) -> Target:
    """The GPU of a device; for the CPU, Triton's interpreter."""
    return INTERPRETER if device.type == "cpu" else _gpu(device)


def stream_tile(block_t: int, block_n: int, num_stages: int) -> Tile:
    """A tile of the streaming kernel, whose warps have 16 rows of the instruction each."""
    return Tile("stream", block_t, block_n, 128, halves_of(block_n) * block_n // 16, num_stages)


def halves_of(block_n: int) -> int:
    """Parts of K that the streaming kernel sums apart, so that block_n columns fill the rows of the instruction."""
    return max(1, STREAM_ROWS // block_n)


def defaults(capability: int, n: int, k: int, bucket_t: int) -> Tile:
    """The tile of an architecture without a tuned table.

    Decode is bound by the weights' bytes: on Hopper it streams them. Elsewhere it takes deep tiles, and for narrow N
    the plain kernel with 16 columns, whose many programs fill the GPU. Where the swapped kernel is faster, its tile
    reads 256 bytes of 64 rows at once.
    """
    if k % 16:
        # Rows that are not aligned to 16 bytes are read byte by byte; a deep tile of such reads spills registers.
        return Tile("plain", 32, 32, 32, num_warps=4, num_stages=2)
    if capability == 90:
        return _hopper(n, bucket_t)
    if bucket_t == MIN_BUCKET and n <= 4096 and capability in {80, 100}:
        return Tile("plain", 16, 16, 512, num_warps=2, num_stages=4)
    return _large_smem(bucket_t) if capability in {80, 100} else _small_smem(bucket_t)


def _hopper(n: int, bucket_t: int) -> Tile:
    """wgmma: 64 rows a warp group; up to 227 KB of shared memory.

    Few tokens: narrow tiles where n gives the GPU few programs. H200, 32 products of 1,536 to 57,344 columns: these
    tiles take at most 1.21 times as long as the best of nine, and 1.01 in the mean.
    """
    if bucket_t <= 64:
        block_n = (32 if n <= 4096 and bucket_t <= 32 else 64) if n <= 8192 else 128
        return stream_tile(bucket_t, block_n, STREAM_STAGES[bucket_t, block_n])
    if bucket_t <= 256:
        # H100, 128 tokens: the plain kernel with 64 x 64 x 256 took 1.4 times as long as the tuned tile.
        return Tile("pingpong", 64, 128, 128, num_warps=4, num_stages=7)
    return Tile("pingpong", 128, 128, 128, num_warps=4, num_stages=4)


def _large_smem(bucket_t: int) -> Tile:
    """mma.sync with 163 KB of shared memory (sm_80) or more (sm_100, where Triton has no int8 form of tcgen05)."""
    if bucket_t <= 32:
        return Tile("swapped", bucket_t, 64, 256, num_warps=4, num_stages=4)
    if bucket_t <= 128:
        return Tile("swapped", 64, 64, 128, num_warps=4, num_stages=4)
    return Tile("plain", 128, 128, 128, num_warps=8, num_stages=4)


def _small_smem(bucket_t: int) -> Tile:
    """mma.sync with 99 KB of shared memory: sm_86, sm_89, sm_120, and any unknown architecture."""
    if bucket_t <= 16:
        return Tile("swapped", 16, 64, 256, num_warps=4, num_stages=4)
    if bucket_t <= 32:
        return Tile("swapped", 32, 64, 256, num_warps=4, num_stages=3)
    if bucket_t <= 128:
        return Tile("swapped", 64, 64, 128, num_warps=4, num_stages=4)
    return Tile("plain", 128, 128, 64, num_warps=8, num_stages=4)


def prefill_tile(gpu: Target, block_d: int, element_bytes: int, cache_bytes: int) -> AttentionTile:
    """The tile of prefill attention; block_d is the head size rounded up to a power of two.

    float32 runs exactly, without tensor cores; its tiles are small because their products are in registers. Codes of an
    int8 cache are converted in registers, which leaves less room for the tile; it has as many keys as that of a float
    cache, so that a row has the same bits over dequantized keys.
    """
    is_int8 = cache_bytes == 1
    if gpu == INTERPRETER:
        return AttentionTile(16, 16, num_warps=4, num_stages=1)
    if element_bytes == 4:
        # With one stage sm_89 and sm_120 would spill.
        return AttentionTile(16, 16, num_warps=8, num_stages=2 if gpu.capability in {89, 120} else 1)
    return _wide_tile(gpu, is_int8) if block_d > 128 else _narrow_tile(gpu, block_d, is_int8)


def _wide_tile(gpu: Target, is_int8: bool) -> AttentionTile:
    """`prefill_tile` of heads of 256 in two bytes an element."""
    if gpu.capability == 90 and not is_int8:
        # Only Hopper has room for 128 rows of 256 columns and three tiles of keys.
        return AttentionTile(128, 32, num_warps=8, num_stages=3)
    return AttentionTile(64, 32, num_warps=8, num_stages=3 if is_int8 and gpu.capability == 100 else 2)


def _narrow_tile(gpu: Target, block_d: int, is_int8: bool) -> AttentionTile:
    """`prefill_tile` of smaller heads."""
    if gpu.capability == 90 and is_int8:
        return AttentionTile(64, 64, num_warps=4, num_stages=2)
    if gpu.capability in {90, 100}:
        is_small = gpu.capability == 100 and block_d <= 64
        return AttentionTile(128, 64, num_warps=4 if is_small else 8, num_stages=3)
    # With 128 rows these would spill.
    if (is_int8 and block_d > 64) or (gpu.capability == 120 and block_d <= 64):
        return AttentionTile(64, 32, num_warps=4, num_stages=3)
    return AttentionTile(128, 32, num_warps=8, num_stages=3)


def decode_tile(gpu: Target, block_d: int, element_bytes: int, cache_bytes: int) -> AttentionTile:
    """The tile of decode attention, bound by the cache's bytes; block_m follows from the heads per key head."""
    is_int8 = cache_bytes == 1
    tile = _decode_tile(gpu, block_d, element_bytes, is_int8)
    if element_bytes == 4 and gpu != INTERPRETER:
        return tile
    return tile._replace(is_int8=is_int8 and block_d >= MIN_INT8_DEPTH, in_pairs=is_int8)


def _decode_tile(gpu: Target, block_d: int, element_bytes: int, is_int8: bool) -> AttentionTile:
    """See `decode_tile`."""
    if gpu == INTERPRETER:
        return AttentionTile(16, 16, num_warps=4, num_stages=1)
    if element_bytes == 4:
        return AttentionTile(16, 16, num_warps=8, num_stages=2)
    # Over an int8 cache sm_100 would spill.
    if block_d <= 128 and gpu.capability in ({90} if is_int8 else {90, 100}):
        # H200, 32 requests at context 8192: 263 us; int8 159 with 3 stages, 172 with 2.
        return AttentionTile(16, 128, num_warps=4, num_stages=3 if is_int8 else 2)
    return AttentionTile(16, 64 if block_d <= 128 else 32, num_warps=4, num_stages=3)


def package_table(gpu_name: str) -> Path:
    """Where the table that ottava ships for a GPU is, if there is one."""
    return FOLDER / _file_name(gpu_name)


def user_table(gpu_name: str) -> Path:
    """Where `ottava tune` writes the table of a GPU."""
    # Not Path.home(), which raises for a user without a home.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "ottava" / "tiles" / _file_name(gpu_name)


def read_table(path: Path) -> Table:
    """A table as its file has it; one without tiles where there is no file.

    Raises:
        OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError (`UNREADABLE`): the file cannot be
            read, or is not a table of tiles.
    """
    if not path.is_file():
        return {"tiles": {}}
    table: Table = json.loads(path.read_text(encoding="utf-8"))
    _tiles(table)
    return table


def write_table(path: Path, table: Table) -> None:
    """Write a table in one step: who reads it meanwhile finds the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _file_name(gpu_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()) + ".json"


@lru_cache(maxsize=4096)
def _choose(gpu: Target, n: int, k: int, bucket_t: int) -> Tile:
    tuned = _tuned(gpu.name)
    found = (tuned[n, k, limit] for limit in buckets(bucket_t) if (n, k, limit) in tuned)
    return next(found, None) or defaults(gpu.capability, n, k, bucket_t)


@lru_cache(maxsize=16)
def _tuned(gpu_name: str) -> dict[tuple[int, int, int], Tile]:
    """The tuned tiles of a GPU: the user's, and the package's where the user's table has none."""
    shipped, path = _tiles(read_table(package_table(gpu_name))), user_table(gpu_name)
    try:
        return shipped | _tiles(read_table(path))
    except UNREADABLE as error:
        logger.warning(
            "%s is not a table of tiles (%r), so the package's is used; remove it, or run `ottava tune` again",
            path,
            error,
        )
        return shipped


def _tiles(table: Table) -> dict[tuple[int, int, int], Tile]:
    """Tiles by (N, K, bucket); raises as `read_table`."""
    found: dict[tuple[int, int, int], Tile] = {}
    for shape, buckets in table["tiles"].items():
        n, k = (int(size) for size in shape.split("x"))
        found |= {(n, k, int(bucket_t)): _checked(Tile(**fields)) for bucket_t, fields in buckets.items()}
    return found


def _checked(tile: Tile) -> Tile:
    sizes = tile.block_t, tile.block_n, tile.block_k, tile.num_warps
    if tile.kernel not in get_args(Kernel) or any(size < 1 or size & (size - 1) for size in sizes):
        raise ValueError(f"{tile} names no kernel, or a size that is no power of two")
    if tile.kernel == "stream" and not _can_stream(tile):
        raise ValueError(f"{tile}: the streaming kernel has no tile of this shape")
    if tile.num_stages < 1 or tile.group < 1:
        raise ValueError(f"{tile} has no stage or no group")
    return tile


def _can_stream(tile: Tile) -> bool:
    has_sizes = tile.block_n in {32, 64, 128} and 16 <= tile.block_t <= MAX_STREAM_SUMS // halves_of(tile.block_n)
    return has_sizes and tile == stream_tile(tile.block_t, tile.block_n, tile.num_stages)._replace(group=tile.group)


@lru_cache(maxsize=16)
def _gpu(device: torch.device) -> Target:
    found = torch.cuda.get_device_properties(device)
    return Target(found.name, 10 * found.major + found.minor, found.multi_processor_count)
