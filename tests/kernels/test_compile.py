"""Every kernel compiles for every architecture, on the tensor cores meant for it, without spilling a register.

`compile_all.py` does the work in a process of its own, since here the kernels may be defined for the interpreter. What
it takes for doubles is left to `make compile`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from kernels.tiles import Target, decode_tile, prefill_tile

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 89, 90, 100, 120)
# Shared memory of one block, bytes: CUDA C++ programming guide, table of technical specifications.
# All kernels are compiled for five architectures, which takes minutes on one core, and longer on a busy one.
pytestmark = pytest.mark.timeout(1800)

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
INT8_MMA = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
LINEARS_OF_HOPPER = {"_int8_linear_cooperative_kernel", "_int8_linear_pingpong_kernel", "_int8_linear_stream_kernel"}
HOPPERS_OWN = LINEARS_OF_HOPPER | {"_decode_on_hopper_kernel", "_prefill_on_hopper_kernel"}
GEMMS = ("_int8_linear_kernel", "_int8_linear_swapped_kernel", "_int8_group_linear_kernel")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One record per kernel, launch options and architecture."""
    command = [sys.executable, str(ROOT / "tests/support/compile_all.py"), "--without-doubles"]
    cache = str(tmp_path_factory.mktemp("cache"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": cache}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    records: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return records


def instructions(built: list[dict[str, Any]], capability: int, kernel: str, having: str = "") -> set[str]:
    """The matrix instructions in all records of a kernel on an architecture."""
    chosen = [r for r in built if (r["capability"], r["kernel"]) == (capability, kernel) and having in r["case"]]
    assert chosen, f"{kernel} {having} was not compiled for sm_{capability}"
    assert all(r["matrix"] for r in chosen), [r["case"] for r in chosen if not r["matrix"]]
    return {name for r in chosen for name in r["matrix"]}


def test_every_kernel_was_compiled_for_every_architecture(built: list[dict[str, Any]]) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "kernels").rglob("*.py"))
    defined = {line.split("(")[0].removeprefix("def ") for line in sources.splitlines() if line.startswith("def _")}
    defined = {name for name in defined if name.endswith("_kernel")}
    for capability in ARCHITECTURES:
        known = defined if capability == 90 else defined - HOPPERS_OWN
        assert {r["kernel"] for r in built if r["capability"] == capability} == known


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_no_head_size_cache_or_tile_of_attention_is_left_out(built: list[dict[str, Any]], capability: int) -> None:
    gpu, caches = Target("untuned", capability, num_sms=100), (2, 1)
    for kernel, choose in (("_paged_attention_kernel", prefill_tile), ("_paged_decode_kernel", decode_tile)):
        cases = [r["case"] for r in built if (r["capability"], r["kernel"]) == (capability, kernel)]
        whole = [case for case in cases if "DEQUANTIZED=True" not in case]
        found = {(int(re.findall(r" D=(\d+)", case)[0]), 1 if "k_scale_ptr" in case else 2) for case in whole}
        # Over floats 96 has the tile of 128, and no more registers.
        assert found >= set(product((64, 96, 128, 256), caches)) - {(96, 2)}
        for block_d, (num_bytes, cache) in product((64, 128, 256), ((2, 2), (2, 1), (4, 1))):
            if num_bytes == 4 and block_d != 128:
                continue
            tile = choose(gpu, block_d, num_bytes, cache)
            shown = f"BLOCK_N={tile.block_n} num_warps={tile.num_warps} num_stages={tile.num_stages}"
            fitting = [case for case in whole if f"BLOCK_D={block_d}" in case and shown in case]
            assert [case for case in fitting if ("k_scale_ptr" in case) == (cache == 1)], (kernel, block_d, shown)


def test_nothing_spills(built: list[dict[str, Any]]) -> None:
    assert not [(r["case"], r["stack"]) for r in built if r["stack"]]


def test_shared_memory_fits(built: list[dict[str, Any]]) -> None:
    assert not [(r["case"], r["shared"]) for r in built if r["shared"] > SHARED_LIMIT[r["capability"]]]


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_int8_tensor_cores(built: list[dict[str, Any]], capability: int) -> None:
    for kernel in GEMMS:
        assert instructions(built, capability, kernel) == {INT8_MMA}


def test_int8_tensor_cores_of_hopper(built: list[dict[str, Any]]) -> None:
    decode = instructions(built, 90, "_int8_linear_swapped_kernel")
    for names in (decode, *(instructions(built, 90, kernel) for kernel in LINEARS_OF_HOPPER)):
        assert all(n.startswith("wgmma.mma_async.sync.aligned.m64n") and n.endswith("k32.s32.s8.s8") for n in names)
    assert "wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8" in decode
    # 16 tokens on the M side are fewer than the 64 rows of wgmma.
    assert instructions(built, 90, "_int8_linear_kernel", "BLOCK_T=16") == {INT8_MMA}


def test_decodes_of_hopper_use_tensor_cores(built: list[dict[str, Any]]) -> None:
    of_floats = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    assert instructions(built, 90, "_decode_on_hopper_kernel", "k_ptr=*fp16") == {of_floats}
    for dtype in ("*fp16", "*bf16"):
        over_int8 = f"q_ptr={dtype} k_ptr=*i8"
        assert instructions(built, 90, "_decode_on_hopper_kernel", over_int8) == {INT8_MMA, of_floats}


def test_prompts_of_hopper_use_tensor_cores(built: list[dict[str, Any]]) -> None:
    for dtype, name in (("*fp16", "f16"), ("*bf16", "bf16")):
        names = instructions(built, 90, "_prefill_on_hopper_kernel", f"q_ptr={dtype}")
        assert names == {f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name}" for n in (64, 128)}
    for where in ("DEQUANTIZED=True", "DEQUANTIZED=False"):
        assert instructions(built, 90, "_prefill_on_hopper_kernel", where)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_attention_uses_tensor_cores(built: list[dict[str, Any]], capability: int) -> None:
    # A window over an int8 cache has tiles of 64 rows, too few for the tcgen05 of sm_100.
    of_floats = [r for r in built if "k_scale_ptr" not in r["case"] and "DEQUANTIZED=True" not in r["case"]]
    built = of_floats + [r for r in built if "WINDOW=None, SOFT_CAP=None" in r["case"]]
    for dtype, name in (("*fp16", "f16"), ("*bf16", "bf16")):
        for kernel in ("_paged_attention_kernel", "_paged_decode_kernel"):
            names = instructions(built, capability, kernel, f"q_ptr={dtype}")
            assert names, kernel
            is_prefill = kernel == "_paged_attention_kernel"
            prefix = "mma.sync.aligned.m16n8k16"
            if is_prefill:
                prefix = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, prefix)
            of_codes = {n for n in names if "s8" in n}
            assert all(n.startswith(prefix) for n in names - of_codes), names
            assert all(name in n for n in names - of_codes if not n.startswith("tcgen05")), names
            # Decodes multiply codes, 16 rows at a time; prompts what they stand for.
            assert of_codes == (set() if is_prefill else {INT8_MMA}), names
