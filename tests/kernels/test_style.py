"""A kernel stays readable: under 80 lines and 20 parameters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

MAX_LINES, MAX_PARAMETERS = 80, 20
KERNELS = Path(__file__).parents[2] / "kernels"


def compiled_functions() -> list[tuple[str, ast.FunctionDef]]:
    found = []
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            decorators = [ast.unparse(d) for d in node.decorator_list] if isinstance(node, ast.FunctionDef) else []
            if any(name.startswith(("triton.jit", "gluon.jit")) for name in decorators):
                assert isinstance(node, ast.FunctionDef)
                found.append((f"{path.stem}.{node.name}", node))
    return found


@pytest.mark.parametrize(("name", "node"), compiled_functions(), ids=lambda value: value if type(value) is str else "")
def test_kernel_is_short(name: str, node: ast.FunctionDef) -> None:
    assert node.end_lineno is not None
    assert node.end_lineno - node.lineno + 1 <= MAX_LINES
    assert len(node.args.args) <= MAX_PARAMETERS


def test_kernels_are_found() -> None:
    names = [name for name, _ in compiled_functions()]
    assert "gemm._int8_linear_kernel" in names
    assert "pingpong._int8_linear_pingpong_kernel" in names
