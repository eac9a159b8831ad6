"""Runs `ottava evaluate`: checks options, measures, and writes the table and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from quant.checkpoint.reader import Checkpoint
from quant.scheme import PRESETS, HeadStorage, KVStorage, Scheme
from service.errors import InvalidSettings
from service.host.machine import birth_certificate
from service.models.config import ModelConfig
from service.models.devices import pick_device, pick_dtype
from service.settings import Settings
from service.store.calibration import Calibration, calibration_text, text_windows
from service.store.progress import Progress
from service.store.resolve import is_quantized, resolve_model
from service.tools.evaluate.quality import Row, load_questions, measure_quality, stored_schemes
from service.tools.evaluate.report import as_json, layer_tables, layer_verdict, quality_table


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The options of an evaluation.

    schemes: to compare; the baseline is always measured too. None for those of an int8 folder, or all presets.
    storages: of keys and values; None for the scheme's own.   heads: storages of the head.
    text: to measure on, in num_windows windows of window_len tokens; None for the standard library's help topics.
    choices: file of questions (`read_questions`), or None.
    num_calibration_windows: windows for calibration, of the same length; None for as many as each scheme needs.
    has_layers: measure the error of every Linear and layer.
    json_file, plot: files to write, or None.
    """

    schemes: Sequence[Scheme] | None
    storages: Sequence[KVStorage | None]
    heads: Sequence[HeadStorage]
    text: Path | None
    choices: Path | None
    num_windows: int
    window_len: int
    num_calibration_windows: int | None
    has_layers: bool
    json_file: Path | None
    plot: Path | None

    def refuse_outputs(self) -> None:
        """Raise InvalidSettings if a file cannot be written, before minutes of measuring rather than after."""
        for option, path in (("--json", self.json_file), ("--plot", self.plot)):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise InvalidSettings(f"{option} {path} cannot be written: name a file in a folder that exists")
        if self.plot is None:
            return
        if self.plot.suffix.lower() != ".png":
            raise InvalidSettings(f"--plot {self.plot} must end in .png: a PNG is what is drawn")
        if find_spec("matplotlib") is None:
            raise InvalidSettings(
                "--plot needs matplotlib, which is not installed: pip install 'ottava[plot]', or leave --plot out"
            )

    def run(
        self,
        model: str | None,
        settings: Settings,
        on_progress: Progress,
        command: Sequence[str],
        on_row: Callable[[Row], None] = lambda _: None,
    ) -> tuple[dict[str, Any], list[Row]]:
        """Measure and write the files. Returns the description of the run, and a row per scheme.

        A folder that is quantized already is measured as it is, against the settings' baseline.

        Args:
            on_row: called with each row as soon as it is known.

        Raises:
            StartupError: a file cannot be written or read, or the model cannot be measured.
        """
        self.refuse_outputs()
        questions = [] if self.choices is None else load_questions(self.choices)
        stored, folder = self._folders(model, settings, on_progress)
        schemes = self._schemes(stored)
        config = ModelConfig.load(folder, self.window_len)
        windows = text_windows(folder, self.text, self.num_windows, self.window_len)
        calibration = self._calibration(folder, settings)
        rows = []
        for row in measure_quality(
            folder,
            schemes,
            windows,
            calibration,
            settings,
            on_progress=on_progress,
            questions=questions,
            has_layers=self.has_layers,
            stored=stored,
        ):
            rows.append(row)
            on_row(row)
        device = pick_device(settings.device)
        dtype = pick_dtype(settings.dtype, config, device)
        run = (
            birth_certificate(device, command)
            | {
                "model": str(folder if stored is None else stored),
                "dtype": str(dtype).removeprefix("torch."),
                "text": "Python's help topics" if self.text is None else str(self.text),
                "windows": [self.num_windows, self.window_len],
                "calibration": _calibration_of(stored) if stored is not None else calibration.describe(folder),
            }
            | ({} if stored is None else {"baseline": str(folder)})
        )
        self._write(run, rows)
        return run, rows

    def _folders(self, model: str | None, settings: Settings, on_progress: Progress) -> tuple[Path | None, Path]:
        """The int8 folder to measure as it is, or None, and the float one."""
        on_stage = lambda stage: on_progress(stage, 0, 0)  # noqa: E731
        folder = resolve_model(model, settings.cache_dir, on_stage)
        if settings.baseline is None:
            return None, folder
        if not is_quantized(folder):
            raise InvalidSettings(
                f"--baseline names the float model of a quantized folder, but {folder} is not quantized; leave it out"
            )
        return folder, resolve_model(settings.baseline, settings.cache_dir, on_stage)

    def _schemes(self, stored: Path | None) -> list[Scheme]:
        if stored is None:
            schemes = list(PRESETS.values()) if self.schemes is None else self.schemes
            return in_storages(schemes, self.storages, self.heads)
        if self.schemes is not None:
            raise InvalidSettings(
                f"{stored} is quantized already and is measured as it is: leave --schemes, --alpha, --sink, "
                "--rotate and --rounding out, or name the float model"
            )
        return in_storages(stored_schemes(stored, self.storages, self.has_layers), [None], self.heads)

    def _calibration(self, folder: Path, settings: Settings) -> Calibration:
        """What schemes are calibrated on: if it is the text that is measured on, what follows the measured windows."""
        made = Calibration(settings.calibration, settings.seed, self.num_calibration_windows, self.window_len)
        if made.is_self_written(folder) or calibration_text(made.text) != calibration_text(self.text):
            return made
        return replace(made, offset=self.num_windows)

    def _write(self, run: dict[str, Any], rows: Sequence[Row]) -> None:
        if self.json_file is not None:
            self.json_file.write_text(as_json(run, rows), encoding="utf-8")
        if self.plot is not None:
            # Imported only here: matplotlib belongs to an extra, and its import must not delay other commands.
            draw = import_module("service.tools.evaluate.plot").draw
            draw(rows, self.plot, f"{Path(run['model']).name}, {run['device']}, {run['dtype']}, torch {run['torch']}")


def _calibration_of(stored: Path) -> str | None:
    """What an int8 folder says that it was calibrated on."""
    return Checkpoint.open(stored, torch.float32, "meta").notes.get("calibration")


def in_storages(
    schemes: Sequence[Scheme], storages: Sequence[KVStorage | None], heads: Sequence[HeadStorage] = ("float",)
) -> list[Scheme]:
    """Each scheme with each storage of keys and values, and of the head, each once; a float scheme keeps its own."""
    stored = (scheme.with_kv(kv).with_head(head) for scheme in schemes for kv in storages for head in heads)
    return list(dict.fromkeys(stored))


def show(run: dict[str, Any], rows: Sequence[Row], console: Console) -> None:
    """Print the table and, if measured, the Linears and layers of every scheme."""
    console.print(quality_table(rows, f"{run['device']}, {run['dtype']}"))
    for row in rows:
        if row.linear_errors:
            for table in layer_tables(row):
                console.print(table)
            console.print(layer_verdict(row), highlight=False)
