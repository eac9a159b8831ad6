"""The panel that `ottava serve` shows once it serves: model, addresses and API keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from service.engine.api import HostInfo, VariantInfo
from service.settings import Settings
from service.web.keys import is_loopback

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (compared with, not listened on)
"""Wildcard address to listen on -> address to call it from this machine."""

Paths = Mapping[str, Iterable[str]]
"""Route -> its methods in lower case, as in OpenAPI."""


def startup_panel(info: HostInfo, paths: Paths, settings: Settings, has_keys: bool) -> Panel:
    """The panel: model, device, variants, expected gain, endpoints, keys.

    Args:
        info: what is served.
        paths: the app's routes.
        has_keys: whether clients need an API key.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, text in _rows(info, paths, settings, has_keys):
        grid.add_row(name, text)
    return Panel(grid, title=f"ottava {escape(info.versions['ottava'])}", title_align="left")


def url_of(settings: Settings) -> str:
    """The server's URL on this machine, with a placeholder if the system chooses the port."""
    host = EVERYWHERE.get(settings.host, settings.host)
    port = settings.port or "PORT"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _rows(info: HostInfo, paths: Paths, settings: Settings, has_keys: bool) -> Iterator[tuple[str, str]]:
    url = escape(url_of(settings))
    yield "model", escape(f"{info.model} ({info.family}), up to {info.max_model_len} tokens")
    yield "device", escape(info.device)
    if info.tensor_parallel > 1:
        yield "ranks", f"{info.tensor_parallel}, one process each; sizes below are those of the first"
    if settings.config is not None:
        yield "settings", escape(str(settings.config))
    yield "", ""
    for place, (name, variant) in enumerate(info.variants.items()):
        yield name, escape(_variant(variant, is_default=place == 0))
    yield "gain", escape(info.one_token.text)
    yield "", ""
    yield "page", f"{url}/"
    yield "docs", f"{url}/docs"
    yield "POST", "  ".join([f"{url}/generate", *_routes(paths, "post", besides="/generate")])
    yield "GET", "  ".join(_routes(paths, "get"))
    yield "chat", f"ottava chat{'' if url.endswith(':8000') else f' --url {url}'}"
    if not settings.port:
        yield "PORT", "chosen by the system: the log names it"
    yield "", ""
    yield "keys", _keys(settings, has_keys)


def _variant(variant: VariantInfo, is_default: bool) -> str:
    scheme = variant.description or "float weights and activations"
    memory = f"{variant.weight_bytes / 1e6:,.0f} MB weights"
    cache = f"{variant.kv_cache_bytes / 1e6:,.0f} MB {variant.kv_cache_dtype} KV cache"
    named = f"{variant.scheme}, " if variant.scheme not in (None, "fp16", "w8a8") else ""
    return f"{'default; ' if is_default else ''}{variant.dtype}, {memory}, {cache}; {named}{scheme}"


def _routes(paths: Paths, method: str, besides: str = "") -> list[str]:
    return [escape(path) for path, methods in paths.items() if method in methods and path != besides]


def _keys(settings: Settings, has_keys: bool) -> str:
    if is_loopback(settings.host):
        return "on" if has_keys else f"off: every client on this machine is served; others cannot reach {settings.host}"
    where = escape(f"listening on {settings.host}, which other machines may reach")
    if has_keys:
        return f"on; {where}: keys and texts cross the network in the clear unless a proxy adds TLS"
    return f"[bold yellow]off; {where}: everybody who gets there is served[/]"
