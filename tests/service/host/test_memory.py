"""What steps take of a GPU's memory, and what is said where it is short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import SHAPES
from quant.linear import FloatLinear
from quant.part import WHOLE, Part, taken
from service.errors import InvalidSettings
from service.host.memory import cache_blocks, step_bytes
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.settings import Settings

MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "steps-llama-3.1-8b-h200.json"


class Nowhere:
    """Weights that are shapes alone."""

    def tensor(self, _name: str, shape: tuple[int, ...], part: Part = WHOLE) -> Tensor:
        return taken(torch.empty(shape, dtype=torch.float16, device="meta"), part)

    def differs(self, _name: str, _other: str) -> bool:
        return False

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        has_bias: bool,
        *,
        is_transposed: bool = False,
        part: Part = WHOLE,
    ) -> FloatLinear:
        return FloatLinear(self.tensor(name, (out_features, in_features), part), None)


def decoder_of(shape: str) -> Decoder:
    return Decoder(ModelConfig.of(SHAPES[shape], 4096), Nowhere())


def settings_of(**values: object) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[arg-type]


def test_what_was_measured_fits_and_not_much_more() -> None:
    """Measured is what capturing takes, without the sampling of a full step."""
    decoder = decoder_of("llama-3.1-8b")
    for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]:
        if row["what"] == "capture":
            assert row["bytes"] < step_bytes(decoder, settings_of()) < 4 * row["bytes"]


def test_smaller_steps_take_less() -> None:
    decoder = decoder_of("llama-3.1-8b")
    changes = [{}, {"max_batched_tokens": 2048}, {"max_batched_tokens": 2048, "max_num_requests": 64}]
    sizes = [step_bytes(decoder, settings_of(**change)) for change in changes]
    assert sizes == sorted(sizes, reverse=True)
    assert step_bytes(decoder, settings_of(cuda_graphs=False)) < sizes[0]


def test_an_int8_cache_takes_room_for_the_keys_of_prompts_as_floats() -> None:
    """Eight key heads fit where gate and up do; as many as query heads do not. Twice, in float16, in steps of 4096."""
    for shape, elements in (("llama-3.1-8b", 0), ("llama-2-13b", 8 * 5120 + 5 * 5120 - 4 * 13824)):
        plain, int8 = decoder_of(shape), decoder_of(shape)
        int8.kv = "int8"
        assert step_bytes(int8, settings_of()) - step_bytes(plain, settings_of()) == 2 * 2 * 4096 * elements


def test_a_card_that_is_too_small_is_told_what_would_fit() -> None:
    decoder = decoder_of("llama-3.1-8b")
    with pytest.raises(InvalidSettings) as caught:
        cache_blocks("w8a8", decoder, settings_of(), 200 * 2**20)
    said = caught.value.message
    assert "one request of 4096 tokens takes 512 MiB" in said
    for word in (
        "max_model_len 1600 would fit",
        "max_batched_tokens (4096)",
        "max_num_requests (256)",
        "no-reload-room",
    ):
        assert word in said
    assert "\n" not in said
    with pytest.raises(InvalidSettings) as caught:
        cache_blocks("w8a8", decoder, settings_of(kv_cache_bytes=1), 1)
    assert caught.value.message.endswith("lower max_model_len or raise kv_cache_bytes")
