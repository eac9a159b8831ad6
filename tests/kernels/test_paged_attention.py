"""Attention over shuffled blocks against float64, with NaN in every slot that no request owns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import attention
from tests.kernels.conftest import Place

MIXED = [(5, 5), (1, 70), (0, 0), (9, 33), (1, 1), (20, 61), (2, 16)]
DECODES = [(1, 1), (1, 16), (1, 130), (1, 47)]
LONG = [(1, 400), (3, 260), (1, 257)]
SHAPES = [(64, 4, 4), (64, 6, 2), (80, 4, 1), (128, 8, 1)]
LARGE = [(64, 32, 8), (96, 32, 32), (128, 32, 8), (256, 8, 1), (64, 71, 1)]


class Case:
    """Requests as (query rows, context): caches, block tables in random order, queries."""

    def __init__(
        self, place: Place, requests: list[tuple[int, int]], D: int, H: int, G: int, block_size: int = 16
    ) -> None:
        self.requests, self.scale, self.dtype = requests, D**-0.5, place.dtype
        self.keys = [place.randn(context, G, D) for _, context in requests]
        self.values = [place.randn(context + 1, G, D)[1:] for _, context in requests]
        width = max(-(-context // block_size) for _, context in requests) + 1
        order = torch.randperm(len(requests) * width, generator=torch.Generator().manual_seed(D)).to(place.device)
        # Entries beyond a context point at blocks that do not exist: reading one would fault or give NaN.
        tables = torch.full((len(requests), width), 2**30, dtype=torch.int32, device=place.device)
        self.k, self.v = (
            torch.full((len(order), block_size, G, D), float("nan"), device=place.device, dtype=place.dtype)
            for _ in range(2)
        )
        for b, (_, context) in enumerate(requests):
            tokens = torch.arange(context, device=place.device)
            tables[b, : -(-context // block_size)] = order[b * width :][: -(-context // block_size)].int()
            at = tables[b, tokens // block_size].long(), tokens % block_size
            self.k[at], self.v[at] = self.keys[b], self.values[b]
        self.tables = tables
        self.context_lens = torch.tensor([context for _, context in requests], dtype=torch.int32, device=place.device)
        starts = torch.tensor([0] + [rows for rows, _ in requests]).cumsum(0)
        self.query_starts = starts.to(place.device, torch.int32)
        self.q = place.randn(int(starts[-1]), H, D)
        self.max_query_len = max(rows for rows, _ in requests)

    def run(self) -> Tensor:
        return attention.paged_attention(
            self.q, self.k, self.v, self.tables, self.query_starts, self.context_lens, self.max_query_len, self.scale
        )

    def check(self, got: Tensor) -> None:
        """Within: p rounded to the dtype, the output rounded, and float32 scores whose exponential is taken."""
        assert got.dtype == self.dtype
        half_ulp, start, group = torch.finfo(self.dtype).eps / 2, 0, self.q.shape[1] // self.k.shape[2]
        for (rows, context), keys, values in zip(self.requests, self.keys, self.values, strict=True):
            q = self.q[start : start + rows].double().transpose(0, 1)
            k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
            visible = torch.ones(rows, context, device=q.device, dtype=torch.bool).tril(context - rows)
            scores = (q @ k.transpose(1, 2) * self.scale).masked_fill(~visible, float("-inf"))
            p = scores.softmax(-1)
            want, size = (x.transpose(0, 1).flatten(1) for x in (p @ v, p @ v.abs()))
            error = (got[start : start + rows].double() - want).abs()
            bound = half_ulp * want.abs() + (half_ulp + 2.0**-16) * size
            assert bool((error <= bound).all()), f"worst {(error / bound).nan_to_num(1e9).max().item():.3g} x the bound"
            start += rows


@pytest.mark.parametrize("requests", [MIXED, DECODES, LONG], ids=["mixed", "decodes", "long"])
def test_paged_attention(place: Place, requests: list[tuple[int, int]]) -> None:
    for D, H, G in place.shapes(SHAPES if requests is MIXED else SHAPES[1:3], LARGE):
        case = Case(place, requests, D, H, G)
        case.check(case.run())


def test_head_size_256(place: Place) -> None:
    case = Case(place, [(3, 20), (1, 9)], 256, 2, 1)
    case.check(case.run())


@pytest.mark.parametrize("block_size", [32, 128])
def test_block_sizes(place: Place, block_size: int) -> None:
    case = Case(place, MIXED, 64, 3, 1, block_size)
    case.check(case.run())


def test_long_contexts(place: Place) -> None:
    """More keys than sixteen splits of the shortest length hold."""
    requests = [(1, 2500), (1, 2049)] if place.device == "cpu" else [(1, 2500), (300, 3000), (1, 20_000)]
    case = Case(place, requests, 64, 2, 1, block_size=64)
    case.check(case.run())


def test_a_row_does_not_depend_on_its_batch(place: Place) -> None:
    D, H, G = 64, 6, 2
    batch, start = Case(place, MIXED, D, H, G), 0
    together = batch.run()
    for b, (rows, _) in enumerate(MIXED):
        alone = Case(place, MIXED[b : b + 1], D, H, G)
        alone.k, alone.v, alone.tables = batch.k, batch.v, batch.tables[b : b + 1]
        alone.q = batch.q[start : start + rows]
        assert torch.equal(alone.run(), together[start : start + rows])
        start += rows


def test_padding_requests_of_a_captured_graph(place: Place) -> None:
    """A request with a query row and no key yields zeros, not NaN; its block table is not read."""
    case = Case(place, [(1, 40), (1, 0), (1, 200)], 64, 6, 2)
    out = case.run()
    assert not out[1].any()
    case.requests[1] = (0, 0)
    case.q, kept = torch.cat((case.q[:1], case.q[2:])), torch.cat((out[:1], out[2:]))
    case.check(kept)


def test_bad_shapes_are_named(place: Place) -> None:
    case = Case(place, [(1, 5)], 64, 4, 3)
    with pytest.raises(ValueError, match="4 query heads over 3 key heads"):
        case.run()


def test_twins_fail(place: Place) -> None:
    def late(case: Case) -> None:
        case.context_lens -= (case.context_lens > 20).int()

    def shuffled(case: Case) -> None:
        case.tables[3, :2] = case.tables[3, :2].flip(0)

    def scaled(case: Case) -> None:
        case.scale *= 1.02

    def heads(case: Case) -> None:
        case.k = case.k.flip(2)

    for corrupt in (late, shuffled, scaled, heads):
        case = Case(place, MIXED, 64, 6, 2)
        exact_scale = case.scale
        corrupt(case)
        got = case.run()
        case.scale = exact_scale
        with pytest.raises(AssertionError):
            case.check(got)
