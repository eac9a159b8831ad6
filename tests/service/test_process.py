"""What is left to the garbage collector, nothing that stays and no run that has ended; and freed memory, to glibc."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from service.process import settle
from service.web.generation.run import Run
from service.web.routes import generate
from tests.support.harness import app_of, post, two_engines


class Node:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_was_let_go_since_is_freed_when_settling_again(unfrozen: None) -> None:
    node = Node()
    settle()
    assert gc.get_freeze_count() > 1000
    seen = weakref.ref(node)
    del node
    gc.collect()
    assert seen() is not None
    settle()
    assert seen() is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_has_ended_is_freed_without_a_collection(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    runs: list[weakref.ref[Run]] = []

    class Seen(Run):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            runs.append(weakref.ref(self))

    monkeypatch.setattr(generate, "Run", Seen)
    app = app_of(two_engines())
    gc.collect()
    gc.disable()
    try:
        assert post({"prompt": "x", "stream": stream}, app).status_code == 200
        assert [run() for run in runs] == [None]
    finally:
        gc.enable()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no mallopt")
def test_freed_memory_is_touched_anew_without_a_page_fault() -> None:
    code = """
import ctypes, resource, sys
from service.process import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for turn in range(4):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(8 << 20) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in reversed(blocks):
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", code]
    kept, returned = (
        int(subprocess.run([*command, how], check=True, capture_output=True, text=True, timeout=60).stdout)
        for how in ("kept", "returned")
    )
    assert kept < 1000 < returned
