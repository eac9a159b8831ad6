"""Every op captured in one CUDA graph and replayed on other inputs: no wrapper waits for the device."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels.quantized import ToInt8
from tests.support.kernel_checks import codes_of, floats_of

pytestmark = pytest.mark.gpu

T, H, G, D, F = 8, 8, 2, 64, 1536


class Layer:
    """A decoder layer's ops over one set of input buffers, a decode step of T requests."""

    def __init__(self) -> None:
        K = H * D
        make = torch.Generator("cuda").manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=make, device="cuda")

        self.x, self.norm = randn(T, K).half(), randn(K).half()
        self.weights = [
            (torch.randint(-127, 128, (n, k), generator=make, device="cuda", dtype=torch.int8), randn(n).abs() / 1000)
            for n, k in (((H + 2 * G) * D, K), (K, K), (2 * F, K), (K, F))
        ]
        self.k, self.v = torch.zeros(2, 2 * T, 16, G, D, device="cuda", dtype=torch.float16)
        self.cos_sin = randn(512, D)
        self.tables = torch.arange(2 * T, dtype=torch.int32, device="cuda").view(T, 2)
        self.lens = torch.arange(1, T + 1, dtype=torch.int32, device="cuda")
        self.starts = torch.arange(T + 1, dtype=torch.int32, device="cuda")

    def run(self) -> torch.Tensor:
        qkv, out, gate_up, down = self.weights
        x, h = kernels.rms_norm(self.x, self.norm, 1e-5, None, ToInt8())
        slots = self.tables[:, 0] * 16 + self.lens - 1
        q = kernels.rope_and_cache(
            kernels.int8_linear(codes_of(x), *qkv), self.lens, slots, self.cos_sin, self.k, self.v, H
        )
        y = kernels.paged_attention(q, self.k, self.v, self.tables, self.starts, self.lens, True, D**-0.5)
        attended = kernels.int8_linear(kernels.quantize_rows(floats_of(y)), *out)
        x, h = kernels.rms_norm(attended, self.norm, 1e-5, h, ToInt8())
        x = kernels.silu_mul(kernels.int8_linear(codes_of(x), *gate_up), ToInt8())
        y, _ = kernels.layer_norm(kernels.int8_linear(codes_of(x), *down, residual=h), self.norm, None, 1e-5)
        y = kernels.gelu(floats_of(kernels.relu(floats_of(y))))
        return kernels.int8_linear(kernels.quantize_tensor(floats_of(y)), *out)


def test_replay_equals_eager() -> None:
    layer = Layer()
    layer.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.run()
    layer.x.mul_(-0.5)
    layer.lens.add_(3)
    cache = layer.k.clone(), layer.v.clone()
    graph.replay()
    replayed = captured.clone()
    layer.k.copy_(cache[0])
    layer.v.copy_(cache[1])
    assert torch.equal(layer.run(), replayed)
    assert replayed.isfinite().all()
