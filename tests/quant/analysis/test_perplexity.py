from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.analysis.perplexity import Quality, evaluate
from quant.errors import NotFinite

VOCAB, LENGTH = 11, 300
WINDOWS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def logits_of(seed: int, noise: float = 0.0) -> Callable[[Tensor], Tensor]:
    def of(ids: Tensor) -> Tensor:
        table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
        jitter = torch.randn(len(ids), VOCAB, generator=torch.Generator().manual_seed(seed + 1))
        return table[ids] + noise * jitter

    return of


def by_definition(scheme: str, base: Callable[[Tensor], Tensor], candidate: Callable[[Tensor], Tensor]) -> Quality:
    nll, kl, agree, count = 0.0, 0.0, 0, 0
    for window in WINDOWS:
        p = base(window).double().softmax(-1)
        q = candidate(window).double().softmax(-1)
        for t in range(LENGTH - 1):
            nll -= math.log(q[t, window[t + 1]])
            kl += sum(float(p[t, v]) * (math.log(p[t, v]) - math.log(q[t, v])) for v in range(VOCAB))
            agree += int(p[t].argmax() == q[t].argmax())
            count += 1
    return Quality(scheme, math.exp(nll / count), kl / count, (1, 1), (0, 0), agree / count, count)


def test_rows_are_the_definitions() -> None:
    base, near = logits_of(0), logits_of(0, noise=0.3)
    seen = []
    rows = evaluate(("fp16", base), {"near": near}, WINDOWS, lambda done, total: seen.append((done, total)))
    for row, expected in zip(rows, (by_definition("fp16", base, base), by_definition("near", base, near)), strict=True):
        assert row.scheme == expected.scheme
        assert row.num_tokens == expected.num_tokens == 2 * (LENGTH - 1)
        assert row.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
        assert row.kl == pytest.approx(expected.kl, abs=1e-6)
        assert row.top1_agreement == expected.top1_agreement
    assert (rows[0].kl, rows[0].top1_agreement) == (0.0, 1.0)
    assert rows[1].kl > 0
    assert rows[1].top1_agreement < 1
    assert seen == [(1, 2), (2, 2)]


def test_intervals_hold_what_windows_differ_in() -> None:
    """Resampling windows that are alike changes nothing; of two kinds, the ends are near those of each kind alone."""
    base, near = logits_of(0), logits_of(0, noise=0.3)
    (_, alike) = evaluate(("fp16", base), {"near": near}, WINDOWS[:1].expand(6, -1))
    assert alike.kl_interval == pytest.approx((alike.kl, alike.kl))
    row, one, other = (
        evaluate(("fp16", base), {"near": near}, windows) for windows in (WINDOWS, WINDOWS[:1], WINDOWS[1:])
    )
    ends = sorted(found[1].kl for found in (one, other))
    assert row[1].kl_interval == pytest.approx(ends)
    ratios = sorted(found[1].perplexity / found[0].perplexity for found in (one, other))
    assert row[1].ratio_interval == pytest.approx(ratios)
    assert (row[0].kl_interval, row[0].ratio_interval) == ((0, 0), (1, 1))


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    rows = evaluate(("u", lambda ids: torch.zeros(len(ids), VOCAB).bfloat16()), {}, WINDOWS)
    assert rows[0].perplexity == pytest.approx(VOCAB, rel=1e-5)


def test_a_collapsed_candidate_still_gets_its_row() -> None:
    rows = evaluate(("b", logits_of(0)), {"bad": lambda ids: logits_of(3)(ids) * 1e6}, WINDOWS)
    assert rows[1].perplexity == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("b", logits_of(0)), {"b": logits_of(0)}, WINDOWS), "names both"),
        ((("b", logits_of(0)), {}, WINDOWS[:, :1]), r"L >= 2, got \[2, 1\]"),
        ((("b", logits_of(0)), {}, WINDOWS[0]), r"got \[300\]"),
        ((("b", lambda ids: torch.zeros(3, VOCAB)), {}, WINDOWS), r"b gives logits \[3, 11\] for 300 tokens"),
        ((("b", logits_of(0)), {"c": lambda ids: torch.zeros(len(ids), 5)}, WINDOWS), r"c gives logits \[300, 5\], b"),
    ],
)
def test_bad_input_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(*arguments)


def test_logits_that_are_not_finite_are_named() -> None:
    with pytest.raises(NotFinite, match=r"c gives logits that are NaN .*window 0"):
        evaluate(("b", logits_of(0)), {"c": lambda ids: logits_of(0)(ids) / 0}, WINDOWS)
