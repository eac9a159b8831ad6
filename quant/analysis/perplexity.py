"""The quality of a quantized model: perplexity, KL divergence and top-1 agreement against the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import NotFinite

LogitsOf = Callable[[Tensor], Tensor]
"""Token ids [L] int64 -> logits [L, V] float, row t predicting token t + 1."""

RESAMPLES = 2000

_ROWS_AT_ONCE = 128
"""Positions that are compared together: limits each float32 copy to 128 x V x 4 bytes (25 MB at V = 49152)."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One row of the quality table, over all windows and their positions t = 0..L-2, which have a next token.

    scheme: its name.
    perplexity: exp(mean_t -log p(token_{t+1} | token_0..t)), p the candidate's softmax.
    kl: mean_t sum_v p_v (log p_v - log q_v) in nats, p the baseline's and q the candidate's softmax at t.
    ratio_interval, kl_interval: of perplexity over the baseline's and of kl, the middle 95 % of RESAMPLES draws of as
        many windows, with replacement: how far other windows of such a text may be off. With one window both ends are
        equal.
    top1_agreement: share of positions at which both argmaxes are the same token, 0..1.
    num_tokens: number of positions, n (L - 1).
    """

    scheme: str
    perplexity: float
    kl: float
    ratio_interval: tuple[float, float]
    kl_interval: tuple[float, float]
    top1_agreement: float
    num_tokens: int


@dataclass(slots=True)
class _Sums:
    """Float64 sums over the positions of one window."""

    nll: float = 0.0
    kl: float = 0.0
    num_agreeing: int = 0
    num_tokens: int = 0


def _quality(scheme: str, windows: Sequence[_Sums], baseline: Sequence[_Sums]) -> Quality:
    num_tokens = sum(window.num_tokens for window in windows)
    nll, kl = (
        torch.tensor([getattr(window, name) for window in windows], dtype=torch.float64) for name in ("nll", "kl")
    )
    surplus = nll - torch.tensor([window.nll for window in baseline], dtype=torch.float64)
    per_window = len(windows) / num_tokens
    (low, high), (kl_low, kl_high) = _interval(surplus * per_window), _interval(kl * per_window)
    return Quality(
        scheme,
        _exp(sum(window.nll for window in windows) / num_tokens),
        sum(window.kl for window in windows) / num_tokens,
        ratio_interval=(_exp(low), _exp(high)),
        kl_interval=(kl_low, kl_high),
        top1_agreement=sum(window.num_agreeing for window in windows) / num_tokens,
        num_tokens=num_tokens,
    )


def _exp(x: float) -> float:
    # torch's exp gives inf where math.exp raises: a collapsed scheme still gets its row.
    return torch.tensor(x, dtype=torch.float64).exp().item()


def _interval(sums: Tensor) -> tuple[float, float]:
    """The middle 95 % of the mean of sums [n], over resamples."""
    draws = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=torch.Generator().manual_seed(0))
    low, high = sums[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@torch.inference_mode()
def evaluate(
    baseline: tuple[str, LogitsOf],
    candidates: Mapping[str, LogitsOf],
    windows: Tensor,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Quality]:
    """A row for the baseline (its KL 0 and agreement 1), then one per candidate in the order given.

    Only the logits of one window are in memory: the baseline's and one candidate's.

    Args:
        baseline: name and logits of the float model.
        candidates: logits by scheme name.
        windows: [n, L] int64 token ids, L at least 2.
        on_progress: called after each window with (done, total).

    Raises:
        ValueError: windows is not [n, L] with L >= 2, a candidate has the baseline's name, or logits have another
            shape than [L, V].
        NotFinite: logits are not finite; the message names scheme and window.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [n, L] with n >= 1 and L >= 2, got {list(windows.shape)}")
    name, baseline_logits_of = baseline
    if name in candidates:
        raise ValueError(f"{name!r} names both the baseline and a candidate; each row needs a name of its own")
    sums = {scheme: [_Sums() for _ in windows] for scheme in (name, *candidates)}
    for index, window in enumerate(windows):
        reference = _checked(baseline_logits_of(window), window, name, index)
        _accumulate(sums[name][index], reference, reference, window)
        for scheme, logits_of in candidates.items():
            logits = _checked(logits_of(window), window, scheme, index)
            if logits.shape != reference.shape:
                raise ValueError(f"{scheme} gives logits {list(logits.shape)}, {name} {list(reference.shape)}")
            _accumulate(sums[scheme][index], reference, logits, window)
        if on_progress is not None:
            on_progress(index + 1, len(windows))
    return [_quality(scheme, found, sums[name]) for scheme, found in sums.items()]


def _checked(logits: Tensor, window: Tensor, scheme: str, index: int) -> Tensor:
    if logits.ndim != 2 or logits.shape[0] != len(window):
        raise ValueError(f"{scheme} gives logits {list(logits.shape)} for {len(window)} tokens; expected [L, V]")
    if not bool(logits.isfinite().all()):
        raise NotFinite(f"{scheme} gives logits that are NaN or infinite in window {index}")
    return logits


def _accumulate(sums: _Sums, reference: Tensor, logits: Tensor, window: Tensor) -> None:
    """Add the positions of one window, a few rows at a time."""
    targets = window[1:].to(logits.device)
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, len(targets)))
        q = logits[rows].float().log_softmax(-1)
        sums.nll -= q.gather(1, targets[rows, None]).double().sum().item()
        sums.num_tokens += rows.stop - rows.start
        if logits is reference:
            sums.num_agreeing += rows.stop - rows.start
            continue
        p = reference[rows].to(logits.device).float().log_softmax(-1)
        sums.kl += (p.exp() * (p - q)).sum(-1, dtype=torch.float64).sum().item()
        same = reference[rows].argmax(-1).to(logits.device) == logits[rows].argmax(-1)
        sums.num_agreeing += int(same.sum())
