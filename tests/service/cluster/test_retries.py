"""Which failures send a request to another replica."""

from __future__ import annotations

import json

import pytest

from service.cluster.retries import LOST, MAX_LOST, MAX_PAUSE_S, MAX_UNSTARTED, UNSTARTED, Tries, trouble_of
from service.errors import Draining, EngineFailed, NotReady, OttavaError, QueueFull, QueueTimeout, RateLimited
from service.web.failures import error_body
from service.web.generation.sse import event


def content_of(error: OttavaError) -> bytes:
    return error_body(error).model_dump_json().encode()


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (Draining("stops"), "unstarted"),
        (NotReady("starts"), "unstarted"),
        (QueueFull("full"), "unstarted"),
        (EngineFailed("died"), "lost"),
        (QueueTimeout("waited"), None),
        (RateLimited("too many"), None),
        (OttavaError("a fault"), None),
    ],
)
def test_an_error_says_whether_another_replica_may_do_better(error: OttavaError, trouble: str | None) -> None:
    assert trouble_of(error.status, content_of(error)) == trouble
    assert trouble_of(200, event(error_body(error))) == trouble


@pytest.mark.parametrize("content", [b"", b"no JSON", b"[]", b"{}", b'{"error": 3}', b'{"error": {"code": null}}'])
def test_an_answer_that_nobody_understands_is_passed_on(content: bytes) -> None:
    assert trouble_of(500, content) is None


def test_an_answer_that_speaks_of_errors_is_none() -> None:
    assert trouble_of(200, json.dumps({"error": {"code": "draining"}}).encode()) is None
    assert trouble_of(200, b'data: {"text": "error"}\n\n') is None


def test_the_codes_are_those_of_errors() -> None:
    assert {Draining.code, NotReady.code, QueueFull.code} == UNSTARTED
    assert {EngineFailed.code} == LOST


def test_a_request_is_sent_once_more_after_a_loss() -> None:
    tries = Tries()
    assert [tries.allows("lost") for _ in range(3)] == [True, False, False]
    assert MAX_LOST == 2


def test_refusals_are_followed_longer_and_slower() -> None:
    tries, waited_s = Tries(), 0.0
    while tries.allows("unstarted"):
        waited_s += tries.pause_s
        assert tries.pause_s <= MAX_PAUSE_S
    assert tries.num_unstarted == MAX_UNSTARTED
    assert 5 < waited_s < 15


def test_a_loss_is_followed_at_once() -> None:
    tries = Tries()
    tries.allows("lost")
    assert tries.pause_s == 0.0
