"""GET /: the side-by-side page and its files, with ETags so that browsers reload only what has changed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePosixPath

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.exceptions import HTTPException
from starlette.responses import Response

INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No foreign content, no inline code, and no framing.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page with its response headers."""

    content: bytes
    media_type: str
    etag: str


def _read_files() -> dict[str, PageFile]:
    folder = resources.files("service.web") / "page"
    return {
        item.name: PageFile(
            content, MEDIA_TYPES[PurePosixPath(item.name).suffix], f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        )
        for item in folder.iterdir()
        if PurePosixPath(item.name).suffix in MEDIA_TYPES
        for content in [item.read_bytes()]
    }


FILES = _read_files()
router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: HTTPRequest) -> Response:
    """The page."""
    return _answer(request, FILES[INDEX])


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def part(name: str, request: HTTPRequest) -> Response:
    """A style sheet, script or picture of the page."""
    if name not in FILES:
        raise HTTPException(404)
    return _answer(request, FILES[name])


def _answer(request: HTTPRequest, file: PageFile) -> Response:
    """The file, or 304 if the browser has it. `no-cache` lets browsers keep it but revalidate it each time."""
    headers = {
        "etag": file.etag,
        "cache-control": "no-cache",
        "content-security-policy": CONTENT_SECURITY_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    if _has(request.headers.get("if-none-match", ""), file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


def _has(known: str, etag: str) -> bool:
    """Whether an If-None-Match header contains the tag, which may be weak if a proxy compresses."""
    tags = [tag.strip().removeprefix("W/") for tag in known.split(",")]
    return etag in tags or "*" in tags
