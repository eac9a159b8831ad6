"""Reloads of real checkpoints under load: nobody is lost, who runs ends on the old weights, failures change nothing.

Integer sums are exact, so an answer of an int8 variant does not depend on who shared its steps: it is that of the old
weights or that of the new ones to the last token.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
from safetensors.torch import load_file

from quant.checkpoint.tensor_file import TensorFile
from quant.linear import FloatLinear, Int8Linear
from quant.part import Ranges
from quant.scheme import PRESETS, KVStorage
from service.errors import InvalidRequest, ReloadFailed
from service.host.memory import cache_budget
from service.host.model_host import ModelHost
from service.host.reloader import Reloader, open_host
from service.models.decoder import Decoder
from service.settings import Settings
from service.store.calibration import Calibration
from service.store.quantized import quantize_model
from tests.support.harness import app_over, client_of
from tests.support.tiny_models import change_tensors, save_tiny_model

T = TypeVar("T")
Expected = tuple[list[list[int]], list[list[int]]]
"""Answers of the old weights and of the new ones."""

CPU = torch.device("cpu")
TEXT = Calibration(num_windows=2, window_len=32)
PROMPTS = [f"{'hello world ' * (n % 5)}{n}" for n in range(12)]


pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(source: Path, out: Path, scheme: str = "w8a8", kv: KVStorage = "float") -> Path:
    quantize_model(source, out, PRESETS[scheme].with_kv(kv), TEXT, CPU)
    return out


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("float") / "tiny")


@pytest.fixture(scope="module")
def old_folder(tmp_path_factory: pytest.TempPathFactory, float_folder: Path) -> Path:
    return quantized(float_folder, tmp_path_factory.mktemp("old") / "old")


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory, float_folder: Path) -> Path:
    """Of the same model with noise on its embedding: near enough to serve, far enough to answer otherwise."""
    changed = shutil.copytree(float_folder, tmp_path_factory.mktemp("changed") / "changed")
    embedding = load_file(changed / "model.safetensors")["model.embed_tokens.weight"]
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)) * embedding.std() * 0.15
    change_tensors(changed, {"model.embed_tokens.weight": (embedding + noise).to(embedding.dtype)})
    return quantized(changed, tmp_path_factory.mktemp("new") / "new")


@contextmanager
def hosted(model: Path, cache: Path, **changes: Any) -> Iterator[tuple[ModelHost, Settings, Reloader]]:
    given: dict[str, Any] = {"model": str(model), "cache_dir": cache, "device": "cpu", "dtype": "float32"}
    settings = Settings(**given | {"block_size": 16, "reload_root": Path("/"), "reload_wait_s": 60.0} | changes)
    host = open_host(settings)
    try:
        yield host, settings, Reloader(host, settings)
    finally:
        host.stop()


def body_of(prompt: str) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": 12, "ignore_eos": True}


def with_client(
    host: ModelHost, settings: Settings, reload: Reloader, use: Callable[[httpx.AsyncClient], Awaitable[T]]
) -> T:
    async def go() -> T:
        host.reload = reload
        app = app_over(host, settings, host.tokenizer)
        async with client_of(app) as client:
            return await use(client)

    return asyncio.run(go())


async def ids_of(client: httpx.AsyncClient, prompt: str) -> list[int]:
    answer = await client.post("/generate", json=body_of(prompt))
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["token_ids"]
    return ids


def answers_of(host: ModelHost, settings: Settings, reload: Reloader) -> list[list[int]]:
    """What is answered now."""

    async def use(client: httpx.AsyncClient) -> list[list[int]]:
        return await asyncio.gather(*(ids_of(client, prompt) for prompt in PROMPTS))

    return with_client(host, settings, reload, use)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, old_folder: Path, new_folder: Path) -> Expected:
    """Answers of the old weights and of the new ones."""
    cache = tmp_path_factory.mktemp("cache")
    answers = []
    for folder in (old_folder, new_folder):
        with hosted(folder, cache, variants="w8a8") as (host, settings, reload):
            answers.append(answers_of(host, settings, reload))
    old, new = answers
    assert all(a != b for a, b in zip(old, new, strict=True))
    return old, new


@pytest.mark.parametrize("changes", [{}, {"max_num_requests": 3, "max_batched_tokens": 16}])
def test_under_load_nobody_is_lost(
    float_folder: Path,
    old_folder: Path,
    new_folder: Path,
    expected: Expected,
    tmp_path: Path,
    changes: dict[str, object],
) -> None:
    """Eight clients ask without pause while the weights change three times: old to new, back, and to new again."""
    limits = {"baseline": str(float_folder), **changes}
    old, new = expected

    async def use(
        client: httpx.AsyncClient,
    ) -> tuple[list[tuple[int, list[int]]], list[tuple[dict[str, Any], int]], list[list[int]], dict[str, Any]]:
        is_over = asyncio.Event()
        answers: list[tuple[int, list[int]]] = []

        async def ask(start: int) -> None:
            place = start
            while not is_over.is_set():
                answers.append((place % 12, await ids_of(client, PROMPTS[place % 12])))
                place += 5

        clients = [asyncio.ensure_future(ask(start)) for start in range(8)]
        marks: list[tuple[dict[str, Any], int]] = []
        for folder in (new_folder, old_folder, new_folder):
            while len(answers) < 20 * (len(marks) + 1):
                await asyncio.sleep(0.005)
            reloaded = await client.post("/admin/reload", json={"model": str(folder)})
            assert reloaded.status_code == 200, reloaded.text
            marks.append((reloaded.json(), len(answers)))
        late = await asyncio.gather(*(ids_of(client, prompt) for prompt in PROMPTS))
        is_over.set()
        await asyncio.gather(*clients)
        info = await client.get("/info")
        return answers, marks, late, info.json()["variants"]

    with hosted(old_folder, tmp_path, **limits) as (host, settings, reload):
        answers, marks, late, info = with_client(host, settings, reload, use)
        stats = host.engines["w8a8"].stats()
    kinds = ["old" if ids == old[place] else "new" if ids == new[place] else "neither" for place, ids in answers]
    assert "neither" not in kinds
    assert set(kinds[:20]) == {"old"}
    assert late == new
    assert kinds.count("old") > 20
    assert kinds.count("new") >= 20
    assert [mark["generation"] for mark, _ in marks] == [2, 3, 4]
    assert [mark["checkpoint"] for mark, _ in marks] == ["new", "old", "new"]
    assert (info["w8a8"]["generation"], info["w8a8"]["checkpoint"], info["fp16"]["generation"]) == (4, "new", 1)
    assert info["w8a8"]["loaded_at"] > info["fp16"]["loaded_at"][:10]
    assert (stats.num_restarts, stats.kv_cache_usage_ratio) == (0, 0)


def test_the_same_folder_quantized_again(
    float_folder: Path, old_folder: Path, new_folder: Path, expected: Expected, tmp_path: Path
) -> None:
    folder = shutil.copytree(old_folder, tmp_path / "served")
    with hosted(folder, tmp_path, baseline=str(float_folder)) as (host, settings, reload):
        before = answers_of(host, settings, reload)
        shutil.rmtree(folder)
        shutil.copytree(new_folder, folder)
        assert answers_of(host, settings, reload) == before
        reloaded = reload(None)
        assert answers_of(host, settings, reload) == expected[1]
    assert before == expected[0]
    assert (reloaded.checkpoint, reloaded.generation) == ("served", 2)
    assert 0 <= reloaded.pause_s < reloaded.load_s


def test_the_old_weights_are_let_go_and_the_cache_is_kept(
    float_folder: Path, old_folder: Path, new_folder: Path, tmp_path: Path
) -> None:
    with hosted(old_folder, tmp_path, baseline=str(float_folder)) as (host, _, reload):
        old, caches = weakref.ref(host.variants["w8a8"].decoder), host.variants["w8a8"].runner.caches
        reload(str(new_folder))
        gc.collect()
        assert old() is None
        assert host.variants["w8a8"].runner.caches is caches


def test_a_checkpoint_of_another_cache_gets_one(
    float_folder: Path, old_folder: Path, expected: Expected, tmp_path: Path
) -> None:
    """int8 keys and values, in no more memory: four times as many blocks fit as the requests can fill."""
    folder = quantized(float_folder, tmp_path / "int8-kv", kv="int8")
    budget = 1024 * 256 * 2
    with hosted(old_folder, tmp_path, baseline=str(float_folder), kv_cache_bytes=budget) as (host, settings, reload):
        blocks = host.engines["w8a8"].stats().num_blocks
        reload(str(folder))
        info, stats = asdict(host.info())["variants"]["w8a8"], host.engines["w8a8"].stats()
        assert info["kv_cache_dtype"] == "int8"
        assert "keys and values" in info["description"]
        assert stats.num_blocks > 3 * blocks
        assert stats.kv_cache_bytes <= budget
        assert len(answers_of(host, settings, reload)) == 12
        reload(str(old_folder))
        assert host.engines["w8a8"].stats().num_blocks == blocks
        assert answers_of(host, settings, reload) == expected[0]


def broken(kind: str, source: Path, float_folder: Path, folder: Path) -> Path:
    if kind == "float":
        return float_folder
    if kind == "architecture":
        return quantized(save_tiny_model(folder / "float", num_hidden_layers=1), folder / "out")
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "lacking":
        change_tensors(folder, {"model.layers.1.mlp.down_proj.weight_scale": None})
    elif kind == "overflowing":
        change_tensors(folder, {"model.norm.weight": torch.full((192,), 3e38)})
    elif kind == "nan":
        change_tensors(folder, {"model.norm.weight": torch.full((192,), torch.nan)})
    elif kind == "far":
        change_tensors(folder, {"model.norm.weight": torch.full((192,), 50.0)})
    elif kind == "pickled":
        weights.rename(folder / "model.bin")
    elif kind == "tokenizer":
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    elif kind == "end":
        for path in (folder / "config.json", folder / "generation_config.json"):
            path.write_text(path.read_text().replace('"eos_token_id": 2', '"eos_token_id": 7'))
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("float", "is not quantized, so it cannot replace an int8 variant: run `ottava quantize"),
        ("architecture", "its num_layers is 1, that of the served model 2"),
        ("truncated", "is not whole|is not a whole safetensors file"),
        ("lacking", "has no tensor model.layers.1.mlp.down_proj.weight_scale"),
        ("overflowing", "logits for check prompt 0 are not finite"),
        ("nan", r"model\.norm\.weight holds NaN or infinite values"),
        ("far", "disagrees wildly with the baseline"),
        ("pickled", "pickled"),
        ("tokenizer", "has another tokenizer"),
        ("end", "other end tokens"),
    ],
)
def test_what_fails_changes_nothing(
    float_folder: Path,
    old_folder: Path,
    expected: Expected,
    tmp_path: Path,
    kind: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = broken(kind, old_folder, float_folder, tmp_path / "broken")
    seen: list[weakref.ref[Decoder]] = []
    check = ModelHost.check

    def watched(host: ModelHost, name: str, new: Decoder, generation: int) -> None:
        seen.append(weakref.ref(new))
        check(host, name, new, generation)

    monkeypatch.setattr(ModelHost, "check", watched)
    with hosted(old_folder, tmp_path / "cache", baseline=str(float_folder)) as (host, settings, reload):
        variant = host.variants["w8a8"]
        with pytest.raises(ReloadFailed, match=words) as caught:
            reload(str(folder))
        assert host.variants["w8a8"] is variant
        # Whoever keeps the error must not keep the weights.
        gc.collect()
        assert [ref() for ref in seen] == [None] * (kind in ("overflowing", "far"))
        assert caught.value.status == 409
        assert answers_of(host, settings, reload) == expected[0]


def test_a_reload_names_folders_below_the_root_and_learns_nothing_of_others(
    float_folder: Path, old_folder: Path, new_folder: Path, tmp_path: Path
) -> None:
    """What is there and what is not is answered alike, whatever its name."""
    root = tmp_path / "root"
    shutil.copytree(new_folder, root / "new")
    (root / "file").touch()
    (root / "way-out").symlink_to(new_folder)
    (root / "loop").symlink_to(root / "loop")
    outside = [str(new_folder), str(tmp_path), "/nowhere", "/etc", "/etc/passwd", "/proc/self/root/etc", "/proc/1/cwd"]
    odd = ["", ".", "..", "~", " ", "a" * 300, "a/" * 2000, "a\0b", "\ud800", "missing", "file", "way-out", "loop"]
    odd += [str(root), f"{root}/../root2", "new/../..", "new/../../root2", f"{root}/missing"]
    with hosted(old_folder, tmp_path / "cache", baseline=str(float_folder), reload_root=root) as (_, _, reload):
        for name in [*outside, *odd]:
            with pytest.raises(InvalidRequest) as caught:
                reload(name)
            said = caught.value.message.replace(repr(name[:80]), "NAME")
            assert said == "`model` is NAME, which is no folder below this server's reload_root; name one that is"
        assert [reload(name).checkpoint for name in ("new", f"{root}/new", "new/../new/.")] == ["new"] * 3


def test_without_a_root_a_reload_names_no_folder(float_folder: Path, old_folder: Path, tmp_path: Path) -> None:
    with hosted(old_folder, tmp_path, baseline=str(float_folder), reload_root=None) as (_, _, reload):
        for name in (str(old_folder), "/nowhere"):
            with pytest.raises(InvalidRequest, match="no reload_root"):
                reload(name)
        assert reload(None).checkpoint == "old"


@pytest.mark.parametrize("moment", range(3))
def test_a_folder_that_is_cut_short_while_it_is_read_changes_nothing(
    float_folder: Path,
    old_folder: Path,
    new_folder: Path,
    expected: Expected,
    tmp_path: Path,
    moment: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before its first tensor is read, between two of them, and after the last one."""
    folder = shutil.copytree(new_folder, tmp_path / "moving")
    weights, read, num_read = folder / "model.safetensors", TensorFile.read, 0
    num_tensors = len(TensorFile(weights).entries)

    def reading(file: TensorFile, name: str, *part: Ranges | None) -> torch.Tensor:
        nonlocal num_read
        is_now = file.path == weights and num_read == (0, num_tensors // 2, num_tensors - 1)[moment]
        num_read += file.path == weights
        if is_now and moment < 2:
            os.truncate(weights, weights.stat().st_size // 2)
        tensor = read(file, name, *part)
        if is_now and moment == 2:
            os.truncate(weights, weights.stat().st_size // 2)
        return tensor

    monkeypatch.setattr(TensorFile, "read", reading)
    with hosted(old_folder, tmp_path / "cache", baseline=str(float_folder)) as (host, settings, reload):
        with pytest.raises(ReloadFailed, match=r"has changed while it was read|is not a whole safetensors file"):
            reload(str(folder))
        assert answers_of(host, settings, reload) == expected[0]


def test_an_engine_that_has_ended_takes_no_other_weights(
    float_folder: Path, old_folder: Path, new_folder: Path, tmp_path: Path
) -> None:
    with hosted(old_folder, tmp_path, baseline=str(float_folder)) as (host, _, reload):
        host.engines["w8a8"].stop()
        with pytest.raises(ReloadFailed, match="has stopped"):
            reload(str(new_folder))
        assert host.variants["w8a8"].generation == 1


def test_there_must_be_an_int8_checkpoint(float_folder: Path, old_folder: Path, tmp_path: Path) -> None:
    with (
        hosted(float_folder, tmp_path, variants="fp16") as (_, _, reload),
        pytest.raises(ReloadFailed, match="only fp16"),
    ):
        reload(str(old_folder))
    with (
        hosted(float_folder, tmp_path, variants="w8a8", random_weights=True) as (_, _, reload),
        pytest.raises(ReloadFailed, match="random weights"),
    ):
        reload(None)


def test_a_model_that_was_quantized_at_start_reloads_from_the_cache(float_folder: Path, tmp_path: Path) -> None:
    """Its folder is the one in the cache, not the float model's."""
    with hosted(float_folder, tmp_path) as (host, _, reload):
        assert reload(None).checkpoint.startswith("tiny-w8a8-")
        assert host.self_check() == {}


def test_a_reload_keeps_the_head_in_int8(float_folder: Path, tmp_path: Path) -> None:
    with hosted(float_folder, tmp_path, quantize_head=True) as (host, _, reload):
        for _ in range(2):
            assert isinstance(host.variants["w8a8"].decoder.head, Int8Linear)
            assert isinstance(host.variants["fp16"].decoder.head, FloatLinear)
            assert reload(None).generation == host.variants["w8a8"].generation
        assert host.self_check() == {}


def test_with_drafts_no_weights_are_taken_whose_rows_depend_on_each_other(
    float_folder: Path, old_folder: Path, tmp_path: Path
) -> None:
    tied = quantized(float_folder, tmp_path / "tied", "rtn-dynamic")
    for speculate in ("none", "ngram"):
        with hosted(old_folder, tmp_path / "cache", variants="w8a8", speculate=speculate) as (host, _, reload):
            if speculate == "none":
                assert reload(str(tied)).generation == 2
                continue
            with pytest.raises(ReloadFailed, match="the old weights are: speculate is 'ngram', but the scheme of w8a8"):
                reload(str(tied))
            assert host.variants["w8a8"].generation == 1


def test_room_for_a_second_copy_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (1000, 2000))
    cuda = torch.device("cuda")
    assert cache_budget(cuda, 2) == 450
    assert cache_budget(cuda, 2, room=400) == 270
    assert cache_budget(cuda, 1, room=2000) == 0
    assert cache_budget(cuda, 2, room=400, steps=60) == 270, "steps fit into the tenth that stays free"
    assert cache_budget(cuda, 2, room=400, steps=200) == 200
    assert cache_budget(cuda, 1, steps=2000) == 0
