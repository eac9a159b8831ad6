"""Operations and bytes of a model's Linears and of its whole step, from its shapes alone, and the time they predict.

Three dataflows are counted: `fp16`; `int8`, whose activations are fp16 between the ops; `dataflow`, whose activations
are int8 between the ops. A multiply-add is two operations of any type. A prediction is a lower bound: each operand
moves once, kernels reach their roof, launches and gaps take no time. Of a model on several GPUs everything is counted
for one of them, and what they exchange over their links.

Source: roofline (Williams, Waterman, Patterson, CACM 52(4), 2009); "How Quantization Works: From a Matrix
Multiplication Perspective" (2024), section Performance analysis, called the table below; ZeroQuant (arXiv 2206.01861);
bandwidth-optimal all-reduce (Patarasuk, Yuan, JPDC 69(2), 2009); tensor parallelism (arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from quant.analysis.gpus import Gpu

Flow = Literal["fp16", "int8", "dataflow"]
Bound = Literal["memory", "compute", "link"]

FLOWS: dict[Flow, str] = {"fp16": "FP16", "int8": "INT8, FP16 I/O", "dataflow": "INT8 dataflow"}

FP16_BYTES, INT8_BYTES = 2, 1
SCALE_BYTES = 2
"""Bytes of one scale, as in the table. ottava's are float32, which adds 2(T + N) bytes to a Linear."""


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of each type and bytes moved, of one kernel or of several.

    link_bytes: received from other GPUs; as many are sent.
    """

    fp16_operations: float
    int8_operations: float
    num_bytes: float
    link_bytes: float = 0

    @property
    def operations(self) -> float:
        """Operations of both types."""
        return self.fp16_operations + self.int8_operations

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.num_bytes

    @property
    def normalized_operations(self) -> float:
        """fp16 + int8 / 2: the table's unit, in which int8 runs at twice the rate and one roof fits both."""
        return self.fp16_operations + self.int8_operations / 2

    def compute_s(self, gpu: Gpu) -> float:
        """fp16 / rate_fp16 + int8 / rate_int8: the operations of a kernel share the cores."""
        return self.fp16_operations / gpu.fp16_per_s + self.int8_operations / gpu.int8_per_s

    def memory_s(self, gpu: Gpu) -> float:
        """Bytes / bandwidth."""
        return self.num_bytes / gpu.bytes_per_s

    def link_s(self, gpu: Gpu) -> float:
        """Link bytes / the link's bandwidth in one direction."""
        return self.link_bytes / gpu.link_bytes_per_s

    def time_s(self, gpu: Gpu) -> float:
        """max(compute_s, memory_s, link_s): the roofline, of one kernel. Source: Williams et al. 2009, figure 1."""
        return max(self.compute_s(gpu), self.memory_s(gpu), self.link_s(gpu))

    def bound(self, gpu: Gpu) -> Bound:
        """Which of these times is largest."""
        if self.link_s(gpu) > max(self.compute_s(gpu), self.memory_s(gpu)):
            return "link"
        return "compute" if self.compute_s(gpu) > self.memory_s(gpu) else "memory"


def fp16_linear(t: int, n: int, k: int) -> Work:
    """Work of y [T, N] = x [T, K] w [N, K]^T, all in fp16.

    operations = 2TNK        bytes = 2(TK + NK + TN)        intensity = 1 / (1/T + 1/N + 1/K)

    Source: the table, column FP16 (its N, C_i, C_o are T, K, N here).
    """
    return Work(2 * t * n * k, 0, FP16_BYTES * (t * k + n * k + t * n))


def int8_linear(t: int, n: int, k: int) -> Work:
    """Work of the same product in int8, x and y in fp16, both roundings fused into it.

    operations = 2TNK in int8 + 2TK (quantize x) + 4TN (two scales per sum) in fp16
    bytes = 2TK + NK + 2TN + 2(T + N)
    intensity, normalized = (1 + 2/N + 4/K) / (1/T + 2/N + 2/K + 2/(TK) + 2/(NK))

    A scale per token needs its whole row first, so a separate quantization moves 2TK bytes more.

    Source: the table, column INT8. It prints 2/T + 1/K for 1/T + 2/K in the intensity: coefficients exchanged.
    """
    num_bytes = FP16_BYTES * t * k + INT8_BYTES * n * k + FP16_BYTES * t * n + SCALE_BYTES * (t + n)
    return Work(2 * t * k + 4 * t * n, 2 * t * n * k, num_bytes)


def dataflow_linear(t: int, n: int, k: int) -> Work:
    """Work of the same product with int8 codes in and out.

    operations = 2TNK in int8 + 4TN (two scales per sum) + 2TN (quantize y for the next op) in fp16
    bytes = TK + NK + TN + 2(T + N)

    Ottava writes gate_up so, and fp16 for what is read as float: qkv for attention, o and down for the residual.

    Source: ZeroQuant (arXiv 2206.01861), section 4.3; bytes as the article's section on ZeroQuant has them.
    """
    num_bytes = INT8_BYTES * (t * k + n * k + t * n) + SCALE_BYTES * (t + n)
    return Work(4 * t * n + 2 * t * n, 2 * t * n * k, num_bytes)


_LINEARS: dict[Flow, Callable[[int, int, int], Work]] = {
    "fp16": fp16_linear,
    "int8": int8_linear,
    "dataflow": dataflow_linear,
}


def linear_work(flow: Flow, t: int, n: int, k: int) -> Work:
    """Work of one Linear under a dataflow."""
    return _LINEARS[flow](t, n, k)


def crossover_tokens(flow: Flow, n: int, k: int, gpu: Gpu) -> float:
    """Number of tokens above which a Linear is bound by operations; infinite if it never is.

    Both times are linear in T: compute = aT, memory = b + cT, so T* = b / (a - c).
    """
    none, one = linear_work(flow, 0, n, k), linear_work(flow, 1, n, k)
    per_token_s = one.compute_s(gpu) - (one.memory_s(gpu) - none.memory_s(gpu))
    return none.memory_s(gpu) / per_token_s if per_token_s > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder of the Llama family."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of a layer's Linears as they run: q, k and v as one, gate and up as one."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "qkv": ((self.num_heads + 2 * self.num_kv_heads) * self.head_size, hidden),
            "o": (hidden, self.num_heads * self.head_size),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }

    def part(self, num_gpus: int) -> ModelShape:
        """What one of several GPUs computes: its heads, columns of the MLP and tokens of the vocabulary.

        Raises:
            ValueError: num_gpus does not divide heads, key and value heads or columns of the MLP.
        """
        for count in (self.num_heads, self.num_kv_heads, self.intermediate_size):
            if count % num_gpus:
                raise ValueError(f"{num_gpus} GPUs do not divide {count}")
        return replace(
            self,
            intermediate_size=self.intermediate_size // num_gpus,
            num_heads=self.num_heads // num_gpus,
            num_kv_heads=self.num_kv_heads // num_gpus,
            vocab_size=-(-self.vocab_size // num_gpus),
        )


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152),
        ModelShape("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, 152064),
        ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        ModelShape("llama-2-13b", 40, 5120, 13824, 40, 40, 128, 32000),
        ModelShape("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128, 128256),
    )
}


@dataclass(frozen=True, slots=True)
class StepShape:
    """The size of one forward pass.

    tokens: rows of the batch.
    context: tokens in the cache of each request that decodes, or the longest prompt.
    is_prefill: whole prompts with an empty cache; otherwise each token is of another request that decodes.
    """

    tokens: int
    context: int
    is_prefill: bool

    @property
    def prompt_len(self) -> int:
        return min(self.context, self.tokens) if self.is_prefill else 1

    @property
    def num_requests(self) -> int:
        return -(-self.tokens // self.prompt_len)

    def describe(self) -> str:
        """The step in words."""
        requests = f"{self.num_requests} {'prompt' if self.is_prefill else 'request'}{'s' * (self.num_requests > 1)}"
        if self.is_prefill:
            return f"{requests} of {self.prompt_len} tokens"
        return f"{requests} decoding, {self.context} tokens in the cache{' of each' * (self.num_requests > 1)}"


def attention_work(flow: Flow, shape: ModelShape, step: StepShape) -> Work:
    """Work of one layer's attention over an fp16 cache.

    operations = 4HD x pairs, pairs = T(C + 1) in decode, T(P + 1)/2 in prefill of prompts of P
    bytes = 2GD x 2 slots + 2THD + out, slots = T(C + 1) or T: each key and value once; out is fp16 or int8 codes
    """
    width = shape.num_heads * shape.head_size
    seen = step.tokens * (step.context + 1)
    pairs = step.tokens * (step.prompt_len + 1) / 2 if step.is_prefill else seen
    slots = step.tokens if step.is_prefill else seen
    cache = 2 * shape.num_kv_heads * shape.head_size * slots
    out = _activation_bytes(flow) * step.tokens * width
    return Work(4 * width * pairs, 0, FP16_BYTES * (cache + step.tokens * width) + out)


def elementwise_work(flow: Flow, shape: ModelShape, tokens: int) -> Work:
    """Work of one layer's two (add +) norms, rope with the write of k and v, and SiLU(gate) * up.

    bytes = 2T hidden (2e + 4) + T(H + 2G)D(e + 2) + 3eTI, e bytes per activation: 2 in fp16, 1 in int8
    The residual, q, k and v are fp16. Operations are not counted: they are a few per byte, the ridge is at hundreds.
    """
    e = _activation_bytes(flow)
    norms = 2 * tokens * shape.hidden_size * (2 * e + 2 * FP16_BYTES)
    rope = tokens * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size * (e + FP16_BYTES)
    return Work(0, 0, norms + rope + 3 * e * tokens * shape.intermediate_size)


def all_reduce_work(num_gpus: int, tokens: int, width: int) -> Work:
    """Work of one GPU in adding up all GPUs' fp16 [T, width].

    link bytes = 2 (n - 1) / n x 2T width: all parts of its share of the sum, then the shares of the others. No way of
    adding receives less (Patarasuk, Yuan 2009); where all read all, faster for few tokens, it is n / 2 times that.
    bytes = 4T width: its own summand and the sum
    """
    size = FP16_BYTES * tokens * width
    return Work(0, 0, 2 * size, 2 * (num_gpus - 1) / num_gpus * size)


def gather_work(num_gpus: int, rows: int, width: int) -> Work:
    """Work of one GPU in putting together the GPUs' fp16 [R, width] to [R, n width].

    link bytes = (n - 1) 2R width        bytes = 2 (n + 1) R width
    """
    size = FP16_BYTES * rows * width
    return Work(0, 0, (num_gpus + 1) * size, (num_gpus - 1) * size)


def _activation_bytes(flow: Flow) -> int:
    return INT8_BYTES if flow == "dataflow" else FP16_BYTES


@dataclass(frozen=True, slots=True)
class Part:
    """One kernel of a step and how often it runs. size: (N, K) of a Linear."""

    name: str
    work: Work
    count: int
    size: tuple[int, int] | None = None


def step_parts(flow: Flow, whole: ModelShape, step: StepShape, num_gpus: int = 1) -> Iterator[Part]:
    """Every kernel of a step on one of the GPUs: Linears, attention and elementwise ops of each layer, and the head.

    With several, two sums a layer and the embedding's, and the logits that are put together.
    """
    shape, layers = whole.part(num_gpus), whole.num_layers
    for name, (n, k) in shape.linears().items():
        yield Part(name, linear_work(flow, step.tokens, n, k), layers, (n, k))
    yield Part("attention", attention_work(flow, shape, step), layers)
    yield Part("elementwise", elementwise_work(flow, shape, step.tokens), layers)
    # Only the last row of a prompt needs logits.
    size = shape.vocab_size, shape.hidden_size
    yield Part("head", fp16_linear(step.num_requests, *size), 1, size)
    if num_gpus > 1:
        yield Part("all_reduce", all_reduce_work(num_gpus, step.tokens, shape.hidden_size), 2 * layers + 1)
        yield Part("gather", gather_work(num_gpus, step.num_requests, shape.vocab_size), 1)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A row of the result: one call of a part, or the whole step, whose time is the sum over its kernels.

    speedup: time in fp16 / time_s.
    """

    tokens: int
    part: str
    flow: Flow
    count: int
    size: tuple[int, int] | None
    work: Work
    bound: Bound
    time_s: float
    speedup: float


def predict(shape: ModelShape, step: StepShape, gpu: Gpu, num_gpus: int = 1) -> list[Prediction]:
    """Every part under every dataflow, part by part, then the whole step; of one of the GPUs."""
    flows = {flow: [*step_parts(flow, shape, step, num_gpus)] for flow in FLOWS}
    rows = []
    for index in range(len(flows["fp16"])):
        base_s = flows["fp16"][index].work.time_s(gpu)
        for flow, parts in flows.items():
            part = parts[index]
            time_s = part.work.time_s(gpu)
            fields = step.tokens, part.name, flow, part.count, part.size, part.work
            rows.append(Prediction(*fields, part.work.bound(gpu), time_s, base_s / time_s))
    base_s = _total(flows["fp16"], "fp16", step, gpu, base_s=None).time_s
    return rows + [_total(parts, flow, step, gpu, base_s=base_s) for flow, parts in flows.items()]


def _total(parts: list[Part], flow: Flow, step: StepShape, gpu: Gpu, *, base_s: float | None) -> Prediction:
    """The whole step; it is bound by what bounds kernels of most of its time."""
    work = Work(
        sum(part.count * part.work.fp16_operations for part in parts),
        sum(part.count * part.work.int8_operations for part in parts),
        sum(part.count * part.work.num_bytes for part in parts),
        sum(part.count * part.work.link_bytes for part in parts),
    )
    time_s = sum(part.count * part.work.time_s(gpu) for part in parts)
    bounds: dict[Bound, float] = {"memory": 0.0, "compute": 0.0, "link": 0.0}
    for part in parts:
        bounds[part.work.bound(gpu)] += part.count * part.work.time_s(gpu)
    bound = max(bounds, key=lambda name: bounds[name])
    return Prediction(step.tokens, "step", flow, 1, None, work, bound, time_s, (base_s or time_s) / time_s)
