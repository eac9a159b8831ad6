"""The fused elementwise ops of one model's layer, with int8 output, and their share of the copy rate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.timing import Call, Roofs, Work, add_ratios, expect, measure, num_copies, result_row
from kernels import CODE_MAX, Quantized, ToInt8, reference
from service.models.config import ModelConfig

BLOCK_SIZE = 64
CHECKED_ROWS = 5

Case = tuple[str, Work, Callable[[], Sequence[Call]]]


def op_rows(shape: str, config: ModelConfig, all_tokens: Iterable[int], roofs: Roofs) -> list[dict[str, Any]]:
    """Time and bytes per second of each op at each number of tokens."""
    device = config.rope.device
    rows = []
    for tokens in all_tokens:
        for op, work, make in _cases(config, tokens, device):
            measured = measure({"w8a8": make}, roofs.floor_s(work), keep=True)["w8a8"]
            fields = {"what": "op", "shape": shape, "op": op, "tokens": tokens, "variant": "w8a8"}
            rows.append(result_row(fields, measured, work, roofs))
            print(f"{op} {tokens}: {rows[-1].get('us_p50', rows[-1])} us", file=sys.stderr, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def gated_rows(shape: str, config: ModelConfig, all_tokens: Iterable[int], roofs: Roofs) -> list[dict[str, Any]]:
    """gate_up, gate and codes for down: the gate in the product's epilogue, and as an op of its own."""
    device, hidden, inner = config.rope.device, config.hidden_size, config.intermediate_size
    weights = [_codes(2 * inner, hidden, device) for _ in range(num_copies(2 * inner * hidden))]
    scale = torch.full((2 * inner,), 3**0.5 / CODE_MAX * hidden**-0.5, device=device)
    rows = []
    for tokens in all_tokens:
        x = kernels.quantize_rows(torch.randn(tokens, hidden, device=device, dtype=torch.float16))
        work = Work(2 * inner * hidden + tokens * (hidden + inner), 4.0 * tokens * inner * hidden, is_int8=True)
        makers = {"apart": partial(_apart, x, weights, scale), "fused": partial(_fused, x, weights, scale)}
        case = []
        for variant, measured in measure(makers, roofs.floor_s(work)).items():
            fields = {"what": "gated", "shape": shape, "op": "gate_up + silu", "tokens": tokens, "variant": variant}
            case.append(result_row(fields, measured, work, roofs))
        add_ratios(case, "apart", "speedup")
        rows += case
    return rows


def _fused(x: Quantized, weights: Sequence[Tensor], scale: Tensor) -> list[Call]:
    y, codes = (kernels.int8_gated_linear(x, weights[0], scale, quantize=to) for to in (None, ToInt8()))
    assert isinstance(y, Tensor)
    some = _some_rows(len(y))
    z = (x.codes[some].double() @ weights[0].double().T * x.scale[some].double()[:, None] * scale).cpu()
    want = z[:, ::2] / (1 + (-z[:, ::2]).exp()) * z[:, 1::2]
    off = (y[some].cpu().double() - want).abs() - 2.0**-10 * want.abs()
    expect((off <= 2.0**-17 * want.abs().max()).all(), "the gated product differs")
    check_codes(codes, kernels.quantize_rows(y), range(len(y)))
    return [partial(kernels.int8_gated_linear, x, weight, scale, quantize=ToInt8()) for weight in weights]


def _apart(x: Quantized, weights: Sequence[Tensor], scale: Tensor) -> list[Call]:
    def run(weight: Tensor) -> Tensor | Quantized:
        return kernels.silu_mul(kernels.int8_linear(x, weight, scale), ToInt8())

    return [partial(run, weight) for weight in weights]


def op_bytes(config: ModelConfig, tokens: int) -> dict[str, int]:
    """Bytes each op reads and writes for float16 in: codes take 1 a value, each row's scale 4."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_size, 2 * config.num_kv_heads * config.head_size
    angles_bytes, place_bytes = 4 * config.rope.shape[1], 8
    return {
        "quantize_rows": tokens * (2 * hidden + hidden + 4),
        "rms_norm": tokens * (2 * hidden + 2 * hidden + 2 * hidden + hidden + 4) + 2 * hidden,
        "silu_mul": tokens * (4 * inner + inner + 4),
        "rope_and_cache": tokens * (4 * (q + kv) + angles_bytes + place_bytes),
    }


def _cases(config: ModelConfig, tokens: int, device: torch.device) -> list[Case]:
    sizes = op_bytes(config, tokens)
    makers = {"quantize_rows": _quantize_rows, "rms_norm": _rms_norm, "silu_mul": _silu_mul, "rope_and_cache": _rope}
    return [
        (op, Work(sizes[op]), partial(make, config, tokens, num_copies(sizes[op]), device))
        for op, make in makers.items()
    ]


def _quantize_rows(config: ModelConfig, tokens: int, copies: int, device: torch.device) -> list[Call]:
    xs = _randn(copies, tokens, config.hidden_size, device)
    some = _some_rows(tokens)
    want = reference.quantize_rows(xs[0][some].cpu())
    check_codes(kernels.quantize_rows(xs[0]), want, some)
    return [partial(kernels.quantize_rows, x) for x in xs]


def _rms_norm(config: ModelConfig, tokens: int, copies: int, device: torch.device) -> list[Call]:
    xs, residuals = (_randn(copies, tokens, config.hidden_size, device) for _ in range(2))
    weight = 1 + 0.1 * torch.randn(config.hidden_size, device=device, dtype=torch.float16)
    eps, some, to_int8 = config.norm_eps, _some_rows(tokens), ToInt8()
    y, h = kernels.rms_norm(xs[0], weight, eps, residuals[0], to_int8)
    want_y, want_h = reference.rms_norm(xs[0][some].cpu(), weight.cpu(), eps, residuals[0][some].cpu(), to_int8)
    expect(torch.equal(h[some].cpu(), want_h), "the sum with the residual differs")
    check_codes(y, want_y, some)
    pairs = zip(xs, residuals, strict=True)
    return [partial(kernels.rms_norm, x, weight, eps, residual, to_int8) for x, residual in pairs]


def _silu_mul(config: ModelConfig, tokens: int, copies: int, device: torch.device) -> list[Call]:
    xs = _randn(copies, tokens, 2 * config.intermediate_size, device)
    some = _some_rows(tokens)
    check_codes(kernels.silu_mul(xs[0], ToInt8()), reference.silu_mul(xs[0][some].cpu(), ToInt8()), some)
    return [partial(kernels.silu_mul, x, ToInt8()) for x in xs]


def _rope(config: ModelConfig, tokens: int, copies: int, device: torch.device) -> list[Call]:
    H, G, D = config.num_heads, config.num_kv_heads, config.head_size
    xs = _randn(copies, tokens, (H + 2 * G) * D, device)
    num_blocks = -(-tokens * copies // BLOCK_SIZE)
    k_cache, v_cache = (torch.zeros(num_blocks, BLOCK_SIZE, G, D, dtype=torch.float16, device=device) for _ in range(2))
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    slots = [positions + i * tokens for i in range(copies)]
    q = kernels.rope_and_cache(xs[0], positions, slots[0], config.rope, k_cache, v_cache, H)
    some = _some_rows(tokens)
    at = torch.tensor(some, dtype=torch.int32)
    want_k, want_v = (torch.zeros(tokens, 1, G, D, dtype=torch.float16) for _ in range(2))
    want_q = reference.rope_and_cache(xs[0][some].cpu(), at, at, config.rope.cpu(), want_k, want_v, H)
    check_close(q[some].cpu(), want_q, "q")
    check_close(k_cache.view(-1, G, D)[some].cpu(), want_k[some, 0], "k_cache")
    check_close(v_cache.view(-1, G, D)[some].cpu(), want_v[some, 0], "v_cache")
    return [
        partial(kernels.rope_and_cache, x, positions, slot, config.rope, k_cache, v_cache, H)
        for x, slot in zip(xs, slots, strict=True)
    ]


def check_codes(got: object, want: object, rows: Sequence[int]) -> None:
    """Compare the named rows of got with want: scales to float32 rounding, codes 1 apart and only at ties.

    Raises:
        WrongResult: they differ by more.
    """
    assert isinstance(got, Quantized)
    assert isinstance(want, Quantized)
    rows = list(rows)
    scale, codes = got.scale[rows].cpu(), got.codes[rows].cpu()
    want = Quantized(want.codes.cpu(), want.scale.cpu())
    expect(((scale - want.scale).abs() <= 2.0**-19 * want.scale).all(), "a scale differs")
    apart = (codes.int() - want.codes.int()).abs()
    expect(int(apart.max()) <= 1, f"codes are {int(apart.max())} apart")
    # Float32 values that differ in their last bits meet a tie of 254 steps this rarely.
    share = (apart > 0).float().mean().item()
    expect(share <= 1e-3, f"{share:.2%} of the codes differ")


def check_close(got: Tensor, want: Tensor, what: str) -> None:
    """Compare float16 values that were computed in float32 and rounded once.

    Raises:
        WrongResult: one is more than a unit in the last place away.
    """
    got, want = got.double(), want.double()
    bound = 2.0**-10 * want.abs() + 2.0**-19 * want.abs().max() + 2.0**-24
    expect(((got - want).abs() <= bound).all(), f"{what} differs")


def _some_rows(tokens: int) -> list[int]:
    """A few rows, the first and the last among them."""
    return sorted({i * (tokens - 1) // (CHECKED_ROWS - 1) for i in range(CHECKED_ROWS)})


def _codes(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randint(-CODE_MAX, CODE_MAX + 1, (rows, columns), dtype=torch.int8, device=device)


def _randn(copies: int, tokens: int, columns: int, device: torch.device) -> list[Tensor]:
    return [torch.randn(tokens, columns, device=device, dtype=torch.float16) for _ in range(copies)]
