"""Drafts of one text: what is looked up, and how often it fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.drafts.drafter import SIZES, WEIGHT, Drafter


def drafter_of(token_ids: Sequence[int]) -> Drafter:
    """One that was given two tokens at first, and the rest one by one."""
    drafter = Drafter(token_ids[:2])
    for token_id in token_ids[2:]:
        drafter.add(token_id)
    return drafter


@pytest.mark.parametrize("make", [Drafter, drafter_of], ids=["at once", "one by one"])
@pytest.mark.parametrize(
    ("token_ids", "draft"),
    [
        ((1, 2, 3, 4, 5, 9, 1, 2), [3, 4, 5, 9]),
        ((1, 2, 3, 7, 1, 2, 4, 8, 1, 2), [4, 8, 1, 2]),
        ((6, 5, 1, 2, 3, 0, 7, 1, 2, 4, 0, 6, 5, 1, 2), [3, 0, 7, 1]),
        ((1, 2, 9, 2, 3), []),
        ((5, 5, 5), [5, 5, 5, 5]),
        ((1, 2, 3, 1, 2), [3, 1, 2, 3]),
        ((1,), []),
    ],
    ids=["what followed", "the last time", "more tokens that agree", "nothing", "a run", "a period", "one token"],
)
def test_a_draft_is_what_followed_the_last_tokens(
    make: Callable[[Sequence[int]], Drafter], token_ids: list[int], draft: list[int]
) -> None:
    assert make(token_ids).propose(4) == draft


def test_a_draft_that_fits_is_followed_further_though_its_beginning_came_again() -> None:
    drafter = drafter_of([1, 2, 3, 4, 5, 6, 9, 9, 8, 7, 3, 4, 0, 9, 1, 2, 3])
    assert drafter.propose(3) == [4, 5, 6]
    drafter.add(4)
    assert drafter.propose(2) == [5, 6], "where 3, 4 came last, 0 followed"


def test_the_hit_rate_counts_tokens_that_nobody_drafted() -> None:
    drafter = Drafter([1, 2, 3, 4, 1, 2])
    assert (drafter.hit_rate, drafter.outlook(4, 0.1)) == (0.0, (0, 0.0))
    drafter.add(3)
    assert drafter.hit_rate == WEIGHT
    drafter.add(0)
    assert drafter.hit_rate == WEIGHT * (1 - WEIGHT)
    for _ in range(60):
        drafter.add(0)
    assert drafter.hit_rate > 0.99


def test_more_is_drafted_the_more_often_it_fits() -> None:
    drafter = Drafter([5] * 4)
    counts = []
    for _ in range(40):
        counts.append(drafter.outlook(6, 0.3)[0])
        drafter.add(5)
    assert counts == sorted(counts)
    assert set(counts) == set(range(7))
    drafter.hit_rate = 0.5
    assert drafter.outlook(6, 0.2) == (2, 0.75)
    assert drafter.outlook(1, 0.2) == (1, 0.5)
    assert Drafter([1, 2, 3]).outlook(6, 0.0) == (0, 0.0), "nothing to draft"


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 60))
def test_the_index_does_not_depend_on_how_the_tokens_came(token_ids: list[int], at: int) -> None:
    whole, grown = Drafter(token_ids), Drafter(token_ids[:at])
    for token_id in token_ids[at:]:
        grown.add(token_id)
    assert len(grown) == len(whole) == len(token_ids)
    for size, found, wanted in zip(SIZES, grown._behind, whole._behind, strict=True):
        expected = {tuple(token_ids[end - size : end]): end for end in range(size, len(token_ids) + 1)}
        for behind in (found, wanted):
            assert {gram: end for gram, end in behind.items() if len(gram) == size} == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_a_draft_continues_an_earlier_occurrence_of_the_end(token_ids: list[int], count: int) -> None:
    drafter = Drafter(token_ids)
    draft = drafter.propose(count)
    is_known = any(
        token_ids[end - size : end] == token_ids[-size:]
        for size in SIZES
        for end in range(size, len(token_ids))
        if len(token_ids) >= size
    )
    assert len(draft) == (count if is_known else 0)
    whole = token_ids + draft
    assert not draft or any(whole[end : end + count] == draft for end in range(1, len(token_ids)))
