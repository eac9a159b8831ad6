"""The manual agrees with the code: links, paths, and its tables of settings, routes, errors, metrics and packages."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from quant.scheme import PRESETS
from service import errors
from service.models.families import FAMILIES
from tests.support.expositions import families, full_exposition
from tests.support.harness import app_of, two_engines
from tests.support.pages import MANUAL, PAGES, ROOT, anchors, name_of, text_of
from tests.support.settings_table import settings_table, written_table

DOCS = ROOT / "docs"
IN_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PACKAGES = ("kernels", "quant", "service")
PATH = re.compile(r"`((?:kernels|quant|service|tests|benchmarks|docs)/[\w./-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(IN_CODE.sub("", text_of(page))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reached_from_the_index() -> None:
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in LINK.findall(text_of(DOCS / "index.md"))}
    assert set(DOCS.rglob("*.md")) - {DOCS / "index.md"} <= linked


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_every_path_that_is_named_exists(page: Path) -> None:
    for path in PATH.findall(text_of(page)):
        assert (ROOT / path).exists(), path


def test_the_map_has_every_package() -> None:
    packages = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")}
    named = set(re.findall(r"^\| `([\w/]+)/` \|", text_of(DOCS / "architecture.md"), re.MULTILINE))
    assert {str(path.relative_to(ROOT)) for path in packages} - {"service"} <= named


def test_the_settings_are_those_of_the_code() -> None:
    assert written_table() == settings_table(), "write them with: python -m tests.support.settings_table"


def test_every_route_is_in_the_api() -> None:
    page = text_of(DOCS / "api.md")
    for path, methods in app_of(two_engines()).openapi()["paths"].items():
        for method in methods:
            assert f"`{method.upper()} {path}`" in page, path


def leaves(kind: type[errors.OttavaError]) -> Iterator[type[errors.OttavaError]]:
    for child in kind.__subclasses__():
        yield from leaves(child) if child.__subclasses__() else [child]


def test_every_error_of_http_is_in_the_api() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", text_of(DOCS / "api.md"), re.MULTILINE)
    told = {(int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    told_here = errors.StartupError | errors.ChatError | errors.BenchError
    own = [kind for kind in leaves(errors.OttavaError) if not issubclass(kind, told_here)]
    assert {(kind.status, kind.code) for kind in own} <= told


def test_every_metric_is_in_the_manual() -> None:
    names = {name for name, _, _ in families(full_exposition().text)}
    told = set(re.findall(r"`((?:ottava|process)_\w+)`", text_of(DOCS / "serving.md")))
    assert names == told


def test_every_scheme_is_in_the_manual() -> None:
    named = set(re.findall(r"`([\w-]+)`", text_of(DOCS / "schemes.md")))
    assert set(PRESETS) <= named


def test_every_family_is_in_the_manual() -> None:
    named = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE"}
    named |= {"gemma2": "Gemma 2", "gemma3_text": "Gemma 3 (text)", "phi3": "Phi-3", "opt": "OPT", "gpt2": "GPT-2"}
    named |= {"gpt_neox": "GPT-NeoX"}
    assert set(FAMILIES) == set(named)
    for page in (ROOT / "README.md", DOCS / "schemes.md"):
        for name in named.values():
            assert name in " ".join(text_of(page).split()), name


def test_every_dependency_says_why() -> None:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    needed = {re.split(r"[^\w.-]", name)[0] for name in (*project["dependencies"], *extras)} - {"ottava"}
    table = text_of(DOCS / "architecture.md").partition("## Dependencies")[2]
    named = {name for cell in re.findall(r"^\| (.+?) \|", table, re.MULTILINE) for name in cell.split(", ")}
    assert needed <= named
