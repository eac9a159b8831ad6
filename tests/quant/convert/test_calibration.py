from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from quant.convert.calibration import self_written, windows_from_text
from quant.errors import NotFinite, TextTooShort
from tests.support.tiny_llama import Tiny


def word_tokenizer(bos: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0} | {str(i): i for i in range(1, 100)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


TEXT = " ".join(str(i) for i in range(1, 31))


def test_windows_of_a_text_are_disjoint_and_in_order() -> None:
    first = windows_from_text(word_tokenizer(bos=False), TEXT, num_windows=2, window_len=8)
    rest = windows_from_text(word_tokenizer(bos=False), TEXT, num_windows=1, window_len=8, offset=2)
    assert first.dtype == torch.int64
    assert first.tolist() == [list(range(1, 9)), list(range(9, 17))]
    assert rest.tolist() == [list(range(17, 25))]


def test_each_window_begins_as_a_served_prompt_does() -> None:
    tokens = windows_from_text(word_tokenizer(bos=True), TEXT, num_windows=2, window_len=8)
    assert tokens.tolist() == [[0, *range(1, 8)], [0, *range(8, 15)]]


def test_a_text_too_short_is_refused_with_both_numbers() -> None:
    with pytest.raises(TextTooShort, match="it has 30 tokens and 3 windows of 8 after 1 others take 32"):
        windows_from_text(word_tokenizer(bos=False), TEXT, num_windows=3, window_len=8, offset=1)
    with pytest.raises(ValueError, match="num_windows = 0"):
        windows_from_text(word_tokenizer(bos=False), TEXT, num_windows=0, window_len=8)


def test_self_written_text_is_seeded(tiny: Tiny) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    seen: list[tuple[int, int]] = []
    one = self_written(
        tiny.model, num_windows=3, window_len=24, seed=5, on_progress=lambda done, total: seen.append((done, total))
    )
    torch.manual_seed(8)
    assert torch.equal(one, self_written(tiny.model, num_windows=3, window_len=24, seed=5))
    assert not torch.equal(one, self_written(tiny.model, num_windows=3, window_len=24, seed=6))
    assert one.shape == (3, 24)
    assert one.dtype == torch.int64
    assert set(one[:, 0].tolist()) == {tiny.model.config.bos_token_id}
    assert len({tuple(row) for row in one.tolist()}) == 3
    assert seen[-1] == (24, 24)
    torch.manual_seed(7)
    assert torch.equal(state, torch.get_rng_state())


def test_self_written_tokens_are_samples_of_the_model(tiny: Tiny) -> None:
    """The mean log-probability of what was written is near the model's entropy: the cache and the draw are right."""
    tokens = self_written(tiny.model, num_windows=16, window_len=64, seed=0)
    with torch.inference_mode():
        logp = tiny.model(tokens).logits[:, 1:-1].double().log_softmax(-1)
    written = logp.gather(-1, tokens[:, 2:, None]).mean()
    entropy = (logp.exp() * logp).sum(-1).mean()
    assert written.item() == pytest.approx(entropy.item(), abs=0.15)


def test_self_written_refuses_more_than_the_context(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"window_len = 129.*2 to 128 tokens"):
        self_written(tiny.model, num_windows=1, window_len=129, seed=0)
    with pytest.raises(ValueError, match="num_windows = 0"):
        self_written(tiny.model, num_windows=0, window_len=16, seed=0)


def test_a_model_that_overflows_cannot_write(tiny: Tiny) -> None:
    norm = tiny.model.model.norm.weight
    kept = norm.detach().clone()
    try:
        norm.data[5] = float("nan")
        with pytest.raises(NotFinite, match="logits are not finite"):
            self_written(tiny.model, num_windows=1, window_len=8, seed=0)
    finally:
        norm.data.copy_(kept)
