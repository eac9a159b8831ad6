"""The start-up self-check: a variant's output on fixed prompts must be finite and close to the baseline's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.analysis.perplexity import LogitsOf
from service.engine.device.device_thread import DeviceThread
from service.errors import SelfCheckFailed
from service.text.protocols import TokenizerLike

MAX_KL = 2.0
"""Mean KL divergence from the baseline, in nats, above which a variant is refused. Schemes worth serving stay below
0.1 and per-tensor rounding of a 135M model at about 1; a model that lost its outliers is above 5."""

CHECK_PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "Water boils at one hundred degrees Celsius and freezes at zero. Ice is lighter than water, so it floats.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # prints 5\n",
    "Once upon a time there was a small village by the sea, where everybody knew everybody else's name.",
)


def check_prompts(tokenizer: TokenizerLike, max_len: int) -> list[Tensor]:
    """The fixed prompts as token ids, cut to max_len."""
    return [torch.tensor(tokenizer.encode(text)[:max_len]) for text in CHECK_PROMPTS]


def check(
    scored: LogitsOf, baseline: LogitsOf | None, prompts: Sequence[Tensor], device_thread: DeviceThread
) -> float | None:
    """Compare a variant with the baseline on the prompts, one device call per prompt, so that steps run in between.

    Returns KL(baseline, variant) in nats, averaged over all positions; None without a baseline.

    Args:
        baseline: None to check only that the logits are finite.

    Raises:
        SelfCheckFailed: logits are not finite, or the divergence is above MAX_KL.
    """
    total = sum(
        device_thread.run(_divergence, scored, baseline, place, token_ids) for place, token_ids in enumerate(prompts)
    )
    mean = total / sum(len(token_ids) for token_ids in prompts)
    if not mean <= MAX_KL:
        raise SelfCheckFailed(
            f"its output disagrees wildly with the baseline: mean KL divergence {mean:.2f} nats on the check prompts, "
            f"limit {MAX_KL}; quantize with another scheme or calibration text"
        )
    return None if baseline is None else mean


@torch.inference_mode()
def _divergence(scored: LogitsOf, baseline: LogitsOf | None, place: int, token_ids: Tensor) -> float:
    """KL(baseline, variant), summed over the positions of a prompt; 0 without a baseline."""
    logits = scored(token_ids)
    if not bool(logits.isfinite().all()):
        raise SelfCheckFailed(f"its logits for check prompt {place} are not finite")
    if baseline is None:
        return 0.0
    p, q = baseline(token_ids).log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum())
