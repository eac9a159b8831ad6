"""The page in a headless Chromium: type, run, watch both streams end, see where they part, and what went wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from service.engine.api import RankInfo
from tests.support.browser import CHROMIUM, page_app, served
from tests.support.fake_engine import INFO, NO_PID, FakeEngine
from tests.support.harness import app_of
from tests.support.narrowed import present

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; install the package chromium to run these tests"),
]
OURS = "one two three four"
THEIRS = "one two tree four"
FULL = "times the speed of fp16"


class Visit(Protocol):
    def __call__(self, app: FastAPI | None = None, **options: Any) -> Page: ...


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def engines() -> dict[str, FakeEngine]:
    return {
        "w8a8": FakeEngine("w8a8", OURS, max_model_len=512, delay_s=0.003),
        "fp16": FakeEngine("fp16", THEIRS, max_model_len=512, delay_s=0.006),
    }


@pytest.fixture
def visit(chromium: Browser, engines: dict[str, FakeEngine]) -> Iterator[Visit]:
    """Opens the page over the engines; the console must stay silent but for what the network says."""
    complaints: list[str] = []
    opened: list[tuple[BrowserContext, AbstractContextManager[str]]] = []

    def open_page(app: FastAPI | None = None, **options: Any) -> Page:
        server = served(app or page_app(engines))
        context = chromium.new_context(**options)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "Failed to load" not in said.text else None)
        opened.append((context, server))
        page.goto(server.__enter__())
        return page

    yield open_page
    for context, server in opened:
        context.close()
        server.__exit__(None, None, None)
    assert complaints == []


def lane(page: Page, variant: str) -> Locator:
    return page.locator(f'.lane[data-variant="{variant}"]')


def number(page: Page, variant: str, name: str) -> str:
    return lane(page, variant).locator(f'[data-of="{name}"]').inner_text()


def test_type_run_and_see_both_streams_end_and_where_they_part(visit: Visit, engines: dict[str, FakeEngine]) -> None:
    page = visit()
    page.get_by_label("Prompt").fill("count")
    page.get_by_label("Most tokens").fill("64")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#verdict")).to_contain_text(FULL)
    expect(page.locator("#verdict")).to_contain_text("The first 9 tokens are the same, then the texts part.")
    for variant, text, word in (("w8a8", OURS, "three"), ("fp16", THEIRS, "tree")):
        expect(lane(page, variant).locator(".text")).to_have_text(text)
        expect(lane(page, variant).locator("mark")).to_have_text(word)
        expect(lane(page, variant).locator(".state")).to_have_text("finished")
        assert float(number(page, variant, "speed")) > 0
        assert number(page, variant, "ttft").endswith(" ms")
        assert number(page, variant, "tokens") == str(len(text) + 1)
    assert (number(page, "w8a8", "weights"), number(page, "fp16", "weights")) == ("182 MB", "325 MB")
    # Fair: the second began after the first had ended, and both got what was typed.
    first, second = (engines[variant].submitted[0] for variant in ("w8a8", "fp16"))
    assert second.arrival_s >= present(first.finished_s)
    assert bytes(first.prompt_ids) == b"count"
    assert first.params.max_tokens == 64
    assert page.locator("#tracks path.ticks").count() == 2
    assert "w8a8: first token after" in present(page.locator("#tracks").get_attribute("aria-label"))


def test_each_rank_of_several_is_shown_with_its_memory_and_state(visit: Visit, engines: dict[str, FakeEngine]) -> None:
    page = visit()
    assert page.locator("#ranks").is_hidden()
    first = RankInfo(0, os.getpid(), "cuda:0", {"w8a8": 10**9, "fp16": 2 * 10**9}, {"w8a8": 5 * 10**8}, 4 * 10**9)
    app = app_of(engines, info=replace(INFO, tensor_parallel=2, ranks=[first, replace(first, rank=1, pid=NO_PID)]))
    items = visit(app).locator("#ranks li")
    expect(items).to_have_text(
        [
            "rank 0 · cuda:0 · 3.00 GB weights, 500 MB KV, 4.00 GB free · running",
            "rank 1 · cuda:0 · 3.00 GB weights, 500 MB KV, 4.00 GB free · ended",
        ]
    )


def test_the_same_texts_bear_no_mark(visit: Visit, engines: dict[str, FakeEngine]) -> None:
    engines["fp16"].reply = OURS
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#verdict")).to_contain_text(f"Both wrote the same {len(OURS) + 1} tokens.")
    assert page.locator("mark:visible").count() == 0


def test_a_text_that_ends_earlier_is_marked_at_its_end(visit: Visit, engines: dict[str, FakeEngine]) -> None:
    engines["fp16"].reply = "one two"
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(lane(page, "fp16").locator("mark")).to_have_text("end")
    expect(lane(page, "w8a8").locator("mark")).to_have_text("three")


def test_at_once_runs_both_beside_each_other_and_says_so(visit: Visit, engines: dict[str, FakeEngine]) -> None:
    page = visit()
    page.get_by_label("at once").check()
    expect(page.locator("#order-hint")).to_contain_text("not to measure")
    page.get_by_label("Temperature").fill("1")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#verdict")).to_contain_text("Each slowed the other")
    first, second = (engines[variant].submitted[0] for variant in ("w8a8", "fp16"))
    assert second.arrival_s < present(first.finished_s)
    assert first.params.seed == second.params.seed is not None


def test_text_is_shown_as_text(visit: Visit, engines: dict[str, FakeEngine]) -> None:
    engines["w8a8"].reply = engines["fp16"].reply = "<img src=x onerror=alert(1)>&amp;"
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(lane(page, "fp16").locator(".text")).to_have_text("<img src=x onerror=alert(1)>&amp;")
    assert page.locator("#lanes img").count() == 0


def test_the_requests_are_drawn_and_tabled(visit: Visit) -> None:
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#rows tr")).to_have_count(2)
    page.get_by_text("The same as a table").click()
    expect(page.locator("#rows tr").first).to_contain_text("fp16")
    expect(page.locator("#chart .mark")).to_have_count(2)
    expect(page.locator("#chart")).to_have_attribute(
        "aria-label", re.compile(r"Time per token of the last 2 requests. Median of w8a8: .* ms, fp16: .* ms")
    )
    page.get_by_label("Show").select_option("whole answer")
    expect(page.locator("#chart")).to_have_attribute("aria-label", re.compile("Time of the whole answer"))
    expect(page.locator("#recent-summary")).to_contain_text("Asked for: 1 comparison with the baseline")


def test_a_full_server_is_told_in_words(visit: Visit, engines: dict[str, FakeEngine]) -> None:
    engines["w8a8"].max_waiting = 0
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot take this now")
    expect(page.get_by_role("alert")).to_contain_text("Try again in")
    expect(lane(page, "w8a8").locator(".state")).to_have_text("failed")
    expect(page.get_by_role("button", name="Run")).to_be_enabled()


def test_a_value_out_of_range_is_told_in_the_servers_words(visit: Visit) -> None:
    page = visit()
    page.get_by_label("Most tokens").fill("5000")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("The server refused this: `max_tokens` is 5000")


def test_an_engine_that_fails_midway_leaves_what_was_said(visit: Visit, engines: dict[str, FakeEngine]) -> None:
    engines["fp16"].fail_at = 4
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("The server broke off")
    expect(lane(page, "w8a8").locator(".text")).to_have_text(OURS)
    expect(lane(page, "fp16").locator(".text")).to_have_text("one ")
    expect(lane(page, "fp16").locator(".state")).to_have_text("failed")


def test_a_stream_without_its_end_is_told(visit: Visit) -> None:
    page = visit()
    delta = {"id": "x", "variant": "w8a8", "text": "half", "token_ids": [1]}
    page.route(
        "**/generate",
        lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(delta)}\n\n"),
    )
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("cut off before its end")
    expect(lane(page, "w8a8").locator(".text")).to_have_text("half")


def test_a_network_that_is_gone_is_told_and_the_next_run_clears_it(visit: Visit) -> None:
    page = visit()
    page.route("**/generate", lambda route: route.abort())
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    page.unroute("**/generate")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#verdict")).to_contain_text(FULL)
    expect(page.locator("#error")).to_be_hidden()


def test_stop_ends_the_request_on_the_server_too(visit: Visit, engines: dict[str, FakeEngine]) -> None:
    engines["w8a8"].delay_s = 0.05
    engines["w8a8"].reply = "x" * 200
    page = visit()
    page.get_by_label("Most tokens").fill("200")
    page.get_by_role("button", name="Run").click()
    expect(lane(page, "w8a8").locator(".text")).to_contain_text("xx")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#verdict")).to_have_text("Stopped.")
    expect(lane(page, "w8a8").locator(".state")).to_have_text("stopped")
    expect(page.locator("#error")).to_be_hidden()
    for _ in range(100):
        if not engines["w8a8"].active:
            break
        page.wait_for_timeout(20)
    assert engines["w8a8"].freed[0].finish_reason == "abort"
    assert not engines["fp16"].submitted


def test_by_keyboard_alone(visit: Visit, engines: dict[str, FakeEngine]) -> None:
    engines["w8a8"].delay_s = 0.03
    page = visit()
    expect(lane(page, "w8a8")).to_be_visible()
    page.get_by_label("Prompt").press("Control+Enter")
    expect(lane(page, "w8a8").locator(".state")).to_have_text("writing")
    page.keyboard.press("Escape")
    expect(page.locator("#verdict")).to_have_text("Stopped.")
    # Tab order: prompt, tokens, temperature, order, run; and the focus can be seen.
    page.get_by_label("Prompt").focus()
    for name in ("max-tokens", "temperature", None, "run"):
        page.keyboard.press("Tab")
        if name is not None:
            expect(page.locator(f"#{name}")).to_be_focused()
    assert page.locator("#run").evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_focused()
    expect(page.locator("#verdict")).to_contain_text(FULL)
    expect(page.locator("#run")).to_be_focused()


def test_a_key_is_asked_for_used_and_kept_nowhere(visit: Visit, engines: dict[str, FakeEngine], tmp_path: Path) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text("team:sesame-sesame-sesame\n")
    page = visit(page_app(engines, api_keys_file=key_file))
    expect(page.get_by_role("alert")).to_contain_text("This server wants an API key")
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("sesame-sesame-sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_contain_text(FULL)
    expect(page.locator("#error")).to_be_hidden()
    expect(page.locator(".lane")).to_have_count(2)
    assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_one_variant_alone_has_one_column_and_no_order(visit: Visit, engines: dict[str, FakeEngine]) -> None:
    page = visit(page_app({"w8a8": engines["w8a8"]}, variants="w8a8"))
    expect(page.locator(".lane")).to_have_count(1)
    expect(page.locator("#order")).to_be_hidden()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#verdict")).to_have_text("Finished.")
    expect(lane(page, "w8a8").locator(".text")).to_have_text(OURS)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_scrolls_sideways(visit: Visit, engines: dict[str, FakeEngine], width: int) -> None:
    engines["w8a8"].reply = "w" * 300
    page = visit(viewport={"width": width, "height": 740})
    page.get_by_label("Most tokens").fill("300")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#verdict")).to_contain_text(FULL)
    page.get_by_text("The same as a table").click()
    expect(page.locator("#rows tr")).to_have_count(2)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_dark_and_light_differ_and_can_be_read(visit: Visit) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        expect(lane(page, "w8a8")).to_be_visible()
        ground = page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")
        grounds.append(ground)
        for selector in ("body", ".lede", ".state", ".lane[data-variant=w8a8] h2", ".lane[data-variant=fp16] h2"):
            ink = page.locator(selector).first.evaluate("element => getComputedStyle(element).color")
            assert contrast(ink, ground) >= 4.5, (scheme, selector)
    assert luminance(grounds[0]) > 0.8 > 0.1 > luminance(grounds[1])


def test_with_reduced_motion_the_run_still_shows_its_end(visit: Visit) -> None:
    page = visit(reduced_motion="reduce")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#verdict")).to_contain_text(FULL)
    expect(lane(page, "fp16").locator(".text")).to_have_text(THEIRS)


def test_every_control_has_a_name(visit: Visit) -> None:
    page = visit()
    expect(lane(page, "w8a8")).to_be_visible()
    for control in page.locator("textarea, input:visible, select, button, .text, [role=img]").all():
        name = control.evaluate(
            "e => e.getAttribute('aria-label') || [...(e.labels ?? [])].map(l => l.textContent).join() || e.textContent"
        )
        assert name.strip(), control
    assert page.locator("#verdict").get_attribute("role") == "status"
    assert page.locator("[aria-live]").count() == 0


def luminance(color: str) -> float:
    """Relative luminance of rgb(r, g, b). Source: WCAG 2.2."""
    parts = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio, 1 to 21. Source: WCAG 2.2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
