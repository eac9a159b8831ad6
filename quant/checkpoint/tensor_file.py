"""Reads one safetensors file by descriptor, never by a memory map: a file that is cut short under a map kills the
process that reads it, and weights that stay mapped change with the file."""

from __future__ import annotations

import json
import math
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.errors import CheckpointError
from quant.part import Ranges, total

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Entry(NamedTuple):
    """A tensor's place: start, from the beginning of the file, and size in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class TensorFile:
    """The tensors of a safetensors file, each read into memory of its own.

    Raises:
        CheckpointError: it is no whole safetensors file.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Else a pipe of that name would be waited for.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self._descriptor)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise self._not_whole("it is no regular file")
        self._first = self._state()
        self.entries = self._read_header()

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> Tensor:
        """A tensor as stored, on the CPU, or some of its rows, and of these some columns: no other byte is read.

        Args:
            rows, columns: ranges of a tensor's first and second index; None for all. Columns are of a matrix.

        Raises:
            CheckpointError: the file has changed since it was opened.
        """
        entry = self.entries[name]
        num_rows, num_columns = total(rows, (*entry.shape, 1)[0]), total(columns, (*entry.shape, 1, 1)[1])
        shape = (num_rows, num_columns, *entry.shape[2:])[: len(entry.shape)]
        taken = torch.empty(math.prod(shape) * entry.dtype.itemsize, dtype=torch.uint8)
        view, done = taken.numpy().data, 0
        for start, stop in _pieces(entry, rows, columns):
            self._read_into(view[done : done + stop - start], entry.start + start)
            done += stop - start
        self.refuse_changed()
        return taken.view(entry.dtype).reshape(shape)

    def refuse_changed(self) -> None:
        """Raise CheckpointError if the file has been written to since it was opened."""
        if self._state() != self._first:
            raise CheckpointError(
                f"{self.path} has changed while it was read; write a checkpoint beside the old one and rename it"
            )

    def _state(self) -> tuple[int, int]:
        state = os.fstat(self._descriptor)
        return state.st_size, state.st_mtime_ns

    def _read_into(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            num_read = os.preadv(self._descriptor, [view[done:]], start + done)
            if not num_read:
                raise self._not_whole("it ends before its tensors do")
            done += num_read

    def _read_header(self) -> dict[str, Entry]:
        size = self._first[0]
        if size < LENGTH_BYTES:
            raise self._not_whole(f"it has {size} bytes")
        length = bytearray(LENGTH_BYTES)
        self._read_into(memoryview(length), 0)
        num_bytes = int.from_bytes(length, "little")
        begin = LENGTH_BYTES + num_bytes
        if num_bytes > MAX_HEADER_BYTES or begin > size:
            raise self._not_whole(f"its header would have {num_bytes} bytes")
        text = bytearray(num_bytes)
        self._read_into(memoryview(text), LENGTH_BYTES)
        try:
            header = json.loads(text)
            entries = {name: _entry(told, begin) for name, told in header.items() if name != "__metadata__"}
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise self._not_whole(f"its header is not valid: {type(error).__name__}: {str(error)[:200]!r}") from error
        end = begin
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            if entry.start != end:
                raise self._not_whole(f"{name} does not begin where the tensor before it ends")
            end += entry.size
        if end != size:
            raise self._not_whole(f"its tensors end at byte {end}, the file at {size}")
        return entries

    def _not_whole(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a whole safetensors file ({why}); download it again")


def _pieces(entry: Entry, rows: Ranges | None, columns: Ranges | None) -> Iterator[tuple[int, int]]:
    """Where what is wanted begins and ends, in bytes from the tensor's first."""
    if rows is None and columns is None:
        yield 0, entry.size
        return
    row_size = entry.size // max(1, entry.shape[0])
    for each in rows if rows is not None else (range(entry.shape[0]),):
        if columns is None:
            yield each.start * row_size, each.stop * row_size
            continue
        size = row_size // max(1, entry.shape[1])
        for row in each:
            for piece in columns:
                yield row * row_size + piece.start * size, row * row_size + piece.stop * size


def _entry(told: Any, begin: int) -> Entry:
    """The entry of a header. Raises KeyError, TypeError or ValueError if it is not valid."""
    shape, (start, stop) = tuple(told["shape"]), told["data_offsets"]
    entry = Entry(DTYPES[told["dtype"]], shape, begin + start, stop - start)
    is_valid = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    if not is_valid or math.prod(shape) * entry.dtype.itemsize != entry.size:
        raise ValueError(f"{told} is no place of a tensor")
    return entry
