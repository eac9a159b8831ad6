"""What is left to the garbage collector: nothing that stays, and no run that has ended."""

from __future__ import annotations

import gc
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
