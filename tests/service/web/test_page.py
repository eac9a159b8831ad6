"""The page's files over HTTP: types, policy, caching, and that nothing in them reaches elsewhere."""

import asyncio
import re

import httpx
import pytest

from service.web.routes.page import FILES
from tests.support.harness import app_of, client_of, two_engines

TYPES = {
    "/": "text/html; charset=utf-8",
    "/page/page.css": "text/css; charset=utf-8",
    "/page/page.js": "text/javascript; charset=utf-8",
    "/page/icon.svg": "image/svg+xml",
}


def fetched(*requests: tuple[str, str, dict[str, str]]) -> list[httpx.Response]:
    async def go() -> list[httpx.Response]:
        async with client_of(app_of(two_engines())) as client:
            return [await client.request(method, path, headers=headers) for method, path, headers in requests]

    return asyncio.run(go())


@pytest.mark.parametrize("path", TYPES)
def test_a_file_has_its_type_and_a_policy_without_inline_script(path: str) -> None:
    (response,) = fetched(("GET", path, {}))
    assert response.status_code == 200
    assert response.headers["content-type"] == TYPES[path]
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"


def test_a_file_that_the_browser_has_is_not_sent_again() -> None:
    (first,) = fetched(("GET", "/", {}))
    etag = first.headers["etag"]
    answers = fetched(
        *[("GET", "/", {"if-none-match": known}) for known in (etag, f'"other", W/{etag}', "*", '"other"', "")]
    )
    assert [answer.status_code for answer in answers] == [304, 304, 304, 200, 200]
    assert [len(answer.content) for answer in answers[:3]] == [0, 0, 0]
    assert answers[0].headers["etag"] == etag
    assert "content-security-policy" in answers[0].headers


def test_head_gives_the_headers_alone() -> None:
    got, head = fetched(("GET", "/", {}), ("HEAD", "/", {}))
    assert head.content == b""
    assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.content))


@pytest.mark.parametrize("name", ["nope.js", "..%2fapp.py", "%2e%2e/app.py", ""])
def test_only_files_of_the_page_are_served(name: str) -> None:
    (response,) = fetched(("GET", f"/page/{name}", {}))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_all_that_the_page_names_is_there_and_here() -> None:
    text = {name: file.content.decode() for name, file in FILES.items()}
    named = re.findall(r'(?:src|href)="([^"#]+)"', text["index.html"])
    named += [f"/page/{name}" for body in text.values() for name in re.findall(r'from "\./([^"]+)"', body)]
    pages = {"/docs", "/info", "/metrics", "/compare"}
    assert {path.removeprefix("/page/") for path in named if path not in pages} == set(FILES) - {"index.html"}
    for name, body in text.items():
        assert "https://" not in body, name
        assert re.findall(r"http://(?!www\.w3\.org/2000/svg)", body) == [], name


def test_the_markup_has_no_inline_script_style_or_handler() -> None:
    markup = FILES["index.html"].content.decode()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", markup) == []
