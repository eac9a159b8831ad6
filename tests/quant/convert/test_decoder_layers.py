from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from quant.convert.decoder_layers import LayerStream
from quant.convert.inputs import HELD_OUT_EVERY, gather
from tests.support.modules import evaluated, in_float32

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
FAMILIES: dict[str, PreTrainedConfig] = {
    # Two kinds of layers, each with its own mask and angles, and embeddings that are scaled.
    "gemma3": Gemma3TextConfig(
        **SMALL | {"sliding_window_pattern": 2},
        intermediate_size=48,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
    ),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "gpt2": GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=2, n_positions=64),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL | {"head_dim": 16},
        moe_intermediate_size=16,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
    ),
}


def from_config(family: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[family])  # type: ignore[no-untyped-call]
    return model


@pytest.mark.parametrize("pad", [None, 0, 89, 90, 4000, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_whole_model(family: str, pad: int | None, tmp_path: Path) -> None:
    """Whatever the padding id: the last row, or one beyond the rows, as fine-tunes have that did not resize."""
    torch.manual_seed(0)
    model = evaluated(in_float32(from_config(family)))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    windows = torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(1))
    wanted = []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    layers[-1].register_forward_hook(lambda _m, _args, out: wanted.append(out[0] if isinstance(out, tuple) else out))
    stream = LayerStream(tmp_path, torch.float32, CPU)
    with torch.no_grad():
        for window in windows:
            model(window[None], use_cache=False)
        hidden = stream.embed(windows)
        for index in range(3):
            layer = stream.load(index)
            hidden = [stream.run(index, layer, window) for window in hidden]
            stream.drop(index)
    for got, expected in zip(hidden, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_parameters_outside_a_stream_keep_their_values(tmp_path: Path) -> None:
    """The hook that drops values is gone when the skeleton is built."""
    from_config("gpt2").save_pretrained(tmp_path)
    LayerStream(tmp_path, torch.float32, CPU)
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_what_linears_read_is_gathered_and_a_quarter_of_it_held_out() -> None:
    linear = torch.nn.Linear(6, 2)
    x = torch.randn(2 * HELD_OUT_EVERY, 1, 10, 6, generator=torch.Generator().manual_seed(0))
    linears = {"a": linear, "never": torch.nn.Linear(6, 2)}
    outputs, gathered = gather(linears, linear, list(x), has_gram=True, seed=0)
    linear(x[0] * 9)  # no longer watched
    inputs, rows = gathered["a"], x.flatten(0, 2)
    held_out = x[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY].flatten(0, 2)
    fitted = torch.cat([window for i, window in enumerate(x) if (i + 1) % HELD_OUT_EVERY]).flatten(0, 1)
    assert torch.equal(outputs[1], linear(x[1]))
    assert torch.equal(inputs.channels.absmax, rows.abs().amax(0))
    torch.testing.assert_close(inputs.channels.rms, rows.square().mean(0).sqrt())
    assert torch.equal(inputs.fitted.absmax, fitted.abs().amax(0))
    torch.testing.assert_close(inputs.gram, rows.T @ rows)
    assert torch.equal(inputs.rows, held_out)
    assert "never" not in gathered


def test_one_window_is_fitted_to_and_judged_by() -> None:
    linear, x = torch.nn.Linear(6, 2), torch.randn(1, 10, 6, generator=torch.Generator().manual_seed(0))
    inputs = gather({"a": linear}, linear, [x], has_gram=False, seed=0)[1]["a"]
    assert torch.equal(inputs.rows, x[0])
    assert torch.equal(inputs.fitted.absmax, inputs.channels.absmax)
