"""uvicorn's configuration: `server_config`."""

from __future__ import annotations

import resource
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from service.busy_poll import PollingEventLoop
from service.settings import Settings
from service.web.connection import BoundedProtocol, ConnectionLimits
from service.web.parsing import ParsingTurns

OTHER_FILES = 256
"""Open files other than connections: the model's, the libraries' and the listeners."""


def server_config(app: ASGIApp, settings: Settings, **others: Any) -> uvicorn.Config:
    """uvicorn's configuration for an app under these settings; `others` override uvicorn's options.

    The event loop is asyncio's, which can poll, although uvloop may be installed, which was no faster under load.
    Requests are parsed by h11, because only h11 has a limit for the size of headers. Logs go where
    `service.telemetry.logs.configure_logging` sends them, which also replaces uvicorn's access log.
    """
    limits = ConnectionLimits(settings.receive_timeout_s, settings.send_timeout_s, settings.max_connections)
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "http": cast("type[BoundedProtocol]", partial(BoundedProtocol, limits=limits, turns=ParsingTurns())),
        "ws": "none",
        "loop": f"{PollingEventLoop.__module__}:{PollingEventLoop.__name__}",
        "log_config": None,
        "log_level": settings.log_level,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": settings.keep_alive_s,
        "h11_max_incomplete_event_size": settings.max_header_bytes,
    }
    return uvicorn.Config(app, **{**options, **others})


def allow_open_files(max_connections: int) -> int:
    """Raise this process's limit of open files to what the connections need, as far as permitted. Returns the limit.

    The default on many systems is 1024, which a thousand clients use up.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit
