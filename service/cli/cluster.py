"""`ottava cluster`: many replicas of a model behind one address, on one machine or on many."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from service.cli.options import FLAGS, Model, takes_settings
from service.cli.terminal import err, told_in_one_line
from service.errors import InvalidSettings
from service.later import Later
from service.settings import load_settings
from service.settings.file import tell_service_links

if TYPE_CHECKING:
    from service.cluster import launch, options
    from service.telemetry import logs
else:
    launch, options = Later("service.cluster.launch"), Later("service.cluster.options")
    logs = Later("service.telemetry.logs")

EXAMPLES = """
Every setting of `ottava serve` is a flag here too, and holds for every replica.

Examples:
  $ ottava cluster --replicas 2                # the demo model, twice, on loopback
  $ ottava cluster FOLDER --replicas 2 --max-replicas 8 --gpus-per-replica 1
  $ ottava cluster FOLDER --address auto --host 0.0.0.0   # on a Ray that runs
  $ ottava cluster NEW --address auto --detach    # update it, replica by replica

Needs the extra: pip install 'ottava[cluster]'. More in docs/scaling.md.
"""

PANEL = "Cluster"


def _option(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=PANEL, show_default=False)


@takes_settings(*FLAGS)
def cluster(
    model: Model = None,
    replicas: Annotated[int | None, _option("Replicas to keep. [default: 1]")] = None,
    max_replicas: Annotated[int | None, _option("Most replicas under load. [default: as many as replicas]")] = None,
    target_requests: Annotated[
        float | None, _option("Requests per replica to scale for. [default: 3/4 of max-num-requests]")
    ] = None,
    gpus_per_replica: Annotated[float | None, _option("GPUs of a replica. [default: tensor-parallel]")] = None,
    cpus_per_replica: Annotated[float | None, _option("Cores set aside for a replica. [default: 1]")] = None,
    surge_percent: Annotated[
        int | None, _option("New replicas that start before old ones stop, in percent. [default: 0]")
    ] = None,
    gateways: Annotated[
        int,
        typer.Option(
            help="Machines that listen on host and port, one gateway on each.",
            min=1,
            max=256,
            rich_help_panel=PANEL,
        ),
    ] = 1,
    affinity_bound: Annotated[
        int | None,
        _option("Requests by which a known prefix may be outweighed. [default: 1/4 of max-num-requests]"),
    ] = None,
    address: Annotated[
        str | None, _option("A running Ray, such as auto. [default: one is started on this machine]")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once it serves, and leave it to Ray.", rich_help_panel=PANEL)
    ] = False,
    **flags: Any,
) -> None:
    """Serve MODEL by many replicas behind one address, with Ray Serve."""
    with told_in_one_line():
        for module in ("ray", "aiohttp"):
            if find_spec(module) is None:
                raise InvalidSettings(f"{module} is not installed: pip install 'ottava[cluster]'")
        # Read when Ray is imported. It would fold similar log lines of different requests into one, and report to its
        # makers.
        os.environ |= {"RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"} | os.environ
        settings = load_settings(model=model, **flags)
        logs.configure_logging(settings, sys.stderr, "cluster")
        tell_service_links()
        given = options.cluster_options(
            replicas=replicas,
            max_replicas=max_replicas,
            target_requests=target_requests,
            gpus_per_replica=gpus_per_replica,
            cpus_per_replica=cpus_per_replica,
            affinity_bound=affinity_bound,
            surge_percent=surge_percent,
            settings=options.replica_settings(settings),
        )
        front = options.GatewayOptions(gateways=gateways, settings=options.gateway_settings(settings))
        launch.run(given, front, address, detach, _say)


def _say(line: str) -> None:
    err.print(f"ottava: {escape(line)}", highlight=False, soft_wrap=True)
