"""A tiny random Llama, its smoothing groups and text that it wrote: what every test of quant/ starts from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import nn

from quant.convert.calibration import self_written
from tests.support.tiny_llama import NUM_LAYERS, Tiny, llama_groups, tiny_llama

# A busy machine is slow without being wrong, and examples are not kept in the working tree.
settings.register_profile("quant", deadline=None, database=None)
settings.load_profile("quant")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """A tiny model gains nothing from a second thread, which spins on a core that other tests could use."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    model = tiny_llama()
    folder = tmp_path_factory.mktemp("tiny") / "float"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear_names = [name for name in linears if name != "lm_head"]
    return Tiny(
        model, folder, self_written(model, num_windows=2, window_len=48, seed=1), llama_groups(NUM_LAYERS), linear_names
    )
