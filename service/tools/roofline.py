"""`ottava roofline`: a GPU's best possible times for a model, next to measured ones, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from rich.box import SIMPLE_HEAD
from rich.table import Table

from quant.analysis.gpus import GPUS, Gpu
from quant.analysis.roofline import FLOWS, SHAPES, Flow, ModelShape, Prediction, StepShape, crossover_tokens, predict
from quant.errors import UnknownBandwidth
from service.errors import InvalidSettings, ModelNotFound, UnsupportedModel, first_line
from service.models.config import ModelConfig

MEASURED_AS: dict[str, Flow] = {"fp16": "fp16", "torchao": "int8", "w8a8": "dataflow"}
"""Benchmark variant -> dataflow. torchao's time of a Linear includes quantizing its input."""

PARTS_IN_TABLE = ("qkv", "o", "gate_up", "down", "all_reduce", "step")
HEADINGS = ("GOP", "MB", "op/byte", "bound", "us", "speed-up")
MEASURED_HEADINGS = ("measured us", "speed-up")

Key = tuple[str, int, Flow]
"""(Linear as "NxK", tokens, dataflow), or ("step", ...)."""


@dataclass(frozen=True, slots=True)
class Report:
    """Predictions of one model on each of num_gpus GPUs. measured: microseconds by `Key`, from given results."""

    shape: ModelShape
    gpu: Gpu
    steps: Sequence[StepShape]
    measured: dict[Key, float] = field(default_factory=dict)
    num_gpus: int = 1

    def predicted(self, step: StepShape) -> list[Prediction]:
        """`predict` of a step."""
        return predict(self.shape, step, self.gpu, self.num_gpus)

    def rows(self) -> Iterator[dict[str, Any]]:
        """JSON rows of every part under every dataflow, step by step."""
        for step in self.steps:
            for row in self.predicted(step):
                n, k = row.size or (None, None)
                found = {"tokens": row.tokens, "part": row.part, "n": n, "k": k, "calls": row.count, "flow": row.flow}
                found |= {"operations": row.work.operations, "bytes": row.work.num_bytes}
                found |= {"link_bytes": row.work.link_bytes}
                found |= {"normalized_operations": row.work.normalized_operations, "intensity": row.work.intensity}
                found |= {"bound": row.bound, "us": 1e6 * row.time_s, "speedup": row.speedup}
                us, speedup = self.measured_of(row)
                yield found | ({} if us is None else {"measured_us": us, "measured_speedup": speedup})

    def measured_of(self, row: Prediction) -> tuple[float | None, float | None]:
        """The measured microseconds of a row, and the measured speedup over fp16; None if not measured."""
        name = row.part if row.size is None else f"{row.size[0]}x{row.size[1]}"
        us, base = (self.measured.get((name, row.tokens, flow)) for flow in (row.flow, "fp16"))
        return us, base / us if us and base else None

    def as_json(self) -> str:
        """A JSON object of the model, the GPU's roofs, the steps and the rows."""
        steps = [asdict(step) | {"num_requests": step.num_requests} for step in self.steps]
        found = {"model": asdict(self.shape), "gpu": asdict(self.gpu), "num_gpus": self.num_gpus, "steps": steps}
        found["rows"] = [*self.rows()]
        return json.dumps(found, indent=1) + "\n"


def find_shape(name: str) -> ModelShape:
    """The sizes of a known model, a folder with a config.json, or a Hugging Face id, whose config is downloaded.

    Raises:
        ModelNotFound: name is none of these.
        UnsupportedModel: the family is not served, or its MLP is not gated or has experts.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name in SHAPES:
            return SHAPES[name]
        folder = _fetch_config(name)
    config = ModelConfig.load(folder)
    if not config.layout.is_gated or config.experts is not None:
        raise UnsupportedModel(
            f"the roofline of family {config.family!r} is not served: it counts one gated MLP a layer; "
            "take a model without experts whose MLP is gated"
        )
    return ModelShape(
        name,
        config.num_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_size,
        config.vocab_size,
    )


def _fetch_config(name: str) -> Path:
    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"{name} is neither a folder nor one of {', '.join(SHAPES)} nor a model whose config.json can be fetched "
            f"({first_line(error)})"
        ) from error


def refuse_uneven(shape: ModelShape, num_gpus: int) -> None:
    """Raise InvalidSettings if a model cannot be divided evenly among so many GPUs."""
    try:
        shape.part(num_gpus)
    except ValueError as error:
        raise InvalidSettings(
            f"gpus {num_gpus} does not divide {shape.name} with {shape.num_heads} heads, {shape.num_kv_heads} key and "
            f"value heads and {shape.intermediate_size} columns of its MLP; take a number that divides all three"
        ) from error


def find_gpu(name: str, bandwidth: str, link: str = "data-sheet") -> Gpu:
    """A GPU of the table, with the given bandwidths of its memory and its links.

    Raises:
        InvalidSettings: the GPU is not in the table, or a bandwidth is unknown.
    """
    if name not in GPUS:
        raise InvalidSettings(f"gpu {name!r} is not known; choose one of {', '.join(GPUS)}")
    try:
        return GPUS[name].with_bandwidth(bandwidth).with_link(link)
    except UnknownBandwidth as error:
        raise InvalidSettings(str(error)) from error


def read_steps(tokens: str, context: int, max_num_requests: int) -> list[StepShape]:
    """The steps of a list such as "1,16,4096" tokens: decode steps up to max_num_requests, prefill steps above.

    Raises:
        InvalidSettings: tokens is not a list of positive integers.
    """
    words = [word.strip() for word in tokens.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InvalidSettings(f"tokens {tokens!r} is not a list of positive numbers such as 1,16,256,4096")
    return [StepShape(t, context, is_prefill=t > max_num_requests) for t in sorted({int(word) for word in words})]


def read_measured(
    paths: Sequence[Path], shape: ModelShape, gpu: Gpu, steps: Sequence[StepShape], num_gpus: int = 1
) -> dict[Key, float]:
    """The times in results of `benchmarks.kernels` and `benchmarks.serving` for these steps.

    Linears are matched by size and tokens; steps by batch, prompt, number of GPUs and the model in the command. A
    measured decode step reads half an answer more than its prompt.

    Raises:
        InvalidSettings: a file is not such a result, or was measured on another GPU.
    """
    found: dict[Key, float] = {}
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            run = result["run"]
            _refuse_other_gpu(path, run["device"], gpu)
            is_this_model = f"--shape {shape.name} " in f"{run['command']} "
            found |= _linear_times(result["rows"])
            if is_this_model and run.get("tensor parallel", 1) == num_gpus:
                found |= _step_times(result["rows"], steps)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidSettings(
                f"{path} is not a result of benchmarks.kernels or benchmarks.serving: {error!r}"
            ) from (error)
    return found


def _refuse_other_gpu(path: Path, device: str, gpu: Gpu) -> None:
    if gpu.name not in device.lower().replace(" ", ""):
        raise InvalidSettings(f"{path} was measured on {device}, and {gpu.name} is predicted; name its GPU with --gpu")


def _linear_times(rows: list[dict[str, Any]]) -> dict[Key, float]:
    return {
        (f"{row['n']}x{row['k']}", row["tokens"], MEASURED_AS[row["variant"]]): row["us_p50"]
        for row in rows
        if row["what"] == "linear" and row["variant"] in MEASURED_AS and "us_p50" in row
    }


def _step_times(rows: list[dict[str, Any]], steps: Sequence[StepShape]) -> dict[Key, float]:
    found: dict[Key, float] = {}
    for row in rows:
        if row["what"] not in ("decode", "prefill") or row["variant"] not in MEASURED_AS:
            continue
        for step in steps:
            if step.is_prefill != (row["what"] == "prefill") or step.context != row["prompt"]:
                continue
            key = "step", step.tokens, MEASURED_AS[row["variant"]]
            if step.is_prefill:
                # A rate over many steps, applied to a step of any size.
                found[key] = 1e6 * step.tokens / row["tokens_per_s"]
            elif step.tokens == row["batch"]:
                found[key] = 1e3 * row["itl_ms_p50"]
    return found


def tables(report: Report) -> Iterator[Table]:
    """One table per step: its Linears, then the whole step."""
    for step in report.steps:
        rows = [row for row in report.predicted(step) if row.part in PARTS_IN_TABLE]
        is_measured = any(report.measured_of(row)[0] is not None for row in rows)
        title = f"{step.tokens} token{'s' * (step.tokens > 1)}: {step.describe()}"
        title += f"; each of {report.num_gpus} GPUs" if report.num_gpus > 1 else ""
        headings = [*HEADINGS[:2], *(["link MB"] if report.num_gpus > 1 else []), *HEADINGS[2:]]
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("part")
        table.add_column("dataflow")
        for heading in [*headings, *(MEASURED_HEADINGS if is_measured else [])]:
            table.add_column(heading, justify="right")
        for row in rows:
            cells = [_short(row.work.operations / 1e9), _short(row.work.num_bytes / 1e6)]
            cells += [_short(row.work.link_bytes / 1e6)] if report.num_gpus > 1 else []
            cells += [_short(row.work.intensity), row.bound, _short(1e6 * row.time_s), f"{row.speedup:.2f}"]
            us, speedup = report.measured_of(row)
            if is_measured:
                cells += ["" if us is None else _short(us), "" if speedup is None else f"{speedup:.2f}"]
            table.add_row(_label(row), FLOWS[row.flow], *cells, end_section=row.flow == "dataflow")
        yield table


def _label(row: Prediction) -> str:
    """The first column: a part's name in its fp16 row, NxK in its int8 row, else empty."""
    size = "" if row.size is None else f"{row.size[0]}x{row.size[1]}"
    return {"fp16": row.part, "int8": size}.get(row.flow, "")


def _short(value: float) -> str:
    """Four significant digits, or all digits of a larger integer part."""
    return f"{value:.{max(0, 4 - len(str(int(value))))}f}"


def summary(report: Report) -> str:
    """A paragraph on where INT8 is faster, and where the Linears become compute-bound."""
    turns = {flow: _crossovers(report, flow) for flow in FLOWS}
    predicted = [report.predicted(step) for step in report.steps]
    said = ", ".join(f"{rows[-1].speedup:.2f}x at {rows[-1].tokens}" for rows in predicted)
    least = min(predicted, key=lambda rows: rows[-1].speedup)
    # A step's last rows are its totals: fp16, int8, dataflow.
    worst = max(predicted, key=lambda rows: rows[-2].time_s / rows[-1].time_s)
    where = f"least at {least[-1].tokens}, where" if len(predicted) > 1 else "there"
    return (
        f"INT8 dataflow against FP16: {said} tokens; {where} attention and the head, FP16 in every dataflow, take "
        f"{_float_share(least):.0%} of its step. FP16 activations between the ops make the "
        f"INT8 step up to {worst[-2].time_s / worst[-1].time_s - 1:.0%} longer (at {worst[-1].tokens}). The Linears "
        f"turn from memory- to compute-bound at {turns['fp16']} tokens in FP16, {turns['int8']} in INT8 with FP16 "
        f"I/O, {turns['dataflow']} in the INT8 dataflow." + _of_links(report, predicted)
    )


def _of_links(report: Report, predicted: list[list[Prediction]]) -> str:
    """What exchanges between GPUs take of each step; nothing on one."""
    if report.num_gpus == 1:
        return ""
    shares = (
        sum(
            row.count * row.time_s
            for row in rows
            if row.flow == "dataflow" and row.work.link_bytes and row.part != "step"
        )
        / rows[-1].time_s
        for rows in predicted
    )
    said = ", ".join(f"{share:.0%} at {step.tokens}" for share, step in zip(shares, report.steps, strict=True))
    return (
        f" Sums over {report.num_gpus} GPUs, in FP16 at {report.gpu.link_bytes_per_s / 1e9:.0f} GB/s a direction, and "
        f"the gathered logits take {said} tokens of the INT8 dataflow's step; the latency of each, microseconds, comes "
        "on top."
    )


def _crossovers(report: Report, flow: Flow) -> str:
    """The range of tokens at which the Linears become compute-bound."""
    linears = report.shape.part(report.num_gpus).linears().values()
    ends = sorted(crossover_tokens(flow, n, k, report.gpu) for n, k in linears)
    return _between(ends[0], ends[-1])


def _between(low: float, high: float) -> str:
    return " to ".join(dict.fromkeys("no number of" if end == float("inf") else f"{end:.0f}" for end in (low, high)))


def _float_share(rows: list[Prediction]) -> float:
    """The share of attention and head in a step's time in the INT8 dataflow."""
    ours = [row for row in rows if row.flow == "dataflow"]
    return sum(row.count * row.time_s for row in ours if row.part in ("attention", "head")) / ours[-1].time_s
