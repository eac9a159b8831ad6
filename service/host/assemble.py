"""Builds the application from its settings: `assemble`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from service.host.channel.client import HostClient, Link, Watch
from service.host.channel.process import ProcessLink
from service.host.limits import fault_limits
from service.later import Later
from service.settings import Settings
from service.text.tokenizer import Tokenizer
from service.web.app import create_app

if TYPE_CHECKING:
    from service.host import in_process
else:
    # Imports torch, which the web process does without unless the engines run in it.
    in_process = Later("service.host.in_process")


def assemble(settings: Settings, watch: Watch | None = None) -> FastAPI:
    """The application for these settings. Its engines start with it, in their own process unless `in_process` is set.

    Args:
        watch: notified of the progress of start-up.

    Raises:
        InvalidSettings: the settings of API keys or traces are invalid.
    """
    link: Link = in_process.link(settings) if settings.in_process else ProcessLink(settings)
    host = HostClient(
        settings.variants,
        link,
        load_tokenizer=Tokenizer.from_folder,
        limits=fault_limits(settings),
        max_waiting=settings.max_waiting,
        watch=watch,
    )
    app = create_app(host, settings)
    # Now, while no client waits, and not within the first request for it.
    app.openapi()
    return app
