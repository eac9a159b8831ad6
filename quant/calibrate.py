"""Activation ranges of a float model over a stream of tokens: a user's text, or text that the model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class _AbsmaxHook:
    """Keeps the running channel absmax of one Linear's input."""

    def __init__(self, name: str, absmax: dict[str, Tensor]) -> None:
        self.name = name
        self.absmax = absmax

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        batch_absmax = args[0].detach().abs().flatten(0, -2).amax(0).float()
        so_far = self.absmax.get(self.name)
        self.absmax[self.name] = batch_absmax if so_far is None else torch.maximum(so_far, batch_absmax)


@torch.inference_mode()
def calibrate(model: PreTrainedModel, windows: Tensor, on_progress: Progress | None = None) -> dict[str, Tensor]:
    """The largest magnitude of each input channel of every Linear.

    absmax_k = max_t |x_tk|

    Args:
        model: a float causal language model.
        windows: [n, L] int64 token ids; each row is read from its own start.
        on_progress: called after each window with (done, total).

    Returns:
        float32 [K] on the CPU by module name, in the order in which the Linears ran. A Linear that never ran is absent.

    Raises:
        ValueError: windows is not [n, L] int64 within the vocabulary, or an activation is NaN or infinite: the message
            names the first Linear that read one.
    """
    _check_windows(windows, _vocab_size(model))
    absmax: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(_AbsmaxHook(name, absmax))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    was_training = model.training
    model.train(False)
    try:
        for index, window in enumerate(windows.to(model.device)):
            model(input_ids=window[None], use_cache=False)
            # The maximum keeps NaN and infinity, so one look per window finds them without stopping a GPU per layer.
            _require_finite(absmax, index)
            if on_progress is not None:
                on_progress(index + 1, len(windows))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {name: values.cpu() for name, values in absmax.items()}


def windows_from_text(
    tokenizer: PreTrainedTokenizerBase, text: str, num_windows: int, window_len: int, offset: int = 0
) -> Tensor:
    """Disjoint windows of a text, one after the other.

    The text is tokenized once, without special tokens, and cut into consecutive pieces. Where the tokenizer begins a
    prompt with a BOS token, each window begins with it too, as each served prompt does.

    Args:
        num_windows, window_len: n and L, both at least 1.
        offset: number of windows skipped at the start; calibration and evaluation windows taken from one text with
            offsets at least num_windows apart share no token.

    Returns:
        [n, L] int64.

    Raises:
        ValueError: a count is out of range, or the text is too short: the message says how many tokens it has and how
            many it takes.
    """
    if num_windows < 1 or window_len < 2 or offset < 0:
        raise ValueError(
            f"num_windows = {num_windows}, window_len = {window_len}, offset = {offset}: "
            "need at least 1 window of at least 2 tokens and no negative offset"
        )
    lead = _prompt_lead(tokenizer)
    piece_len = window_len - len(lead)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    num_needed = (offset + num_windows) * piece_len
    if len(ids) < num_needed:
        raise ValueError(
            f"the text is too short: it has {len(ids)} tokens and {num_windows} windows of {window_len} "
            f"after {offset} others take {num_needed}; give a longer text or fewer, shorter windows"
        )
    pieces = torch.tensor(ids[offset * piece_len : num_needed], dtype=torch.int64).view(num_windows, piece_len)
    return torch.cat((torch.tensor(lead, dtype=torch.int64).expand(num_windows, -1), pieces), dim=1)


@torch.inference_mode()
def self_written(
    model: PreTrainedModel, num_windows: int, window_len: int, seed: int, on_progress: Progress | None = None
) -> Tensor:
    """Windows that the model writes itself, for when there is no text: sampled at temperature 1.

    Each window begins with BOS (where the model has one) and one random token, so that windows differ from the start;
    an end-of-text token is kept and writing goes on, as in training data. The same model, seed and machine give the
    same windows.

    Args:
        num_windows, window_len: n and L; L at most the model's context.
        seed: of a generator of its own; the global one is not touched.
        on_progress: called with (tokens written per window, L).

    Returns:
        [n, L] int64 on the CPU.

    Raises:
        ValueError: a count is out of range, or the model's logits are not finite.

    Source: LLM-QAT (arXiv 2305.17888), section 3.1: data generated by the model serves as well as its training data.
    """
    lead = _bos(model)
    _check_counts(model, num_windows, window_len, len(lead) + 1)
    generator = torch.Generator().manual_seed(seed)
    vocab_size = _vocab_size(model)
    first = torch.randint(vocab_size, (num_windows, 1), generator=generator)
    tokens = torch.cat((torch.tensor(lead, dtype=torch.int64).expand(num_windows, -1), first), dim=1)
    was_training = model.training
    model.train(False)
    try:
        written, cache = tokens, None
        while tokens.shape[1] < window_len:
            out = model(input_ids=written.to(model.device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            written = _sample(out.logits[:, -1], generator)
            tokens = torch.cat((tokens, written), dim=1)
            if on_progress is not None:
                on_progress(tokens.shape[1], window_len)
    finally:
        model.train(was_training)
    return tokens


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row of logits [n, V], drawn on the CPU so that every device draws from the same stream."""
    cumulative = logits.float().softmax(-1).cpu().double().cumsum(-1)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise ValueError("the model's logits are not finite: it cannot write its own calibration text")
    # Inverse transform: torch.multinomial takes 2.5 times as long over a vocabulary of 49152 (71 against 28 ms).
    draws = torch.rand(total.shape, generator=generator, dtype=torch.float64) * total
    return torch.searchsorted(cumulative, draws, right=True).clamp_(max=cumulative.shape[-1] - 1)


def _vocab_size(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _bos(model: PreTrainedModel) -> list[int]:
    bos = model.config.bos_token_id
    return [] if bos is None else [int(bos)]


def _prompt_lead(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer begins every prompt with it, else []."""
    ids = tokenizer("")["input_ids"]
    return [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []


def _check_counts(model: PreTrainedModel, num_windows: int, window_len: int, min_len: int) -> None:
    max_len = getattr(model.config, "max_position_embeddings", None) or window_len
    if num_windows < 1 or not min_len <= window_len <= max_len:
        raise ValueError(
            f"num_windows = {num_windows}, window_len = {window_len}: need at least 1 window "
            f"of {min_len} to {max_len} tokens"
        )


def _check_windows(windows: Tensor, vocab_size: int) -> None:
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.numel() == 0:
        raise ValueError(
            f"windows must be [n, L] int64 with at least one token, got {windows.dtype} {list(windows.shape)}"
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token ids run from {low} to {high}; the vocabulary has 0..{vocab_size - 1}")


def _require_finite(absmax: dict[str, Tensor], window: int) -> None:
    is_finite = torch.stack([values.isfinite().all() for values in absmax.values()]).tolist()
    if not all(is_finite):
        name = list(absmax)[is_finite.index(False)]
        raise ValueError(
            f"the input of {name} is NaN or infinite in calibration window {window}: the model overflows in "
            "this float type; calibrate in bfloat16 or float32"
        )
