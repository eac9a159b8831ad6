"""The roofline of a loaded model for a step of one token: bytes that it must read, and the best speedup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quant.analysis.gpus import GPUS, Gpu
from quant.analysis.roofline import Work
from quant.linear import Int8Linear
from service.engine.api import OneToken
from service.models.decoder import Decoder, Layer
from service.models.mlp import Experts
from service.models.weights import Linear

# Keyed by the driver's name of the board, because boards with the same chip may have different memory.
BOARDS = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}


def step_work(decoder: Decoder) -> Work:
    """Operations and weight bytes of a step of one token: every Linear, the head, and only the experts it visits."""
    linears = [linear for layer in decoder.layers for linear in _visited(layer)] + [decoder.head]
    in_int8 = sum(_operations(linear) for linear in linears if isinstance(linear, Int8Linear))
    in_float = sum(_operations(linear) for linear in linears) - in_int8
    return Work(in_float, in_int8, sum(linear.weight_bytes for linear in linears))


def describe_one_token(decoders: Mapping[str, Decoder], baseline: str, device: str) -> OneToken:
    """Weight bytes of each variant, the speedup that they allow on this device, and a sentence with both."""
    work = {name: step_work(decoder) for name, decoder in decoders.items()}
    gpu = GPUS.get(BOARDS.get(device, ""))
    slow = work.get(baseline)
    speedups = {} if slow is None else {n: _speedup(slow, own, gpu) for n, own in work.items() if n != baseline}
    said = " and ".join(f"{_megabytes(own)} MB in {name}" for name, own in work.items())
    roofs = [_roof(name, ratio, work[name], slow, gpu) for name, ratio in speedups.items() if gpu and slow and ratio]
    return OneToken(
        weight_bytes={name: round(own.num_bytes) for name, own in work.items()},
        speedup_at_best=speedups,
        text=" ".join([f"For one token, a step reads weights of {said}.", *roofs]),
    )


def _visited(layer: Layer) -> Iterator[Linear]:
    yield from layer.attention.linears
    if isinstance(layer.mlp, Experts):
        # All experts of a layer have the same size, so the first ones stand for those that a token visits.
        yield layer.mlp.router
        for expert in layer.mlp.experts[: layer.mlp.per_token]:
            yield from expert.linears
    else:
        yield from layer.mlp.linears


def _operations(linear: Linear) -> int:
    n, k = linear.shape
    return 2 * n * k


def _speedup(baseline: Work, own: Work, gpu: Gpu | None) -> float | None:
    if gpu is None or {baseline.bound(gpu), own.bound(gpu)} != {"memory"}:
        return None
    return baseline.time_s(gpu) / own.time_s(gpu)


def _roof(name: str, ratio: float, own: Work, slow: Work, gpu: Gpu) -> str:
    times = f"{own.time_s(gpu) * 1e3:.3g} ms instead of {slow.time_s(gpu) * 1e3:.3g}"
    bandwidth = f"{gpu.bytes_per_s / 1e12:.3g} TB/s"
    return f"At this device's {bandwidth} that makes {name} at best {ratio:.2f} times as fast: {times}."


def _megabytes(work: Work) -> str:
    return f"{work.num_bytes / 1e6:,.0f}" if work.num_bytes >= 1e8 else f"{work.num_bytes / 1e6:.3g}"
