from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from quant.calibrate import calibrate, self_written, windows_from_text


def windows(n=3, length=16, seed=0):
    return torch.randint(128, (n, length), generator=torch.Generator().manual_seed(seed))


def brute_force(model, tokens):
    """Every input of every Linear kept, then the maximum."""
    inputs = {}
    handles = [
        module.register_forward_hook(lambda _m, args, _out, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.inference_mode():
        for row in tokens:
            model(row[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts, dim=1).abs().flatten(0, 1).amax(0) for name, parts in inputs.items()}


def test_absmax_is_the_brute_force_maximum(tiny):
    seen = []
    absmax = calibrate(tiny.model, windows(), lambda done, total: seen.append((done, total)))
    expected = brute_force(tiny.model, windows())
    assert list(absmax) == list(expected)
    assert "lm_head" in absmax
    for name in expected:
        assert absmax[name].dtype == torch.float32
        assert torch.equal(absmax[name], expected[name]), name
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_hooks_and_mode_are_put_back(tiny):
    tiny.model.train()
    calibrate(tiny.model, windows(1))
    assert tiny.model.training
    tiny.model.eval()
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())


def test_readers_of_one_activation_share_its_range(tiny):
    layer = "model.layers.0.self_attn"
    assert torch.equal(tiny.absmax[f"{layer}.q_proj"], tiny.absmax[f"{layer}.v_proj"])


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_and_named(tiny, fault):
    norm = tiny.model.model.layers[1].post_attention_layernorm.weight
    kept = norm.detach().clone()
    try:
        norm.data[5] = fault
        with pytest.raises(
            ValueError, match=r"the input of model\.layers\.1\.mlp\.gate_proj is NaN or infinite.*window 0"
        ):
            calibrate(tiny.model, windows(1))
    finally:
        norm.data.copy_(kept)
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"\[n, L\] int64"),
        (torch.zeros(2, 4), r"torch\.float32"),
        (torch.zeros(0, 4, dtype=torch.int64), "at least one token"),
        (torch.full((1, 4), 128), "128; the vocabulary has 0..127"),
        (torch.full((1, 4), -1), "from -1"),
    ],
)
def test_windows_that_do_not_fit_are_refused(tiny, bad, message):
    with pytest.raises(ValueError, match=message):
        calibrate(tiny.model, bad)


def word_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0} | {str(i): i for i in range(1, 100)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


TEXT = " ".join(str(i) for i in range(1, 31))


def test_windows_of_a_text_are_disjoint_and_in_order():
    first = windows_from_text(word_tokenizer(bos=False), TEXT, 2, 8)
    rest = windows_from_text(word_tokenizer(bos=False), TEXT, 1, 8, offset=2)
    assert first.dtype == torch.int64
    assert first.tolist() == [list(range(1, 9)), list(range(9, 17))]
    assert rest.tolist() == [list(range(17, 25))]


def test_each_window_begins_as_a_served_prompt_does():
    tokens = windows_from_text(word_tokenizer(bos=True), TEXT, 2, 8)
    assert tokens.tolist() == [[0, *range(1, 8)], [0, *range(8, 15)]]


def test_a_text_too_short_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="it has 30 tokens and 3 windows of 8 after 1 others take 32"):
        windows_from_text(word_tokenizer(bos=False), TEXT, 3, 8, offset=1)
    with pytest.raises(ValueError, match="num_windows = 0"):
        windows_from_text(word_tokenizer(bos=False), TEXT, 0, 8)


def test_self_written_text_is_seeded(tiny):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    seen = []
    one = self_written(tiny.model, 3, 24, seed=5, on_progress=lambda done, total: seen.append((done, total)))
    torch.manual_seed(8)
    assert torch.equal(one, self_written(tiny.model, 3, 24, seed=5))
    assert not torch.equal(one, self_written(tiny.model, 3, 24, seed=6))
    assert one.shape == (3, 24)
    assert one.dtype == torch.int64
    assert set(one[:, 0].tolist()) == {tiny.model.config.bos_token_id}
    assert len({tuple(row) for row in one.tolist()}) == 3
    assert seen[-1] == (24, 24)
    torch.manual_seed(7)
    assert torch.equal(state, torch.get_rng_state())


def test_self_written_tokens_are_samples_of_the_model(tiny):
    """The mean log-probability of what was written is near the model's entropy: the cache and the draw are right."""
    tokens = self_written(tiny.model, 16, 64, seed=0)
    with torch.inference_mode():
        logp = tiny.model(tokens).logits[:, 1:-1].double().log_softmax(-1)
    written = logp.gather(-1, tokens[:, 2:, None]).mean()
    entropy = (logp.exp() * logp).sum(-1).mean()
    assert written.item() == pytest.approx(entropy.item(), abs=0.15)


def test_self_written_refuses_more_than_the_context(tiny):
    with pytest.raises(ValueError, match=r"window_len = 129.*2 to 128 tokens"):
        self_written(tiny.model, 1, 129, seed=0)
    with pytest.raises(ValueError, match="num_windows = 0"):
        self_written(tiny.model, 0, 16, seed=0)


def test_a_model_that_overflows_cannot_write(tiny):
    norm = tiny.model.model.norm.weight
    kept = norm.detach().clone()
    try:
        norm.data[5] = float("nan")
        with pytest.raises(ValueError, match="logits are not finite"):
            self_written(tiny.model, 1, 8, seed=0)
    finally:
        norm.data.copy_(kept)
