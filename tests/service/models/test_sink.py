"""The first tokens of every text in float: the function stays the float model's, and no shared scale is theirs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.sink import SINK_NAME, Sink
from quant.convert.layer import Recipe
from quant.convert.model import quantize_checkpoint
from quant.errors import CheckpointError
from quant.linear import Int8Linear
from quant.scheme import PRESETS, Scheme
from service.engine.api import SamplingParams, Token
from service.models.config import ModelConfig, down_names, linear_names, qkv_names, smooth_groups
from service.models.decoder import Decoder, score
from service.models.loader import load_decoder
from tests.service.kinds import Tiny
from tests.support.engines import collect, make_engine
from tests.support.thread_ranks import on_ranks
from tests.support.tiny_models import TINY, change_tensors, in_chunks, save_tiny_model

CPU = torch.device("cpu")
IDS = torch.randint(3, 256, (100,), generator=torch.Generator().manual_seed(4))
SINK = (1, 7)
WITH_EXPERTS = {"qwen3_moe", "qwen3_moe-dense-layer"}


def error(found: Tensor, expected: Tensor) -> float:
    relative: float = ((found - expected).norm() / expected.norm()).item()
    return relative


def quantized(folder: Path, out: Path, scheme: Scheme, windows: Tensor | None = None) -> Path:
    config = ModelConfig.load(folder)
    recipe = Recipe(
        scheme=scheme,
        linear_names=tuple(linear_names(config)),
        down_names=down_names(config),
        groups=tuple(smooth_groups(config)),
        qkv_names=tuple(qkv_names(config)),
        dtype=torch.float32,
        windows=windows,
    )
    quantize_checkpoint(folder, out, recipe)
    return out


def sink_of(folder: Path) -> Sink:
    found = Checkpoint.open(folder, torch.float32, CPU).sink()
    assert found is not None
    return found


def with_sink(folder: Path, sink: Sink | None) -> Decoder:
    """A float model with a sink, which only a scheme that does not smooth leaves fit for it."""
    return Decoder(ModelConfig.load(folder), Checkpoint.open(folder, torch.float32, CPU), sink=sink)


@pytest.mark.parametrize("name", [name for name in TINY if name not in WITH_EXPERTS])
def test_the_function_of_every_family_stays(tiny: Tiny, name: str, tmp_path: Path) -> None:
    """Of texts that begin with the sink, and of others behind it; and every number of the sink counts."""
    _, folder = tiny(name)
    sink = sink_of(quantized(folder, tmp_path / "int8", PRESETS["rtn-token"].with_sink(SINK)))
    plain, decoder = load_decoder(folder, torch.float32, CPU), with_sink(folder, sink)
    behind = torch.cat((torch.tensor(SINK), IDS))
    with torch.inference_mode():
        expected = score(plain, behind)
        assert error(score(decoder, behind), expected) < 1e-5
        assert error(score(decoder, IDS), expected[2:]) < 1e-5
        assert error(in_chunks(decoder, behind, [1, 1, 40, 1, len(behind) - 43]), expected) < 1e-5
        last = len(sink.qkv) - 1
        for number, changed in enumerate(
            (
                replace(sink, hidden=sink.hidden.flip(0)),
                replace(sink, qkv=(*sink.qkv[:last], 1.01 * sink.qkv[last])),
                replace(sink, qkv=(sink.qkv[0].roll(64, 1), *sink.qkv[1:])),
                replace(sink, qkv=sink.qkv[::-1]),
            )
        ):
            assert error(score(with_sink(folder, changed), behind), expected) > 1e-4, number


def test_the_sinks_own_tokens_are_not_computed(tiny: Tiny, tmp_path: Path) -> None:
    """Whatever their embeddings hold."""
    _, folder = tiny("llama")
    sink = sink_of(quantized(folder, tmp_path / "int8", PRESETS["rtn-token"].with_sink(SINK)))
    decoder = with_sink(folder, sink)
    behind = torch.cat((torch.tensor(SINK), IDS))
    with torch.inference_mode():
        expected = score(decoder, behind)
        decoder.embedding = decoder.embedding.clone()
        decoder.embedding[list(SINK)] = 1e6
        assert torch.equal(score(decoder, behind), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_ranks_take_their_own_heads(name: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", name, **sizes(name))
    sink = sink_of(quantized(folder, tmp_path / "int8", PRESETS["rtn-token"].with_sink(SINK)))
    config = ModelConfig.load(folder)
    with torch.inference_mode():
        expected = score(load_decoder(folder, torch.float32, CPU), torch.cat((torch.tensor(SINK), IDS)))[2:]

    def scored(ranks: object) -> Tensor:
        checkpoint = Checkpoint.open(folder, torch.float32, CPU)
        return score(Decoder(config, checkpoint, ranks=ranks, sink=sink), IDS)  # type: ignore[arg-type]

    for found in on_ranks(2, scored):
        assert error(found, expected) < 1e-5


def sizes(name: str) -> dict[str, object]:
    heads: dict[str, object] = {"hidden_size": 256, "num_attention_heads": 4}
    return heads | ({} if name.startswith("gpt") else {"num_key_value_heads": 2})


@pytest.fixture(scope="module")
def massive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gives token 1 an activation a thousand times as large as others', in its first MLP."""
    folder = save_tiny_model(tmp_path_factory.mktemp("massive") / "model", "llama", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    embedding, mlp = tensors["model.embed_tokens.weight"], "model.layers.0.mlp"
    embedding[:, 5], embedding[1], embedding[1, 5] = 0.0, 0.0, 50.0
    for name in ("gate_proj", "up_proj"):
        tensors[f"{mlp}.{name}.weight"][:, 5] = 0.0
        tensors[f"{mlp}.{name}.weight"][9, 5] = 6.0
    tensors["model.layers.0.post_attention_layernorm.weight"][5] = 1.0
    return change_tensors(folder, tensors)


WINDOWS = torch.cat((torch.ones(3, 1, dtype=torch.int64), IDS[:96].view(3, 32)), dim=1)


@pytest.mark.parametrize("scheme", ["w8a8-static", "smoothquant-o2", "smoothquant-o3", "rtn", "rtn-dynamic"])
@pytest.mark.parametrize("kv", ["float", "int8"])
def test_a_massive_first_token_widens_no_scale(massive: Path, tmp_path: Path, scheme: str, kv: str) -> None:
    # Where each token of down's input has its own scale, half of the loss is gone without a sink.
    made = replace(PRESETS[scheme].with_alpha(0.5), has_token_down=False)
    windows = WINDOWS if made.needs_calibration else None
    text = torch.cat((torch.tensor([1]), IDS.flip(0)))
    plain = load_decoder(massive, torch.float32, CPU)
    folders = {
        len(each.sink): quantized(massive, tmp_path / str(len(each.sink)), each, windows)
        for each in (made, made.with_sink([1]))
    }
    decoders = {count: load_decoder(folder, torch.float32, CPU, kv=kv) for count, folder in folders.items()}  # type: ignore[arg-type]
    with torch.inference_mode():
        expected = score(plain, text)
        without, found = (error(score(decoders[count], text)[1:], expected[1:]) for count in (0, 1))
        assert error(score(decoders[1], text)[:1], expected[:1]) < 1e-5, "after the sink itself"
        assert error(score(decoders[1], text[1:]), expected[1:]) == found, "which is added"
    assert found < 0.5 * without, (found, without)


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_smoothed_values_are_divided_as_their_channels_are(massive: Path, tmp_path: Path, alpha: float) -> None:
    """In the first layer they are what the smoothed Linears make of the embeddings, up to their rounding."""
    scheme = PRESETS["w8a8"].with_alpha(alpha)
    out = quantized(massive, tmp_path / "int8", scheme.with_sink([4]), torch.cat((0 * WINDOWS[:, :1] + 4, WINDOWS), 1))
    decoder, sink = load_decoder(out, torch.float32, CPU), sink_of(out)
    layer = decoder.layers[0]
    assert isinstance(layer.attention.qkv, Int8Linear)
    with torch.inference_mode():
        y, _ = layer.attention_norm(decoder.embedding[[4]], None)
        found = layer.attention.qkv(y)
    values = slice(4 * 64, None)
    assert error(sink.qkv[0], found) < 0.03
    assert error(sink.qkv[0][:, values], found[:, values]) < 0.03
    raw = sink_of(quantized(massive, tmp_path / "raw", PRESETS["rtn-token"].with_sink([4])))
    assert error(raw.qkv[0][:, values], found[:, values]) > 0.1, "the values were smoothed"


def test_an_engine_answers_as_the_decoder_does(massive: Path, tmp_path: Path) -> None:
    """Prompts with and without the sink, their log-probabilities, blocks found again, and the longest prompt."""
    windows, scheme = WINDOWS, PRESETS["w8a8-static"].with_alpha(0.5).with_sink([1])
    decoder = load_decoder(quantized(massive, tmp_path / "int8", scheme, windows), torch.float32, CPU, 120)
    assert (decoder.config.max_model_len, decoder.max_model_len) == (121, 120)
    own = IDS[:60].tolist()
    params = SamplingParams(4, ignore_eos=True, prompt_logprobs=0)
    engine = make_engine(decoder)

    async def ask(prompt: list[int], params: SamplingParams) -> tuple[list[Token], tuple[Token, ...], int]:
        stream = engine.submit(prompt, params, "r")
        tokens = [token async for new in stream for token in new]
        return tokens, stream.progress.prompt_logprobs, stream.progress.num_cached

    async def go() -> None:
        for prompt in (own, [1, *own], [1], [9]):
            tokens, scored, _ = await ask(prompt, params)
            text = torch.tensor(prompt + [token.id for token in tokens])
            with torch.inference_mode():
                logprobs = score(decoder, text).log_softmax(-1)
            assert [token.id for token in tokens] == logprobs[len(prompt) - 1 : -1].argmax(-1).tolist()
            expected = logprobs[: len(prompt) - 1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
            assert [token.id for token in scored] == prompt[1:]
            assert [token.logprob for token in scored] == pytest.approx(expected, abs=1e-3)
        plain = SamplingParams(4, ignore_eos=True)
        _, _, num_cached = await ask([1, *own], plain)
        assert num_cached == 48
        assert await engine.num_cached(own, "") == await engine.num_cached([1, *own], "") == 48
        tokens, _, num_cached = await ask(own, plain)
        assert num_cached == 48
        assert await collect(engine, IDS.tolist()[:100] + own[:16], plain, "longest")

    try:
        asyncio.run(go())
    finally:
        engine.stop()


def test_a_sink_that_is_missing_damaged_or_of_another_model_is_named(tiny: Tiny, tmp_path: Path) -> None:
    _, folder = tiny("llama")
    out = quantized(folder, tmp_path / "int8", PRESETS["rtn-token"].with_sink(SINK))
    sink, path = sink_of(out), out / SINK_NAME
    for wrong, message in (
        (replace(sink, qkv=sink.qkv[:1]), "1 layers of 192 columns, and the model of 2"),
        (replace(sink, hidden=sink.hidden[:, :64]), "2 layers of 64 columns"),
        (replace(sink, qkv=tuple(qkv[:, :64] for qkv in sink.qkv)), "64 numbers a token and layer, and the model 320"),
        (replace(sink, hidden=sink.hidden[:1]), r"float32 \[1, 192\], expected floats for 2 tokens"),
    ):
        wrong.save(out, torch.float32)
        with pytest.raises(CheckpointError, match=message):
            load_decoder(out, torch.float32, CPU)
    path.write_bytes(b"\x08\x00\x00")
    with pytest.raises(CheckpointError, match=r"ottava\.sink: .*; quantize the float model again"):
        load_decoder(out, torch.float32, CPU)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"ottava\.sink: "):
        load_decoder(out, torch.float32, CPU)


def test_windows_that_do_not_begin_with_it_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    _, folder = tiny("llama")
    with pytest.raises(ValueError, match=r"sink's tokens \[1, 7\]"):
        quantized(folder, tmp_path / "int8", PRESETS["w8a8-static"].with_sink(SINK), WINDOWS)
