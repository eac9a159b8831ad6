"""Keeps the finished layers of a checkpoint being written, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quant.checkpoint.json_file import read_json
from quant.checkpoint.safetensors_files import save_tensors
from quant.errors import CheckpointError

STATE_NAME = "state.json"


class PartFolder:
    """The folder `.NAME.part` beside the future checkpoint NAME.

    Each finished layer is a safetensors file, and another has the hidden states that enter the next layer. `state.json`
    has the settings and the notes of each finished layer; it is replaced atomically when a layer is complete.

    Args:
        out: the future checkpoint.
        settings: identifies source, scheme and calibration. A folder with other settings is cleared.

    Attributes:
        notes: one object per finished layer.
    """

    def __init__(self, out: Path, settings: str) -> None:
        self.out = out
        self.folder = out.parent / f".{out.name}.part"
        self.settings = settings
        self.notes: list[dict[str, Any]] = []
        state_path = self.folder / STATE_NAME
        if state_path.is_file():
            state = read_json(state_path)
            if state["settings"] == settings:
                self.notes = state["notes"]
                return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self._save_state()

    @property
    def num_done(self) -> int:
        """Number of finished layers."""
        return len(self.notes)

    def carried(self) -> dict[str, Tensor]:
        """What was kept for the next layer. Raises CheckpointError if its file is damaged."""
        return _load(self._carried_path(self.num_done))

    def add(self, tensors: Mapping[str, Tensor], note: dict[str, Any], carried: dict[str, Tensor]) -> None:
        """Keep a finished layer: its tensors, a note about it, and what the next layer starts from."""
        save_tensors(tensors, self._layer_path(self.num_done))
        save_tensors(carried, self._carried_path(self.num_done + 1))
        self.notes.append(note)
        self._save_state()
        self._carried_path(self.num_done - 1).unlink(missing_ok=True)

    def layers(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each finished layer, one layer at a time. Raises CheckpointError if a file is damaged."""
        for index in range(self.num_done):
            yield _load(self._layer_path(index))

    @contextmanager
    def whole(self) -> Iterator[Path]:
        """An empty folder, which is moved to `out` when the context ends without an exception."""
        folder = self.folder / "whole"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o755)
        yield folder
        folder.replace(self.out)
        shutil.rmtree(self.folder)

    def remove(self) -> None:
        """Delete all that was kept."""
        shutil.rmtree(self.folder)

    def _save_state(self) -> None:
        path = self.folder / STATE_NAME
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"settings": self.settings, "notes": self.notes}), encoding="utf-8")
        fresh.replace(path)

    def _layer_path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def _carried_path(self, num_done: int) -> Path:
        return self.folder / f"carried-{num_done:05d}.safetensors"


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not what was written ({error}); what was done is thrown away: quantize again"
        ) from error
