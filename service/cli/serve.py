"""`ottava serve`: the model over HTTP."""

from __future__ import annotations

import logging
import sys
from typing import Any

import typer

from service.cli.later import Later
from service.cli.options import FLAGS, SECRETS, Model, takes_settings
from service.cli.panel import startup_panel, url_of
from service.cli.terminal import err, progress, told_in_one_line
from service.settings import Settings, load_settings
from service.settings.file import variable_of

EXAMPLES = f"""
Every flag is also a variable, and a key of the file that --config names:
  --max-model-len 4096    OTTAVA_MAX_MODEL_LEN=4096    max_model_len = 4096
A flag beats a variable, a variable the file, the file the default.
Secrets have no flag, which every user of the machine could read: {", ".join(map(variable_of, SECRETS))}.

Examples:
  $ ottava serve                               # the demo model, on loopback
  $ ottava serve meta-llama/Llama-3.1-8B-Instruct --kv-cache int8
  $ ottava serve OUT --baseline FOLDER         # OUT: what quantize wrote
  $ ottava serve --config ottava.toml --port 9000
  $ OTTAVA_API_KEYS=anna:SECRET ottava serve --host 0.0.0.0
"""

log = logging.getLogger(__name__)
app, hosting, keys = Later("service.web.app"), Later("service.host.variants"), Later("service.web.keys")
logs, reloading, server = Later("service.telemetry.logs"), Later("service.host.reloader"), Later("service.web.server")
tracing = Later("service.telemetry.tracing")


@takes_settings(*FLAGS)
def serve(model: Model = None, **flags: Any) -> None:
    """Serve MODEL over HTTP, W8A8 beside its baseline."""
    with told_in_one_line():
        settings = load_settings(model=model, **flags)
        # Known before minutes of loading, not after them.
        has_keys = not keys.Keyring(settings).is_empty
        tracing.check_tracing()
        logs.configure_logging(settings, sys.stderr)
        with progress(log.info) as on_progress:
            hosted = hosting.open_host(settings, on_progress)
    try:
        with told_in_one_line():
            application = app.create_app(
                hosted.engines,
                settings,
                hosted.tokenizer,
                hosted.info,
                hosted.self_check,
                reloading.Reloader(hosted, settings),
            )
        _tell(hosted.info(), application.openapi()["paths"], settings, has_keys)
        exit_code = server.run(application, settings, hosted.engines)
    finally:
        hosted.stop()
    raise typer.Exit(exit_code)


def _tell(info: dict[str, Any], paths: dict[str, Any], settings: Settings, has_keys: bool) -> None:
    if settings.log_format == "json":
        # A box of text among JSON lines would break their reader.
        log.info("serving %s at %s", info["model"], url_of(settings), extra={"info": info, "needs_key": has_keys})
        return
    err.print(startup_panel(info, paths, settings, has_keys))
