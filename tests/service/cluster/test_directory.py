"""The addresses that a process knows."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import pytest

from service.cluster import directory
from service.cluster.directory import register, urls
from service.cluster.prefixes import KnownPrefixes


class Router:
    bound = 0
    max_waiting = 5

    def __init__(self, known: Mapping[str, str]) -> None:
        self.known = known

    def urls(self) -> Mapping[str, str]:
        return self.known


def test_addresses_are_those_of_the_routers_that_live() -> None:
    one, two = Router({"b": "http://b", "a": "http://a"}), Router({"c": "http://c"})
    register(one)
    register(two)
    assert list(urls().items()) == [("a", "http://a"), ("b", "http://b"), ("c", "http://c")]
    one.max_waiting = 9
    assert directory.max_waiting() == 9
    assert [directory.knows(name) for name in "acd"] == [True, True, False]
    del one
    gc.collect()
    assert directory.max_waiting() == 5
    assert not directory.knows("a")
    assert urls() == {"c": "http://c"}
    two.known = {}
    assert urls() == {}


def test_a_router_may_get_new_functions() -> None:
    """Ray reads the router's pickled class again, which replaces the functions of the class that is there."""

    class Reloaded(Router):
        def urls(self) -> Mapping[str, str]:
            return {}

    router = Reloaded({})
    register(router)
    Reloaded.urls = lambda self: {"a": "http://a"}  # type: ignore[method-assign]
    gc.collect()
    assert urls() == {"a": "http://a"}


def test_the_best_replica_knows_the_prefix_unless_it_has_too_much_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "KNOWN", KnownPrefixes())
    assert directory.best([b"1"], set(), {}) is None
    router = Router({"a": "http://a", "b": "http://b"})
    router.bound = 2
    register(router)
    directory.sent([b"1", b"2"], "b")
    assert {directory.best([b"9"], set(), {}) for _ in range(64)} == {"a", "b"}, "equal ones get equal shares"
    assert directory.best([b"1"], set(), {"b": 2}) == "b"
    assert directory.best([b"1"], {"b"}, {"b": 2}) == "a"
    assert directory.best([b"1"], {"a", "b"}, {}) == "b", "there is no other"
    assert directory.best([b"1"], set(), {"b": 3}) == "a"
    directory.keep(["a"])
    assert directory.best([b"1"], set(), {"b": 1}) == "a"
