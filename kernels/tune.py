"""Measures which tile is fastest for a GEMM on this GPU and writes the table that `tiles.choose` reads first."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from triton import OutOfResources

from kernels.dependent import starts_early
from kernels.epilogue import MAX_PIECE, Epilogue
from kernels.gemm import launch
from kernels.launching import cdiv
from kernels.quantize import MAX_ROW, quantize_rows
from kernels.quantized import CODE_MAX, Quantized
from kernels.tiles import (
    BUCKETS,
    MAX_STREAM_SUMS,
    UNREADABLE,
    Table,
    Target,
    Tile,
    current_gpu,
    defaults,
    halves_of,
    package_table,
    read_table,
    stream_tile,
    user_table,
    write_table,
)

ROTATION_BYTES = 256 * 2**20
"""Bytes of copies of the weights that runs take in turn, so that none finds them in the L2 cache (50 MB on an H100)."""

HOPPER = 90
SHARED_BYTES = 227 * 1024
"""Shared memory of one program on Hopper."""

MAX_STREAMED = 256
"""Largest bucket of the streaming kernel, which leaves the tensor cores idle in its epilogue."""

MAX_SMALL_BUCKET = 512
"""Largest bucket of the kernels that have no stages for a copying warp."""

SUSTAINED_S = 0.1
"""How long larger products run on end, as they do while prompts are read: the card's power sets its clock then, and a
kernel that moves fewer bytes gains. H200, 4096 x 14336 with 4096 tokens: the ping-pong kernel takes 365 us on end, the
cooperative one 342."""

MIN_SUSTAINED_BUCKET = 576
"""Least bucket whose products are timed on end, and of the cooperative kernel."""

MAX_NARROW_BUCKET = 1536
"""Above this bucket one row of tiles more or less is a small part of the work."""

MIN_COLUMNS = 16
"""Fewest output columns of a tile."""

MIN_GAIN = 0.98
"""A tile replaces the default only if it takes less than this share of its time; the rest is noise."""

logger = logging.getLogger(__name__)


class LinearShape(NamedTuple):
    """A Linear's weight [n, k]; is_gated: whether its outputs are pairs of gate and up, gated in its epilogue."""

    n: int
    k: int
    is_gated: bool = False


@dataclass(frozen=True, slots=True)
class TileChoice:
    """The winner for one product, with the time it takes and the default's, in microseconds.

    A product of few tokens is timed with the kernel that writes the codes it reads.
    """

    n: int
    k: int
    bucket: int
    tile: Tile
    time_us: float
    default_us: float


def tune(
    shapes: Sequence[LinearShape],
    path: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[TileChoice]:
    """Measure every candidate for every shape and bucket of T; write the fastest into a table, product by product.

    What the table already holds is not measured again, so an interrupted run continues where it stopped. Nor is what
    the package's table holds, unless `path` is given.

    Args:
        shapes: of the Linears; of two with the same weights the first is measured.
        path: the table; None for this GPU's `user_table`, the only one that is read.
        on_progress: called with (products done, products in all).

    Raises:
        RuntimeError: a candidate's product differs from the exact one, or there is no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tiles are chosen by measurement: tuning needs a CUDA GPU")
    gpu = current_gpu(torch.device("cuda", torch.cuda.current_device()))
    shipped = read_table(package_table(gpu.name))["tiles"] if path is None else {}
    path = path or user_table(gpu.name)
    table: Table = {"gpu": gpu.name, "capability": gpu.capability, **_begun(path)}
    jobs = list(itertools.product(dict.fromkeys(shapes), BUCKETS))
    done: list[TileChoice] = []
    for index, (shape, bucket) in enumerate(jobs):
        name, column = f"{shape.n}x{shape.k}", str(bucket)
        if column not in table["tiles"].get(name, {}) and column not in shipped.get(name, {}):
            choice = best_tile(gpu, shape, bucket)
            done.append(choice)
            table["tiles"].setdefault(name, {})[column] = choice.tile._asdict()
            write_table(path, table)
        on_progress(index + 1, len(jobs))
    return done


def _begun(path: Path) -> Table:
    """The table to go on with; an empty one where the file is missing or broken."""
    try:
        return read_table(path)
    except UNREADABLE as error:
        logger.warning("%s is not a table of tiles (%r) and is written anew", path, error)
        return {"tiles": {}}


def best_tile(gpu: Target, shape: LinearShape, bucket: int) -> TileChoice:
    """The fastest correct tile for [T, k] x [n, k]^T at the ends of the bucket."""
    product, (n, k, _) = Product(shape, bucket), shape
    default = defaults(gpu.capability, n, k, bucket)
    tiles = [default, *(tile for tile in candidates(gpu.capability, k, bucket) if tile != default)]
    with ThreadPoolExecutor(16) as pool:
        fits = [tile for tile, is_usable in zip(tiles, pool.map(product.is_exact, tiles), strict=True) if is_usable]
    if default not in fits:
        raise RuntimeError(f"the default tile {default} gives a wrong product for {n}x{k}, T = {bucket}")
    is_sustained = bucket >= MIN_SUSTAINED_BUCKET
    times = product.medians_us(fits, turns=1 if is_sustained else 3, is_sustained=is_sustained)
    finalists = sorted(times, key=lambda tile: times[tile])[:3]
    finalists = list(dict.fromkeys([default, *finalists]))
    times = product.medians_us(finalists, turns=3 if is_sustained else 9, is_sustained=is_sustained)
    fastest = min(times, key=lambda tile: times[tile])
    tile = fastest if times[fastest] < MIN_GAIN * times[default] else default
    return TileChoice(n, k, bucket, tile, times[tile], times[default])


def candidates(capability: int, k: int, bucket: int) -> Iterator[Tile]:
    """The tiles that are tried."""
    if bucket <= 64:
        yield from _few_tokens(k, bucket)
    elif bucket <= MAX_SMALL_BUCKET:
        yield from _some_tokens()
    elif capability != HOPPER:
        yield from _many_tokens()
    if capability == HOPPER:
        if bucket <= MAX_STREAMED:
            yield from _streams(bucket)
        if bucket >= 64:
            yield from _pingpongs(bucket)
        if bucket >= MIN_SUSTAINED_BUCKET:
            yield from (Tile("cooperative", 128, 256, 128, 4, 4, group) for group in (8, 16, 32))


def _few_tokens(k: int, bucket: int) -> Iterator[Tile]:
    """Deep and narrow."""
    depths = [256, 512] if k % 512 == 0 else [128, 256]
    for block_n, depth, warps, stages in itertools.product((16, 32, 64), depths, (2, 4), (3, 4, 5)):
        yield Tile("plain", max(16, min(bucket, 32)), block_n, depth, warps, stages)
    for block_n, depth, warps, stages in itertools.product((64, 128), (128, 256), (4, 8), (3, 4, 5)):
        yield Tile("swapped", bucket, block_n, depth, warps, stages)


def _some_tokens() -> Iterator[Tile]:
    for block_t, block_n, depth, stages in itertools.product((64, 128), (64, 128), (128, 256), (3, 4)):
        yield Tile("plain", block_t, block_n, depth, 4, stages)
    # 128 x 128 on four warps spills where the gate is in its epilogue.
    for (block_t, block_n), stages in itertools.product(((64, 64), (64, 128), (128, 64)), (3, 4, 5)):
        yield Tile("swapped", block_t, block_n, 128, 4, stages)
    yield from (Tile("plain", 128, 256, 128, 8, stages) for stages in (3, 4))


def _many_tokens() -> Iterator[Tile]:
    """Square and wide."""
    for (block_t, block_n, warps), stages, group in itertools.product(
        ((128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8), (64, 256, 4)), (3, 4), (4, 8, 16)
    ):
        yield Tile("plain", block_t, block_n, 128, warps, stages, group)


def _streams(bucket: int) -> Iterator[Tile]:
    """All tokens in one tile, or in several if the weights give too few programs."""
    sizes = {max(16, bucket // 2), bucket} if bucket <= 64 else {64, 128}
    for block_t, block_n, stages in itertools.product(sorted(sizes), (32, 64, 128), (4, 5, 6, 8, 10, 11, 12, 16, 20)):
        tile, rows = stream_tile(block_t, block_n, stages), halves_of(block_n) * (block_t + block_n)
        fits = halves_of(block_n) * block_t <= MAX_STREAM_SUMS and rows <= 192
        if fits and stages * rows * tile.block_k < SHARED_BYTES:
            yield tile


def _pingpongs(bucket: int) -> Iterator[Tile]:
    """About as many stages as fit."""
    sizes = ((64, 64), (64, 128), (128, 64), (128, 128)) if bucket <= MAX_NARROW_BUCKET else ((128, 128),)
    for (block_t, block_n), group in itertools.product(sizes, (8,) if bucket <= MAX_SMALL_BUCKET else (4, 8, 16, 32)):
        deepest = SHARED_BYTES // ((block_t + block_n) * 128) - 2
        for stages in range(max(4, deepest - 1), deepest + 2):
            yield Tile("pingpong", block_t, block_n, 128, 4, stages, group)


def token_counts(bucket: int) -> tuple[int, ...]:
    """The numbers of tokens that a bucket is measured with: both its ends, so that no tile is slow at one of them."""
    if bucket > MAX_NARROW_BUCKET:
        return (bucket,)
    index = BUCKETS.index(bucket)
    return (BUCKETS[index - 1] + 1 if index else 1, bucket)


class Product:
    """Random operands of one GEMM, with so many copies of the weights that none stays in the cache."""

    def __init__(self, shape: LinearShape, bucket: int, counts: tuple[int, ...] = ()) -> None:
        """counts: the numbers of tokens to measure, up to bucket; those of `token_counts` if there are none."""
        n, k, self.is_gated = shape
        width = n // 2 if self.is_gated else n
        self.token_counts = counts or token_counts(bucket)
        copies = max(2, -(-ROTATION_BYTES // (n * k)))
        self.weights = [_codes(n, k) for _ in range(copies)]
        self.weight_scale = torch.rand(n, device="cuda")
        self.outputs = {t: torch.empty((t, width), dtype=torch.float16, device="cuda") for t in self.token_counts}
        # Of the narrowest pieces that a gated row can have.
        self.row_max = torch.empty((bucket, cdiv(n, MIN_COLUMNS)), device="cuda") if self.is_gated else None
        # Codes of -1, 0 and 1: their sums are exact even in the float16 that a Linear writes.
        self.few = torch.randint(-1, 2, (bucket, k), dtype=torch.int8, device="cuda")
        self.weight_few = torch.randint(-1, 2, (n, k), dtype=torch.int8, device="cuda")
        self.exact = (self.few[-64:].float() @ self.weight_few.float().T).half()
        self.inputs = {t: _input(t, k, self.few.device) for t in self.token_counts}
        self.bucket = bucket
        default = defaults(current_gpu(self.few.device).capability, n, k, bucket)
        self.gated = self._gated(default) if self.is_gated else None

    def is_exact(self, tile: Tile) -> bool:
        """Whether the tile fits the GPU, its product is the exact one, and gated that of the default tile."""
        one = torch.ones(1, device="cuda")
        try:
            y = torch.full((self.bucket, len(self.weight_few)), float("nan"), dtype=torch.float16, device="cuda")
            launch(self.few, self.weight_few, Epilogue(one, one), y, tile)
            is_right = torch.equal(y[-64:], self.exact)
            if self.gated is not None:
                is_right = is_right and all(map(torch.equal, self._gated(tile), self.gated))
            for t in self.token_counts:
                self._run(tile, t, self.weights[0])
            torch.cuda.synchronize()
        except OutOfResources:
            return False
        return is_right

    def _gated(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """y of the few codes with its gate, and the largest magnitude of each row as the kernel found it."""
        n, one = len(self.weight_few), torch.full((1,), 1 / 16, device="cuda")
        y = torch.full((self.bucket, n // 2), float("nan"), dtype=torch.float16, device="cuda")
        pieces = cdiv(n // 2, min(tile.block_n, MAX_PIECE.value) // 2)
        row_max = torch.full((self.bucket, pieces), float("nan"), device="cuda")
        launch(self.few, self.weight_few, Epilogue(one, one, row_max=row_max), y, tile, is_gated=True)
        return y, row_max.amax(1)

    def medians_us(self, tiles: Iterable[Tile], turns: int, *, is_sustained: bool) -> dict[Tile, float]:
        """The medians of `times_us`."""
        times = self.times_us(tiles, turns, is_sustained=is_sustained)
        return {tile: statistics.median(each) for tile, each in times.items()}

    def times_us(self, tiles: Iterable[Tile], turns: int, *, is_sustained: bool) -> dict[Tile, list[float]]:
        """Times of one product with each tile, which take turns.

        is_sustained: whether a turn lasts `SUSTAINED_S`, after as long to get there; else it is one replay.
        """
        graphs = {tile: self._graph(tile) for tile in tiles}
        times: dict[Tile, list[float]] = {tile: [] for tile in graphs}
        for _ in range(turns):
            for tile, graph in graphs.items():
                us = self._replayed_us(graph, 1)
                if is_sustained:
                    products = len(self.weights) * len(self.token_counts)
                    replays = max(1, round(1e6 * SUSTAINED_S / (us * products)))
                    self._replayed_us(graph, replays)
                    us = self._replayed_us(graph, replays)
                times[tile].append(us)
        return times

    def _graph(self, tile: Tile) -> torch.cuda.CUDAGraph:
        """The product with all weights, and with each number of tokens."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # With the loops exchanged the second token count would find its weights in the L2 cache.
            for t, weight_q in itertools.product(self.token_counts, self.weights):
                self._run(tile, t, weight_q)
        graph.replay()
        return graph

    def _replayed_us(self, graph: torch.cuda.CUDAGraph, replays: int) -> float:
        """Mean time of one product of replays on end."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        stop.synchronize()
        return 1e3 * float(start.elapsed_time(stop)) / (replays * len(self.weights) * len(self.token_counts))

    def _run(self, tile: Tile, t: int, weight_q: Tensor) -> None:
        x = self.inputs[t]
        x = x if isinstance(x, Quantized) else quantize_rows(x)
        ops = Epilogue(x.scale, self.weight_scale, row_max=self.row_max)
        launch(x.codes, weight_q, ops, self.outputs[t], tile, self.is_gated)


def _input(rows: int, columns: int, device: torch.device) -> Tensor | Quantized:
    """What a product reads. Few rows are still to be rounded, so that a kernel can read its weights ahead meanwhile."""
    if columns <= MAX_ROW and starts_early(device, rows):
        return torch.randn((rows, columns), dtype=torch.float16, device="cuda")
    return Quantized(_codes(rows, columns), torch.rand(rows, device="cuda"))


def _codes(rows: int, columns: int) -> Tensor:
    return torch.randint(-CODE_MAX, CODE_MAX + 1, (rows, columns), dtype=torch.int8, device="cuda")
