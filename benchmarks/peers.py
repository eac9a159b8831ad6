"""Other projects' W8A8 Linears, where they are installed: torchao's, compiled, and gemlite's.

Both take float activations and quantize them inside, which their times include. gemlite asks for the GPU when it is
imported, so this module does too where gemlite is installed.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import Call, Unsupported, expect, first_line

WARM_UP_S = 40.0
"""What a peer may spend on compiling and tuning in one run; the sizes after that are left out and say so."""

FEW_ROWS = 16
"""torch._int_mm, on which torchao's Linear stands, takes more rows on CUDA: a failure here is not tried again."""

MAX_ERROR = 0.05
"""Of the norm, against the float product: two int8 roundings of normal values come to 0.013."""

Build = Callable[[Sequence[Tensor]], list[Callable[[Tensor], object]]]


def _load(module: str) -> ModuleType | str:
    """The module, or why it is not here. Without a GPU gemlite raises torch's error about that."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, AssertionError) as error:
        return first_line(error)


TORCHAO = _load("torchao.quantization")
GEMLITE = _load("gemlite.helper")
PEERS = ("torchao", "gemlite")


def _torchao(weights: Sequence[Tensor]) -> list[Callable[[Tensor], object]]:
    """torchao's int8 dynamic Linear under torch.compile, as its documentation uses it; eager it copies the weight."""
    assert not isinstance(TORCHAO, str)
    torch._dynamo.reset()
    run = torch.compile(F.linear)
    config = TORCHAO.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    linears: list[Callable[[Tensor], object]] = []
    for weight in weights:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        TORCHAO.quantize_(linear, config)
        linears.append(partial(_apply, run, linear.weight))
    return linears


def _apply(run: Callable[[Tensor, Tensor], object], weight: Tensor, x: Tensor) -> object:
    return run(x, weight)


def _gemlite(weights: Sequence[Tensor]) -> list[Callable[[Tensor], object]]:
    """gemlite's A8W8: a token-wise quantization kernel, then its Triton GEMM with the tiles it ships or tunes."""
    assert not isinstance(GEMLITE, str)
    processor = GEMLITE.A8W8_int8_dynamic(device="cuda")
    return [processor.from_weights(weight) for weight in weights]


class Peer:
    """One project's Linear over the weights of one layer at a time.

    Args:
        build: weights [N, K] float16 -> one Linear each.
        missing: why the project is not here, or None.
    """

    def __init__(self, build: Build, missing: str | None) -> None:
        self.missing = missing
        self.spent_s = 0.0
        self._few_rows_failed = ""
        self._build = build
        self._weights: Sequence[Tensor] = ()
        self._linears: list[Callable[[Tensor], object]] = []

    def calls(self, weights: Sequence[Tensor], x: Tensor) -> list[Call]:
        """One call per weight, warmed up and checked against the float product.

        Raises:
            Unsupported: the project is not here, or has spent its time.
            WrongResult: its product is not the float one within two int8 roundings.
        """
        if self.missing is not None:
            raise Unsupported(self.missing)
        if self.spent_s > WARM_UP_S:
            raise Unsupported(f"its compiling and tuning took {self.spent_s:.0f} s; the rest is left out")
        if len(x) <= FEW_ROWS and self._few_rows_failed:
            raise Unsupported(self._few_rows_failed)
        started = time.perf_counter()
        try:
            y = self._warm_up(weights, x)
        except Exception as error:
            if len(x) <= FEW_ROWS:
                self._few_rows_failed = first_line(error)
            raise
        finally:
            self.spent_s += time.perf_counter() - started
        rows = slice(0, 128)
        want = x[rows].float() @ weights[0].float().T
        share = ((y[rows].float() - want).norm() / want.norm()).item()
        expect(share <= MAX_ERROR, f"off the float product by {share:.3g} of its norm")
        return [partial(linear, x) for linear in self._linears]

    def _warm_up(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        """The first weight's product, after building the layer's Linears and compiling what they need."""
        if self._weights is not weights:
            self.release()
            self._linears = self._build(weights)
            self._weights = weights
        y = self._linears[0](x)
        assert isinstance(y, Tensor)
        if y.is_cuda:
            torch.cuda.synchronize()
        return y

    def release(self) -> None:
        """Let go of the layer's weights."""
        self._weights, self._linears = (), []


def peers(names: Sequence[str]) -> dict[str, Peer]:
    """The peers of these names, those that are not here included."""
    loaded: list[tuple[str, Build, ModuleType | str]] = [
        ("torchao", _torchao, TORCHAO),
        ("gemlite", _gemlite, GEMLITE),
    ]
    return {
        name: Peer(build, module if isinstance(module, str) else None)
        for name, build, module in loaded
        if name in names
    }
