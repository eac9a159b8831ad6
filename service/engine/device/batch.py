"""A step as tensors: where each token sits, which blocks its request owns, and how its successor is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.engine.request import Request
from service.engine.scheduler import Chunk, Step
from service.models.attention import Rows

PER_TOKEN = ("token_ids", "from_row", "positions", "slots")
PER_REQUEST = ("context_lens", "sample_index", "sample_rows")


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one forward pass, on the device: T token rows, B requests, S of them sampling. int32 throughout.

    token_ids: [T], read where from_row is -1.
    from_row: [T], the request row whose last sampled id is this token, or -1.
    rows: where each token row sits in its request and in the cache.
    sample_index: [S], token row that yields a sample.   sample_rows: [S], its request's row.
    """

    token_ids: Tensor
    from_row: Tensor
    rows: Rows
    sample_index: Tensor
    sample_rows: Tensor


class BatchBuilder:
    """Fills device buffers that were allocated once, at their largest size, so that a captured graph can read them.

    The host side has two staging sets, used in turn: while the copy of one step may still be in flight, the next step
    is written into the other.
    """

    def __init__(
        self, max_tokens: int, max_requests: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.device = device
        self._spans = _spans(max_tokens, max_requests)
        size = max(stop for _, stop in self._spans.values())
        pin = device.type == "cuda"
        self._staging = [torch.zeros(size, dtype=torch.int32, pin_memory=pin) for _ in range(2)]
        self._ints = torch.zeros(size, dtype=torch.int32, device=device)
        table_size = max_requests * max_blocks
        self._table_staging = [torch.zeros(table_size, dtype=torch.int32, pin_memory=pin) for _ in range(2)]
        self._tables = torch.zeros(max_requests, max_blocks, dtype=torch.int32, device=device)
        # Block numbers by request row, extended by what each step added instead of rebuilt.
        self._known_blocks = np.zeros((max_requests, max_blocks), dtype=np.int32)
        self._owner: list[tuple[Request | None, int, int]] = [(None, 0, 0)] * max_requests
        self._turn = 0

    def build(self, step: Step, bucket: int | None = None) -> Batch:
        """Turn a step into device tensors; with a bucket, pad a decode step to that many requests."""
        self._turn ^= 1
        columns = self._columns(step)
        if bucket:
            _pad(columns, bucket)
        staging = self._staging[self._turn]
        for name, values in columns.items():
            start, stop = self._spans[name][0], self._spans[name][0] + len(values)
            staging.numpy()[start:stop] = values
        self._ints.copy_(staging, non_blocking=True)
        self._copy_tables(step)
        longest = max(chunk.length for chunk in step.chunks)
        return self.view({name: len(values) for name, values in columns.items()}, longest)

    def view(self, counts: dict[str, int], max_query_len: int) -> Batch:
        """The buffers' first counts[name] elements, whatever they hold."""
        ints = {name: self._ints[start : start + counts[name]] for name, (start, _) in self._spans.items()}
        rows = Rows(
            positions=ints["positions"],
            slots=ints["slots"],
            query_starts=ints["query_starts"],
            context_lens=ints["context_lens"],
            block_tables=self._tables[: counts["context_lens"]],
            max_query_len=max_query_len,
        )
        return Batch(ints["token_ids"], ints["from_row"], rows, ints["sample_index"], ints["sample_rows"])

    def blank(self, num_requests: int, query_len: int = 1) -> Batch:
        """A step of padding rows alone, for warm-up and capture: it writes nothing to the cache and samples nothing.

        Its requests read query_len keys of block 0, whatever that holds.
        """
        num_tokens = num_requests * query_len
        columns: dict[str, list[int]] = {
            "sample_index": [],
            "sample_rows": [],
            "token_ids": [0] * num_tokens,
            "from_row": [-1] * num_tokens,
            "positions": list(range(query_len)) * num_requests,
            "slots": [-1] * num_tokens,
            "query_starts": list(range(0, num_tokens + 1, query_len)),
            "context_lens": [query_len] * num_requests,
        }
        for name, values in columns.items():
            start = self._spans[name][0]
            self._ints[start : start + len(values)] = torch.tensor(values, dtype=torch.int32, device=self.device)
        self._tables.zero_()
        return self.view({name: len(values) for name, values in columns.items()}, query_len)

    def _columns(self, step: Step) -> dict[str, list[int]]:
        columns: dict[str, list[int]] = {name: [] for name in self._spans}
        columns["query_starts"].append(0)
        for chunk in step.chunks:
            self._add_tokens(chunk, columns)
            end = len(columns["token_ids"])
            columns["query_starts"].append(end)
            columns["context_lens"].append(chunk.start + chunk.length)
            if chunk.samples:
                columns["sample_index"].append(end - 1)
                columns["sample_rows"].append(chunk.request.row)
        return columns

    def _add_tokens(self, chunk: Chunk, columns: dict[str, list[int]]) -> None:
        request, size = chunk.request, self.block_size
        positions = range(chunk.start, chunk.start + chunk.length)
        num_known = len(request.prompt_ids) + len(request.output_ids)
        columns["positions"].extend(positions)
        columns["slots"].extend([request.blocks[p // size] * size + p % size for p in positions])
        columns["token_ids"].extend([request.token_id(p) if p < num_known else 0 for p in positions])
        columns["from_row"].extend([-1 if p < num_known else request.row for p in positions])

    def _copy_tables(self, step: Step) -> None:
        rows = [chunk.request.row for chunk in step.chunks]
        for chunk in step.chunks:
            self._learn_blocks(chunk.request)
        width = max(len(chunk.request.blocks) for chunk in step.chunks)
        flat = self._table_staging[self._turn][: len(rows) * width]
        flat.numpy().reshape(len(rows), width)[:] = self._known_blocks[rows, :width]
        # Contiguous over the bus, strided on the device: a strided host copy would wait for the device.
        self._tables[: len(rows), :width] = flat.to(self.device, non_blocking=True).view(len(rows), width)

    def _learn_blocks(self, request: Request) -> None:
        owner, preemptions, count = self._owner[request.row]
        known = count if owner is request and preemptions == request.num_preemptions else 0
        self._known_blocks[request.row, known : len(request.blocks)] = request.blocks[known:]
        self._owner[request.row] = (request, request.num_preemptions, len(request.blocks))


def _pad(columns: dict[str, list[int]], bucket: int) -> None:
    """Extend a decode step to bucket requests whose rows read no key and write no slot."""
    missing = bucket - len(columns["context_lens"])
    fill = dict.fromkeys((*PER_TOKEN, "context_lens"), 0) | {"from_row": -1, "slots": -1}
    fill["query_starts"] = columns["query_starts"][-1]
    for name, value in fill.items():
        columns[name].extend([value] * missing)


def _spans(max_tokens: int, max_requests: int) -> dict[str, tuple[int, int]]:
    """Where each column lies in the one buffer that crosses the bus."""
    sizes = dict.fromkeys(PER_TOKEN, max_tokens) | dict.fromkeys(PER_REQUEST, max_requests)
    sizes["query_starts"] = max_requests + 1
    spans, start = {}, 0
    for name, size in sizes.items():
        spans[name] = (start, start + size)
        start += size
    return spans
