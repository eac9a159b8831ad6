"""Which replica gets a prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cluster.prefixes import CHUNK_BYTES, CHUNK_IDS, MAX_CHUNKS, KnownPrefixes, prefix_keys, ranked


def keys_of(**body: Any) -> tuple[bytes, ...]:
    return prefix_keys(json.dumps(body).encode())


def test_prompts_share_as_many_keys_as_they_share_chunks() -> None:
    start = "x" * (2 * CHUNK_BYTES)
    one, two = keys_of(prompt=start + "a" * CHUNK_BYTES), keys_of(prompt=start + "b" * CHUNK_BYTES + "tail")
    assert len(one) == len(two) == 3
    assert one[:2] == two[:2]
    assert one[2] != two[2]


def test_only_whole_chunks_count() -> None:
    assert keys_of(prompt="x" * (CHUNK_BYTES - 1)) == ()
    assert len(keys_of(prompt="x" * CHUNK_BYTES)) == 1


def test_a_key_depends_on_all_chunks_before_it() -> None:
    a, b = "a" * CHUNK_BYTES, "b" * CHUNK_BYTES
    assert keys_of(prompt=a + b)[1] != keys_of(prompt=b + b)[1]


@pytest.mark.parametrize("other", [{"variant": "fp16"}, {"model": "m:fp16"}])
def test_another_variant_has_another_cache(other: dict[str, str]) -> None:
    prompt = "x" * CHUNK_BYTES
    assert keys_of(prompt=prompt) != keys_of(prompt=prompt, **other)


def test_a_conversation_shares_the_turns_before() -> None:
    turns = [{"role": "system", "content": "s" * 600}, {"role": "user", "content": "first"}]
    longer = [*turns, {"role": "assistant", "content": "a"}, {"role": "user", "content": "second"}]
    one, two = keys_of(messages=turns), keys_of(messages=longer)
    assert one
    assert two[: len(one)] == one


def test_conversations_of_the_responses_and_messages_apis_share_their_turns() -> None:
    turns = [{"role": "user", "content": "u" * 600}]
    longer = [*turns, {"role": "assistant", "content": "a"}]
    for head, field in (("instructions", "input"), ("system", "messages")):
        one, two = keys_of(**{head: "s" * 600, field: turns}), keys_of(**{head: "s" * 600, field: longer})
        assert one
        assert two[: len(one)] == one
        assert keys_of(**{head: "t" * 600, field: turns})[0] != one[0]
    assert len(keys_of(input="x" * (2 * CHUNK_BYTES))) == 2


def test_token_ids_count_by_blocks() -> None:
    ids = list(range(3 * CHUNK_IDS))
    assert len(keys_of(prompt_ids=ids)) == 3
    assert keys_of(prompt_ids=ids)[:1] == keys_of(prompt_ids=ids[:CHUNK_IDS])
    assert len(keys_of(prompt=ids)) == 3
    assert keys_of(prompt=["x" * CHUNK_BYTES, "other"]) == keys_of(prompt="x" * CHUNK_BYTES)


def test_a_long_prompt_has_a_bounded_number_of_keys() -> None:
    assert len(keys_of(prompt="x" * (2 * MAX_CHUNKS * CHUNK_BYTES))) == MAX_CHUNKS


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"{}", b'{"prompt": 3}', b'{"prompt": []}', b'{"messages": 1}', b"\xff", b"[" * 100_000,
     b'{"prompt": [null]}', b'{"prompt": "\\ud800"}'],
)  # fmt: skip
def test_what_is_no_request_has_no_keys(body: bytes) -> None:
    assert prefix_keys(body) == ()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_no_value_of_a_field_raises(value: Any) -> None:
    for name in ("prompt", "prompt_ids", "messages", "model", "variant"):
        keys_of(**{name: value})


def test_the_longest_known_prefix_is_first() -> None:
    assert ranked({"a": 1, "b": 3, "c": 2}, {"b": 5, "c": 4}, bound=8) == ["b", "c", "a"]


def test_without_a_known_prefix_the_least_loaded_is_first() -> None:
    assert ranked({"a": 3, "b": 1, "c": 2}, {}, bound=8) == ["b", "c", "a"]


def test_a_prefix_costs_at_most_the_bound() -> None:
    assert ranked({"a": 0, "b": 8}, {"b": 100}, bound=8) == ["b", "a"]
    assert ranked({"a": 0, "b": 9}, {"b": 100}, bound=8) == ["a", "b"]


def test_one_busy_replica_does_not_hide_what_the_others_know() -> None:
    assert ranked({"a": 0, "b": 2, "c": 50}, {"b": 3, "c": 9}, bound=8) == ["b", "a", "c"]


def test_equal_replicas_keep_their_order() -> None:
    assert ranked({"b": 1, "a": 1}, {}, bound=0) == ["b", "a"]
    assert ranked({}, {}, bound=0) == []


@given(st.dictionaries(st.text(), st.integers(0, 30), min_size=1), st.integers(0, 10), st.data())
def test_the_first_is_never_further_from_the_least_than_the_bound(
    loads: dict[str, int], bound: int, data: st.DataObject
) -> None:
    known = data.draw(st.dictionaries(st.sampled_from(sorted(loads)), st.integers(1, 9)))
    order = ranked(loads, known, bound)
    assert sorted(order) == sorted(loads)
    assert loads[order[0]] <= min(loads.values()) + bound


def test_lengths_are_of_leading_keys() -> None:
    known = KnownPrefixes()
    known.add([b"1", b"2", b"3"], "a")
    known.add([b"1"], "b")
    known.add([b"x", b"3"], "c")
    assert known.lengths([b"1", b"2", b"3", b"4"], ["a", "b", "c"]) == {"a": 3, "b": 1}
    assert known.lengths([b"1", b"2"], ["b"]) == {"b": 1}
    assert known.lengths([], ["a"]) == {}


def test_a_replica_that_is_gone_is_forgotten() -> None:
    known = KnownPrefixes()
    known.add([b"1", b"2"], "a")
    known.add([b"1"], "b")
    known.keep(["b"])
    assert known.lengths([b"1", b"2"], ["a", "b"]) == {"b": 1}
    assert len(known) == 1


def test_the_least_recently_used_is_forgotten_first_and_the_long_before_the_short() -> None:
    known = KnownPrefixes(max_keys=4)
    known.add([b"1", b"2"], "a")
    known.add([b"8", b"9"], "a")
    known.add([b"1"], "b")
    known.add([b"5"], "a")
    assert known.lengths([b"1", b"2"], ["a"]) == {"a": 1}
    assert known.lengths([b"8", b"9"], ["a"]) == {"a": 2}
