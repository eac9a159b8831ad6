"""Runs the engines in the web's process, for debugging."""

from __future__ import annotations

from functools import partial

from service.host.local import LocalLink
from service.host.machine import quiet_libraries
from service.host.reloader import open_host
from service.settings import Settings


def link(settings: Settings) -> LocalLink:
    """A link to engines that are loaded in this process."""
    quiet_libraries()
    return LocalLink(partial(open_host, settings))
