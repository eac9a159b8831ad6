"""`ottava serve`: serves a model over HTTP."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from service.cli.options import FLAGS, SECRETS, Model, takes_settings
from service.cli.panel import startup_panel, url_of
from service.cli.terminal import Lines, err, progress, told_in_one_line
from service.engine.api import HostInfo, Stage
from service.later import Later
from service.settings import Settings, load_settings
from service.settings.file import tell_service_links, variable_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.host import assemble
    from service.telemetry import logs, tracing
    from service.web import server
else:
    assemble, server = Later("service.host.assemble"), Later("service.web.server")
    logs, tracing = Later("service.telemetry.logs"), Later("service.telemetry.tracing")

EXAMPLES = f"""
Every flag is also a variable, and a key of the file given by --config:
  --max-model-len 4096    OTTAVA_MAX_MODEL_LEN=4096    max_model_len = 4096
Flags override variables, variables override the file.
Secrets have no flag, which every user of the machine could read: {", ".join(map(variable_of, SECRETS))}.

Examples:
  $ ottava serve                               # the demo model, on loopback
  $ ottava serve meta-llama/Llama-3.1-8B-Instruct --kv-cache int8
  $ ottava serve OUT --baseline FOLDER         # OUT: what quantize wrote
  $ ottava serve --config ottava.toml --port 9000
  $ OTTAVA_API_KEYS=anna:SECRET ottava serve --host 0.0.0.0
"""

log = logging.getLogger(__name__)


@takes_settings(*FLAGS)
def serve(model: Model = None, **flags: Any) -> None:
    """Serve MODEL over HTTP, W8A8 next to its baseline."""
    with told_in_one_line(), ExitStack() as bars:
        settings = load_settings(model=model, **flags)
        tracing.check_tracing()
        logs.configure_logging(settings, sys.stderr)
        tell_service_links()
        start_up = StartUp(settings, bars)
        start_up.app = assemble.assemble(settings, start_up)
        exit_code = server.run(start_up.app, settings)
    raise typer.Exit(exit_code)


class StartUp:
    """Shows the progress of start-up, then what is served. Implements `service.host.channel.client.Watch`."""

    def __init__(self, settings: Settings, bars: ExitStack) -> None:
        self.app: FastAPI | None = None
        self._settings = settings
        self._bars = bars
        self._on_progress = bars.enter_context(progress(log.info))

    def on_stage(self, stage: Stage) -> None:
        """Show a stage; as a log line after the first start, when no bars are drawn any more."""
        self._on_progress(stage.name, stage.done, stage.total, stage.detail)

    def on_open(self, info: HostInfo) -> None:
        """Show what is served, and where."""
        self._bars.close()
        self._on_progress = Lines(log.info)
        assert self.app is not None
        has_keys = not self.app.state.serving.keys.is_empty
        if self._settings.log_format == "json":
            # A text panel between JSON lines would break their parser.
            extra = {"info": asdict(info), "needs_key": has_keys}
            log.info("serving %s at %s", info.model, url_of(self._settings), extra=extra)
        else:
            err.print(startup_panel(info, self.app.openapi()["paths"], self._settings, has_keys))
