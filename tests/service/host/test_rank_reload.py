"""A reload on two ranks: all take the new weights, or none does. Apart, since a process joins one group at a time."""

from __future__ import annotations

import asyncio
import gc
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant.scheme import PRESETS
from service.engine.api import SamplingParams, Token
from service.errors import ReloadFailed
from service.host.model_host import ModelHost
from service.host.ranks import group as ranks_group
from service.host.reloader import open_host
from service.store.calibration import Calibration
from service.store.quantized import quantize_model
from tests.support.engines import CPU, collect
from tests.support.tiny_models import change_tensors, save_tiny_model
from tests.support.two_ranks import SHAPE, settings_of

PROMPTS = [[(7 * i + 3 * j) % 250 + 3 for j in range(3 + 5 * i)] for i in range(4)]
TEXT = Calibration(num_windows=2, window_len=32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A float model, its int8 form, and the int8 form of a near one."""
    top = tmp_path_factory.mktemp("reload")
    source = save_tiny_model(top / "float", "llama", **SHAPE)
    changed = shutil.copytree(source, top / "changed")
    embedding = load_file(changed / "model.safetensors")["model.embed_tokens.weight"]
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)) * embedding.std() * 0.15
    change_tensors(changed, {"model.embed_tokens.weight": (embedding + noise).to(embedding.dtype)})
    for folder, out in ((source, top / "old"), (changed, top / "new")):
        quantize_model(folder, out, PRESETS["rtn-token"], TEXT, CPU)
    return source, top / "old", top / "new"


def opened(folder: Path, source: Path, **changes: object) -> ModelHost:
    fixed = {"random_weights": False, "baseline": str(source), "reload_root": folder.parent, "reload_wait_s": 60.0}
    return open_host(settings_of(folder, 2, **fixed | changes))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have ended this process."""
    told: list[str] = []
    monkeypatch.setattr(ranks_group, "_end", told.append)
    return told


async def _all(host: ModelHost) -> list[list[Token]]:
    engine, params = host.engines["w8a8"], SamplingParams(12, ignore_eos=True)
    return await asyncio.gather(*(collect(engine, prompt, params, str(n)) for n, prompt in enumerate(PROMPTS)))


def answers(host: ModelHost) -> list[list[int]]:
    return [[token.id for token in tokens] for tokens in asyncio.run(_all(host))]


def test_all_ranks_take_the_new_weights_at_one_step(folders: tuple[Path, Path, Path], ended: list[str]) -> None:
    source, old, new = folders
    host = opened(new, source)
    try:
        wanted = answers(host)
    finally:
        host.stop()
    host = opened(old, source)
    try:
        before = answers(host)
        assert before != wanted
        weights = [rank.weight_bytes for rank in host.info().ranks]

        async def go() -> list[list[list[Token]]]:
            """Answers of before, during and after; a request belongs to one or the other."""
            loading = asyncio.ensure_future(asyncio.to_thread(host.reload, "new"))
            rounds = []
            while not loading.done():
                rounds.append(await _all(host))
            assert loading.result().generation == 2
            return [*rounds, await _all(host)]

        rounds = [[[token.id for token in tokens] for tokens in each] for each in asyncio.run(go())]
        assert len(rounds) > 2
        for each in rounds:
            for place, ids in enumerate(each):
                assert ids in (before[place], wanted[place])
        assert rounds[-1] == wanted
        assert [rank.weight_bytes for rank in host.info().ranks] == weights
        assert host.reload(None).generation == 3
        assert answers(host) == wanted
        assert ended == []
    finally:
        host.stop()


def test_what_one_rank_cannot_load_none_serves(
    folders: tuple[Path, Path, Path], ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, old, _ = folders
    monkeypatch.setattr(ranks_group, "COMMAND", (sys.executable, "-m", "tests.support.forgetful_rank"))
    host = opened(old, source, variants=["w8a8"])
    try:
        before = answers(host)
        for _ in range(2):
            with pytest.raises(ReloadFailed, match="the old weights are: rank 1: no memory is left"):
                host.reload("new")
            assert answers(host) == before
        gc.collect()
        assert host.info().variants["w8a8"].generation == 1
        assert ended == []
    finally:
        host.stop()


def test_what_cannot_be_loaded_or_fails_the_check_no_rank_keeps(
    folders: tuple[Path, Path, Path], ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, old, new = folders
    torn = shutil.copytree(new, new.parent / "torn")
    change_tensors(torn, {"model.norm.weight": torch.zeros(3)})
    host = opened(old, source)
    try:
        before = answers(host)
        with pytest.raises(ReloadFailed, match="the old weights are"):
            host.reload("torn")
        with monkeypatch.context() as patched:
            patched.setattr("service.host.self_check.MAX_KL", 0.0)
            with pytest.raises(ReloadFailed, match="disagrees wildly"):
                host.reload("new")
        assert answers(host) == before
        assert host.reload("new").generation == 2
        assert answers(host) != before
        assert ended == []
    finally:
        host.stop()


def test_a_fault_in_what_all_ranks_do_ends_the_engines(
    folders: tuple[Path, Path, Path], ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, old, _ = folders
    host = opened(old, source, variants=["w8a8"])
    try:
        monkeypatch.setattr("service.host.reloader.runner_for", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            host.reload("new")
        assert ended == ["the first rank raised ZeroDivisionError in a reload"]
    finally:
        host.stop()
