"""A checkpoint being written: layers that are done are kept, so that an interrupted run goes on where it stopped."""

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

from quant.checkpoint.safetensors_files import read_json, save_tensors
from quant.errors import CheckpointError

STATE_NAME = "state.json"


class PartFolder:
    """The folder `.NAME.part` beside where the checkpoint NAME will stand.

    Each layer is a safetensors file; `state.json` names the settings and says how many layers are whole, what was noted
    of each, and which file has what the next layer starts from. It is replaced in one step when a layer is complete.

    Args:
        out: where the checkpoint will stand.
        settings: identifies source, scheme and calibration. A folder begun with others is begun anew.

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
        """Layers that are whole."""
        return len(self.notes)

    def carried(self) -> dict[str, Tensor]:
        """What the last finished layer handed on. Raises CheckpointError where its file is damaged."""
        return _load(self._carried_path(self.num_done))

    def add(self, tensors: Mapping[str, Tensor], note: dict[str, Any], carried: dict[str, Tensor]) -> None:
        """Keep a finished layer: its tensors, a note of it, and what the next layer starts from."""
        save_tensors(tensors, self._layer_path(self.num_done))
        save_tensors(carried, self._carried_path(self.num_done + 1))
        self.notes.append(note)
        self._save_state()
        self._carried_path(self.num_done - 1).unlink(missing_ok=True)

    def layers(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each finished layer, one layer at a time. Raises CheckpointError where a file is damaged."""
        for index in range(self.num_done):
            yield _load(self._layer_path(index))

    @contextmanager
    def whole(self) -> Iterator[Path]:
        """An empty folder, which takes its place at `out` when the context ends without an exception."""
        folder = self.folder / "whole"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o755)
        yield folder
        folder.replace(self.out)
        shutil.rmtree(self.folder)

    def remove(self) -> None:
        """Forget all that was done."""
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
