"""A plan launches what Triton would have launched: the same kernel, for any operands, at a bounded cost.

`launch_all.py` does what needs kernels that are not defined for the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from kernels.epilogue import Epilogue
from kernels.hopper.common import piece_of
from kernels.launching import Descriptor, cdiv, kinds_of, power_of_2

ROOT = Path(__file__).parents[2]
MAX_CALLS = {"rms_norm": 22, "stream": 24, "pingpong": 26}
"""Python functions that may run during one call. Without plans they were 37, 70 and 82."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.launch_all"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_every_launch_is_the_one_that_triton_makes(found: dict[str, Any]) -> None:
    assert found["differences"] == []


def test_a_plan_that_tells_less_apart_fails(found: dict[str, Any]) -> None:
    assert found["blind"] > 0


def test_a_launch_calls_few_python_functions(found: dict[str, Any]) -> None:
    assert set(found["launches"].values()) == {1}
    assert {name: count for name, count in found["calls"].items() if count > MAX_CALLS[name]} == {}


def test_each_device_has_its_own_kernel_and_stream(found: dict[str, Any]) -> None:
    first, second, again, back = found["places"]
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert (again, back) == (second, first)


def test_triton_launches_while_it_is_watched_or_told_to_compile_otherwise(found: dict[str, Any]) -> None:
    ways = found["ways"]
    assert {name for name, is_tritons in ways.items() if not is_tritons} == {
        "nothing",
        "launch_enter_hook HookChain",
        "launch_exit_hook NoneType",
    }
    assert len(ways) == 8


def test_a_forward_pass_is_this_many_launches(found: dict[str, Any]) -> None:
    assert found["model"] == {
        "rms_norm, residual, to int8": 1,
        "quantize_rows": 1,
        "int8_linear, stream": 1,
        "int8_linear, swapped": 1,
        "int8_linear, plain": 1,
        "int8_linear, pingpong": 1,
        "int8_gated_linear, to int8": 2,
        "rotary_attention, decode": 2,
        "rotary_attention, prefill": 4,
        "layer, decode": 9,
        "forward, decode": 32 * 9 + 1,
        "layer, prefill": 11,
        "forward, prefill": 32 * 11 + 1,
    }


# What is told apart


def tensors(dtype: torch.dtype, shift: int) -> torch.Tensor:
    return torch.zeros(64, dtype=dtype)[shift:]


def descriptors(dtype: torch.dtype, rows: int) -> Descriptor:
    return described(torch.zeros((rows, 128), dtype=dtype))


def described(base: torch.Tensor) -> Descriptor:
    return Descriptor(base, piece_of(16, 64, base.dtype))


integers = st.one_of(
    st.integers(-40, 40),
    st.integers(-(2**63), 2**63 - 1),
    st.builds(lambda n, e: 16 * n + e, st.integers(), st.sampled_from((0, 1))),
).filter(lambda n: -(2**63) <= n < 2**63)
scalars = st.one_of(integers, st.floats(), st.none(), st.builds(tensors, st.sampled_from(DTYPES), st.integers(0, 33)))
arguments = st.one_of(
    scalars,
    st.builds(descriptors, st.sampled_from((torch.int8, torch.float16, torch.bfloat16)), st.integers(1, 40)),
    st.builds(Epilogue, *[scalars] * 5),
)


def by_triton(arg: Any) -> Any:
    """What Triton compiles an argument for."""
    arg = arg.checked() if isinstance(arg, Descriptor) else arg
    return native_specialize_impl(make_backend(GPUTarget("cuda", 90, 32)), arg, False, True, True)


def tells_apart(kind: Callable[[Any], Hashable], args: list[Any]) -> bool:
    """Whether no two arguments of one kind are compiled for differently."""
    specializations = defaultdict(set)
    for arg in args:
        specializations[kind(arg)].add(by_triton(arg))
    return all(len(found) == 1 for found in specializations.values())


@given(st.lists(arguments, min_size=8))
def test_two_arguments_of_one_kind_are_compiled_for_alike(args: list[Any]) -> None:
    assert tells_apart(lambda arg: kinds_of([arg]), args)


@pytest.mark.parametrize(
    "pair",
    [
        (1, 2), (16, 17), (0, 1), (2**31 - 1, 2**31), (-(2**31), -(2**31) - 1), (16, 2**40), (1, 1.0), (1, True),
        (0, None), (0, False),
        (tensors(torch.int8, 0), tensors(torch.int8, 1)), (tensors(torch.int8, 0), tensors(torch.int32, 0)),
        (descriptors(torch.float16, 8), descriptors(torch.bfloat16, 8)), (Epilogue(), Epilogue(tensors(torch.int8, 0))),
    ],
    ids=lambda pair: "",
)  # fmt: skip
def test_what_triton_tells_apart_is_of_two_kinds(pair: tuple[Any, Any]) -> None:
    assert by_triton(pair[0]) != by_triton(pair[1])
    assert kinds_of(pair[:1]) != kinds_of(pair[1:])
    assert not tells_apart(lambda _: None, list(pair))


def test_a_matrix_that_cannot_be_copied_is_of_its_own_kind_and_refused() -> None:
    flat = torch.zeros(64 * 144, dtype=torch.int8)
    whole = described(flat[: 64 * 128].view(64, 128))
    whole.checked()
    for base in (flat[1:][: 64 * 128].view(64, 128), flat[: 64 * 136].view(64, 136)[:, :128], flat.view(144, 64).t()):
        other = described(base)
        assert other.kind != whole.kind
        with pytest.raises(AssertionError):
            other.checked()


def test_an_argument_that_no_kernel_takes_is_refused() -> None:
    for arg in ("16", [1], 1j):
        with pytest.raises(TypeError, match="a kernel takes"):
            kinds_of([arg])


@given(st.integers(0, 2**40), st.integers(1, 2**20))
def test_arithmetic(a: int, b: int) -> None:
    assert (cdiv(a, b) - 1) * b < a <= cdiv(a, b) * b
    assert power_of_2(b) // 2 < b <= power_of_2(b)
