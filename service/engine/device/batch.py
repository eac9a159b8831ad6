"""The inputs of a step as device tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Rows
from service.engine.device.staging import Staging
from service.engine.shapes import Shape
from service.engine.step_table import Ints, StepTable, TableLayout

MAX_VIEWS = 512
"""Views that are kept of captured shapes, of which there are fewer, and of sizes of block tables."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one forward pass, on the device: T token rows, B requests, S of them sampling. int32 throughout.

    token_ids: [T], read where from_row is -1.
    from_row: [T], the request row whose last sampled id is this token, or -1.
    rows: the position of each token row in its request and in the cache.
    sample_index: [S], token row that yields a sample.   sample_rows: [S], its request's row.
    """

    token_ids: Tensor
    from_row: Tensor
    rows: Rows
    sample_index: Tensor
    sample_rows: Tensor


class BatchBuilder:
    """Copies steps into device buffers, allocated once for the largest step, so that graphs read fixed addresses.

    For each step, write a `StepTable` of the same layout into the memory from `numbers`, then pass it to `build`.
    """

    def __init__(self, layout: TableLayout, device: torch.device, num_kv_heads: int, *, has_drafts: bool) -> None:
        self._layout = layout
        staging = Staging(device, 4 * layout.size)
        sets = [staging.take(4 * layout.size).view(torch.int32) for _ in range(2)]
        # Both views once: each call of torch takes 20 us after a pause.
        self._sets = [(tensor, tensor.numpy()) for tensor in sets]
        self._turn = 0
        self._copies: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._ints = torch.zeros(layout.size, dtype=torch.int32, device=device)
        self._has_drafts = has_drafts
        self._arrivals = torch.zeros(layout.max_requests, num_kv_heads, dtype=torch.int32, device=device)
        self._tables = torch.zeros(layout.max_requests, layout.max_blocks, dtype=torch.int32, device=device)
        self._views: dict[tuple[int, int, int, bool], Batch] = {}

    def numbers(self) -> Ints:
        """Host memory for the numbers of the next step, valid until `build`."""
        self._turn ^= 1
        numbers: Ints = self._sets[self._turn][1]
        return numbers

    def build(self, table: StepTable) -> Batch:
        """Launch the copy of a step to the device, and return the step there."""
        num_tables, width = table.block_tables.shape
        return self.launch(
            num_tokens=len(table.token_ids),
            num_requests=len(table.context_lens),
            num_samples=len(table.sample_index),
            num_tables=num_tables,
            width=width,
            is_decode=table.is_decode,
        )

    def launch(
        self, *, num_tokens: int, num_requests: int, num_samples: int, num_tables: int, width: int, is_decode: bool
    ) -> Batch:
        """`build`, of a step of these sizes."""
        copies = self._copies.get((self._turn, num_tables, width))
        if copies is None:
            if len(self._copies) == MAX_VIEWS:
                # The oldest alone: to free them all takes 0.3 ms.
                del self._copies[next(iter(self._copies))]
            copies = self._copies[self._turn, num_tables, width] = self._copies_of(num_tables, width)
        ints, host, tables, packed = copies
        ints.copy_(host, non_blocking=True)
        # One contiguous copy, then a strided one on the device: a strided copy from the host would block.
        tables.copy_(packed)
        return self.view(num_tokens=num_tokens, num_requests=num_requests, num_samples=num_samples, is_decode=is_decode)

    def _copies_of(self, num_tables: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a step of this turn is copied to and from, then its block tables."""
        begin = self._layout.starts["block_tables"]
        size = begin + num_tables * width
        packed = self._ints[begin:size].view(num_tables, width)
        return self._ints[:size], self._sets[self._turn][0][:size], self._tables[:num_tables, :width], packed

    def view(self, *, num_tokens: int, num_requests: int, num_samples: int, is_decode: bool) -> Batch:
        """View the buffers as a step of these sizes, without writing to them."""
        sizes = num_tokens, num_requests, num_samples, is_decode
        view = self._views.get(sizes)
        if view is None:
            if len(self._views) == MAX_VIEWS:
                self._views.clear()
            view = self._views[sizes] = self._view(*sizes)
        return view

    def _view(self, num_tokens: int, num_requests: int, num_samples: int, is_decode: bool) -> Batch:
        starts = self._layout.starts

        def column(name: str, count: int) -> Tensor:
            return self._ints[starts[name] : starts[name] + count]

        rows = Rows(
            positions=column("positions", num_tokens),
            slots=column("slots", num_tokens),
            query_starts=column("query_starts", num_requests + 1),
            context_lens=column("context_lens", num_requests),
            block_tables=self._tables[:num_requests],
            is_decode=is_decode,
            arrivals=self._arrivals[:num_requests],
            is_alone=is_decode and not self._has_drafts,
        )
        return Batch(
            token_ids=column("token_ids", num_tokens),
            from_row=column("from_row", num_tokens),
            rows=rows,
            sample_index=column("sample_index", num_samples),
            sample_rows=column("sample_rows", num_samples),
        )

    def blank(self, shape: Shape, query_len: int) -> Batch:
        """A step of padding only, for warm-up and capture: it writes no key, and nobody reads its samples.

        Its token rows are shared out to the requests, query_len to each until none is left. Each request reads as many
        keys of block 0, whose content is arbitrary.
        """
        num_tokens, num_requests = shape.num_tokens, shape.num_requests
        batch = self.view(
            num_tokens=num_tokens, num_requests=num_requests, num_samples=num_requests, is_decode=shape.is_decode
        )
        steps = torch.arange(max(num_tokens, num_requests + 1), dtype=torch.int32, device=self._ints.device)
        batch.token_ids.zero_()
        batch.from_row.fill_(-1)
        batch.rows.positions[:] = steps[:num_tokens] % query_len
        batch.rows.slots.fill_(-1)
        batch.rows.query_starts[:] = (steps[: num_requests + 1] * query_len).clamp_(max=num_tokens)
        batch.rows.context_lens[:] = batch.rows.query_starts.diff()
        batch.sample_index.zero_()
        batch.sample_rows.fill_(self._layout.max_requests)
        self._tables.zero_()
        return batch
