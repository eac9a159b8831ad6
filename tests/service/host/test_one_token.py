"""Bytes of one token's step against a count by hand, and the sentence that is made of them."""

import pytest
import torch

from quant.analysis.gpus import GPUS
from quant.scheme import PRESETS
from service.host.one_token import BOARDS, describe_one_token, step_work
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.random_weights import random_decoder

HIDDEN, INNER, VOCABULARY, LAYERS = 192, 160, 340, 2
QKV, OUT = (5 * 64, HIDDEN), (HIDDEN, 3 * 64)
GATE_UP, DOWN = (2 * INNER, HIDDEN), (HIDDEN, INNER)
LINEARS = LAYERS * sum(n * k for n, k in (QKV, OUT, GATE_UP, DOWN))
ROWS = LAYERS * sum(n for n, _ in (QKV, OUT, GATE_UP, DOWN))
HEAD = VOCABULARY * HIDDEN


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    from tests.support.tiny_models import save_tiny_model

    config = ModelConfig.load(save_tiny_model(tmp_path_factory.mktemp("one") / "tiny"), None)
    cpu = torch.device("cpu")
    return {name: random_decoder(config, PRESETS[name], torch.bfloat16, cpu) for name in ("w8a8", "fp16")}


def test_bytes_are_those_of_the_linears_and_the_head(decoders: dict[str, Decoder]) -> None:
    config = decoders["fp16"].config
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (HIDDEN, INNER, VOCABULARY)
    baseline, ours = step_work(decoders["fp16"]), step_work(decoders["w8a8"])
    assert baseline.num_bytes == 2 * (LINEARS + HEAD)
    # A float32 scale a row; the head stays float.
    assert ours.num_bytes == LINEARS + 4 * ROWS + 2 * HEAD
    assert (baseline.int8_operations, baseline.fp16_operations) == (0, 2 * (LINEARS + HEAD))
    assert (ours.int8_operations, ours.fp16_operations) == (2 * LINEARS, 2 * HEAD)


def test_on_an_unknown_device_only_the_bytes_are_told(decoders: dict[str, Decoder]) -> None:
    found = describe_one_token(decoders, "fp16", "some CPU")
    assert found.speedup_at_best == {"w8a8": None}
    megabytes = [f"{step_work(decoders[name]).num_bytes / 1e6:.3g}" for name in ("w8a8", "fp16")]
    assert found.text == (
        f"For one token, a step reads weights of {megabytes[0]} MB in w8a8 and {megabytes[1]} MB in fp16."
    )


def test_on_a_known_device_the_ratio_is_that_of_the_bytes(decoders: dict[str, Decoder]) -> None:
    found = describe_one_token(decoders, "fp16", "NVIDIA H100 80GB HBM3")
    ratio = step_work(decoders["fp16"]).num_bytes / step_work(decoders["w8a8"]).num_bytes
    assert found.speedup_at_best["w8a8"] == pytest.approx(ratio)
    assert f"At this device's 3.35 TB/s that makes w8a8 at best {ratio:.2f} times as fast" in found.text


def test_one_variant_alone_is_compared_with_nothing(decoders: dict[str, Decoder]) -> None:
    found = describe_one_token({"w8a8": decoders["w8a8"]}, "fp16", "NVIDIA H100 80GB HBM3")
    assert found.speedup_at_best == {}
    assert found.text.count("MB") == 1


def test_every_board_has_roofs() -> None:
    assert set(BOARDS.values()) == set(GPUS)
