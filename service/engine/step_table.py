"""The inputs of a step as integer arrays on the host: positions, cache slots, block tables, sampling rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.engine.request import Request
from service.engine.scheduler import Chunk, Step
from service.engine.shapes import Shape

Ints: TypeAlias = NDArray[np.int32]

PER_TOKEN = ("token_ids", "from_row", "positions", "slots")
PER_REQUEST = ("context_lens", "sample_index", "sample_rows")
ALIGNMENT = 4
"""Each column starts at a multiple of this many int32."""


def blocks_of(max_model_len: int, block_size: int) -> int:
    """Most blocks of a request."""
    return -(-max_model_len // block_size)


class TableLayout:
    """Column offsets in the one array that is copied to the device, sized for the largest step.

    Offsets do not depend on the step, so that a captured graph reads the right addresses. Block tables come last, so
    that the copy can stop after those of the step.
    """

    def __init__(self, *, max_tokens: int, max_requests: int, max_blocks: int) -> None:
        self.max_requests = max_requests
        self.max_blocks = max_blocks
        sizes = dict.fromkeys(PER_TOKEN, max_tokens) | {"query_starts": max_requests + 1}
        sizes |= dict.fromkeys(PER_REQUEST, max_requests) | {"block_tables": max_requests * max_blocks}
        self.starts: dict[str, int] = {}
        self.size = 0
        for name, size in sizes.items():
            self.starts[name] = self.size
            # Triton recompiles a kernel for a pointer that is not a multiple of 16 bytes.
            self.size += -(-size // ALIGNMENT) * ALIGNMENT

    def table(
        self,
        numbers: Ints,
        *,
        num_tokens: int,
        num_requests: int,
        num_samples: int,
        num_tables: int,
        width: int,
        is_decode: bool,
    ) -> StepTable:
        """View the array as a step of these sizes, without writing to it."""
        tables = self.starts["block_tables"]
        used = numbers[: tables + num_tables * width]

        def column(name: str, count: int) -> Ints:
            return used[self.starts[name] : self.starts[name] + count]

        return StepTable(
            numbers=used,
            token_ids=column("token_ids", num_tokens),
            from_row=column("from_row", num_tokens),
            positions=column("positions", num_tokens),
            slots=column("slots", num_tokens),
            query_starts=column("query_starts", num_requests + 1),
            context_lens=column("context_lens", num_requests),
            sample_index=column("sample_index", num_samples),
            sample_rows=column("sample_rows", num_samples),
            block_tables=used[tables:].reshape(num_tables, width),
            is_decode=is_decode,
        )

    def unpack(
        self,
        packed: Ints,
        numbers: Ints,
        *,
        num_tokens: int,
        num_requests: int,
        num_samples: int,
        num_tables: int,
        width: int,
        is_decode: bool,  # noqa: ARG002 (of the same arguments as `table`)
    ) -> None:
        """Write a step's `StepTable.columns`, which stand one behind the other, into an array of the layout's size.

        Without views of the columns, which would take as long again as the copies, 4 us.
        """
        starts, per_token = self.starts, len(PER_TOKEN)
        length, end = starts["positions"] - starts["from_row"], per_token * num_tokens
        # Columns of tokens are as long and lie one behind the other in both.
        numbers[: per_token * length].reshape(per_token, length)[:, :num_tokens] = packed[:end].reshape(per_token, -1)
        for name, count in (
            ("query_starts", num_requests + 1),
            ("context_lens", num_requests),
            ("sample_index", num_samples),
            ("sample_rows", num_samples),
            ("block_tables", num_tables * width),
        ):
            start = starts[name]
            numbers[start : start + count] = packed[end : end + count]
            end += count


class StepTable(NamedTuple):
    """A step of T token rows for B requests, S of which sample; padding counts in T and B. int32 throughout.

    numbers: the part of a `TableLayout`'s array that the step uses; all other arrays are views of it.
    token_ids: [T], read where from_row is -1.
    from_row: [T], the request row whose last sampled id is this token, or -1.
    positions: [T], of the token in its request.   slots: [T], of the token in the cache, or -1 for none.
    query_starts: [B + 1], the first token row of each request.   context_lens: [B], keys its last token attends to.
    sample_index: [S], token row that yields a sample.   sample_rows: [S], its request's row; padding samples token row
        0 for the row behind all requests. Drafts sample for their request's row too: the host reads them before it
        plans the request's next step, so nothing depends on which sample the row keeps.
    block_tables: [R, W] of the R requests that are not padding; W is the most blocks that one of them owns.
    is_decode: whether each row is the newest token of its request, or a draft. Not where a preempted request computes
        again what it had generated, token by token: such rows read the keys of those before them.
    """

    numbers: Ints
    token_ids: Ints
    from_row: Ints
    positions: Ints
    slots: Ints
    query_starts: Ints
    context_lens: Ints
    sample_index: Ints
    sample_rows: Ints
    block_tables: Ints
    is_decode: bool

    @property
    def columns(self) -> tuple[Ints, ...]:
        """All that the step uses of `numbers`, each as one row, in the order in which `TableLayout.unpack` has them."""
        return (
            self.token_ids,
            self.from_row,
            self.positions,
            self.slots,
            self.query_starts,
            self.context_lens,
            self.sample_index,
            self.sample_rows,
            self.block_tables.reshape(-1),
        )


class StepTableBuilder:
    """Writes steps into arrays. It keeps the blocks of each request row and copies only those added since."""

    def __init__(self, layout: TableLayout, block_size: int) -> None:
        self._layout = layout
        self._block_size = block_size
        # Indexed by request row.
        self._blocks = np.zeros((layout.max_requests, layout.max_blocks), dtype=np.int32)
        self._num_blocks = np.zeros(layout.max_requests, dtype=np.int32)
        self._positions = np.arange(layout.max_blocks * block_size, dtype=np.int32)
        # Serial number of the request, preemptions of it, and its blocks that are known.
        self._owner: list[tuple[int, int, int]] = [(0, 0, 0)] * layout.max_requests

    def build(self, step: Step, numbers: Ints, shape: Shape | None = None) -> StepTable:
        """Write a step into an array of the layout's size, padded to a shape if one is given."""
        chunks = step.chunks
        if len(chunks) == 1:
            return self._lone(chunks[0], numbers, shape)
        requests = [chunk.request for chunk in chunks]
        self._learn_blocks(requests)
        # One conversion of whole lists: writing the numbers one by one takes ten times as long.
        rows, starts, lengths, num_known, samples = np.array(
            [
                [request.row for request in requests],
                [chunk.start for chunk in chunks],
                [chunk.length for chunk in chunks],
                [
                    len(chunk.request.prompt_ids) + len(chunk.request.output_ids)
                    if chunk.draft is None
                    else chunk.start + 1
                    for chunk in chunks
                ],
                [chunk.samples for chunk in chunks],
            ],
            dtype=np.int32,
        )
        num_requests, ends, sampling = len(chunks), lengths.cumsum(dtype=np.int32), samples.nonzero()[0]
        num_tokens, num_samples = int(ends[-1]), len(sampling)
        table = self._layout.table(
            numbers,
            num_tokens=shape.num_tokens if shape else num_tokens,
            num_requests=shape.num_requests if shape else num_requests,
            num_samples=shape.num_requests if shape else num_samples,
            num_tables=num_requests,
            width=int(self._num_blocks[rows].max()),
            is_decode=shape.is_decode if shape else step.is_decode,
        )
        table.query_starts[0] = 0
        table.query_starts[1 : num_requests + 1] = ends
        table.context_lens[:num_requests] = starts + lengths
        table.sample_index[:num_samples] = ends[sampling] - 1
        table.sample_rows[:num_samples] = rows[sampling]
        table.block_tables[:] = self._blocks[rows, : table.block_tables.shape[1]]
        known_ids = _known_ids([chunks[place] for place in (starts < num_known).nonzero()[0].tolist()])
        if num_tokens > num_requests:
            rows, num_known = rows.repeat(lengths), num_known.repeat(lengths)
            starts = (starts - ends + lengths).repeat(lengths) + np.arange(num_tokens, dtype=np.int32)
        self._write_tokens(table, rows, starts, starts < num_known, known_ids)
        if shape:
            _pad(table, num_tokens, num_requests, num_samples, self._layout.max_requests)
        return table

    def _lone(self, chunk: Chunk, numbers: Ints, shape: Shape | None) -> StepTable:
        """`build` of one chunk, in a third of the calls.

        A lone request's first token waits for it, and after a pause a call takes five times as long as in a loop.
        """
        request, start, length = chunk.request, chunk.start, chunk.length
        self._learn_blocks([request])
        row, stop, size = request.row, start + length, self._block_size
        num_blocks = self._owner[row][2]
        table = self._layout.table(
            numbers,
            num_tokens=shape.num_tokens if shape else length,
            num_requests=shape.num_requests if shape else 1,
            num_samples=shape.num_requests if shape else int(chunk.samples),
            num_tables=1,
            width=num_blocks,
            is_decode=shape.is_decode if shape else length == 1 and chunk.samples,
        )
        known_ids = _known_ids([chunk])
        num_known = len(known_ids)
        table.token_ids[:num_known] = known_ids
        table.token_ids[num_known:] = 0
        table.from_row.fill(-1)
        table.from_row[num_known:length] = row
        table.positions[:length] = self._positions[start:stop]
        table.positions[length:] = 0
        first = start // size
        slots = self._blocks[row, first : -(-stop // size), None] * size + self._positions[:size]
        table.slots[:length] = slots.reshape(-1)[start - first * size : stop - first * size]
        table.slots[length:] = -1
        table.query_starts.fill(length)
        table.query_starts[0] = 0
        table.context_lens.fill(0)
        table.context_lens[0] = stop
        table.sample_index.fill(0)
        table.sample_rows.fill(self._layout.max_requests)
        if chunk.samples:
            table.sample_index[0], table.sample_rows[0] = length - 1, row
        table.block_tables[0] = self._blocks[row, :num_blocks]
        return table

    def _write_tokens(
        self, table: StepTable, rows: Ints, positions: Ints, is_known: NDArray[np.bool_], known_ids: list[int]
    ) -> None:
        """Fill the per-token columns. known_ids holds the ids of the tokens in is_known, in order."""
        num_tokens = len(positions)
        blocks, offsets = np.divmod(positions, self._block_size)
        table.positions[:num_tokens] = positions
        table.slots[:num_tokens] = self._blocks[rows, blocks] * self._block_size + offsets
        table.from_row[:num_tokens] = np.where(is_known, -1, rows)
        table.token_ids[:num_tokens] = 0
        if known_ids:
            table.token_ids[:num_tokens][is_known] = known_ids

    def _learn_blocks(self, requests: Sequence[Request]) -> None:
        for request in requests:
            owner, num_preemptions, num_blocks = self._owner[request.row]
            is_known = owner == request.serial and num_preemptions == request.num_preemptions
            if is_known and num_blocks == len(request.blocks):
                continue
            first, stop = num_blocks if is_known else 0, len(request.blocks)
            self._blocks[request.row, first:stop] = request.blocks[first:]
            self._num_blocks[request.row] = stop
            self._owner[request.row] = request.serial, request.num_preemptions, stop


def _known_ids(chunks: Sequence[Chunk]) -> list[int]:
    """The concatenated ids of the chunks' tokens that the host has read, and of drafts."""
    ids: list[int] = []
    for chunk in chunks:
        if chunk.draft is not None:
            ids.append(chunk.draft)
        else:
            ids += chunk.request.known_ids(chunk.start, chunk.start + chunk.length)
    return ids


def _pad(table: StepTable, num_tokens: int, num_requests: int, num_samples: int, spare_row: int) -> None:
    """Pad a step with rows that read no key and write no slot, and with samples that nobody reads."""
    table.token_ids[num_tokens:] = 0
    table.from_row[num_tokens:] = -1
    table.positions[num_tokens:] = 0
    table.slots[num_tokens:] = -1
    table.query_starts[num_requests + 1 :] = num_tokens
    table.context_lens[num_requests:] = 0
    table.sample_index[num_samples:] = 0
    table.sample_rows[num_samples:] = spare_row
