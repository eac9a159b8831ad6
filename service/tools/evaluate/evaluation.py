"""Runs `ottava evaluate`: checks options, measures, and writes the table and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from quant.scheme import KVStorage, Scheme
from service.errors import InvalidSettings
from service.host.machine import birth_certificate
from service.models.config import ModelConfig
from service.models.devices import pick_device, pick_dtype
from service.settings import Settings
from service.store.calibration import Calibration, calibration_text, text_windows
from service.store.progress import Progress
from service.store.resolve import resolve_model
from service.tools.evaluate.quality import Row, load_questions, measure_quality
from service.tools.evaluate.report import as_json, layer_tables, layer_verdict, quality_table


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The options of an evaluation.

    schemes: to compare; the baseline is always measured too.
    text: to measure on, in num_windows windows of window_len tokens; None for the standard library's help topics.
    choices: file of questions (`read_questions`), or None.
    num_calibration_windows: windows for calibration, of the same length.
    has_layers: measure the error of every Linear and layer.
    json_file, plot: files to write, or None.
    """

    schemes: Sequence[Scheme]
    text: Path | None
    choices: Path | None
    num_windows: int
    window_len: int
    num_calibration_windows: int
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
        self, model: str | None, settings: Settings, on_progress: Progress, command: Sequence[str]
    ) -> tuple[dict[str, Any], list[Row]]:
        """Measure and write the files. Returns the description of the run, and a row per scheme.

        Raises:
            StartupError: a file cannot be written or read, or the model cannot be measured.
        """
        self.refuse_outputs()
        questions = [] if self.choices is None else load_questions(self.choices)
        folder = resolve_model(model, settings.cache_dir, lambda stage: on_progress(stage, 0, 0))
        config = ModelConfig.load(folder, self.window_len)
        windows = text_windows(folder, self.text, self.num_windows, self.window_len)
        calibration = self._calibration(folder, settings)
        rows = list(
            measure_quality(
                folder,
                self.schemes,
                windows,
                calibration,
                settings,
                on_progress=on_progress,
                questions=questions,
                has_layers=self.has_layers,
            )
        )
        device = pick_device(settings.device)
        dtype = pick_dtype(settings.dtype, config, device)
        run = birth_certificate(device, command) | {
            "model": str(folder),
            "dtype": str(dtype).removeprefix("torch."),
            "text": "Python's help topics" if self.text is None else str(self.text),
            "windows": [self.num_windows, self.window_len],
            "calibration": calibration.describe(folder),
        }
        self._write(run, rows)
        return run, rows

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


def in_storages(schemes: Sequence[Scheme], storages: Sequence[KVStorage | None]) -> list[Scheme]:
    """Each scheme with each storage type of keys and values, without duplicates; a float scheme keeps its own."""
    return list(dict.fromkeys(scheme.with_kv(kv) for scheme in schemes for kv in storages))


def show(run: dict[str, Any], rows: Sequence[Row], console: Console) -> None:
    """Print the table and, if measured, the Linears and layers of every scheme."""
    console.print(quality_table(rows, f"{run['device']}, {run['dtype']}"))
    for row in rows:
        if row.linear_errors:
            for table in layer_tables(row):
                console.print(table)
            console.print(layer_verdict(row), highlight=False)
