"""Runs a cluster from one command: starts or joins Ray, deploys, and takes everything down again at a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import ray
from ray import serve

from service.cluster.deployment import build, build_gateway
from service.cluster.options import APP_NAME, GATEWAY_APP_NAME, ClusterOptions, GatewayOptions, gateway_settings
from service.errors import InvalidSettings, StartupError, first_line
from service.settings import load_settings

STORE_BYTES = 100 << 20
"""Of shared memory for Ray's objects, of which there are none: Ray would take a third of the machine's."""


def run(
    options: ClusterOptions, gateways: GatewayOptions, address: str | None, detach: bool, say: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM, then drain; with detach, return as soon as the cluster serves.

    A cluster that serves already is updated, one replica after the other.

    Args:
        options: of the replicas.
        gateways: of the gateways.
        address: of a running Ray, such as "auto"; None starts one on this machine, which ends with this process.
        say: called with each line for the user.

    Raises:
        StartupError: Ray cannot be joined or started, or the replicas do not become ready.
    """
    if detach and address is None:
        raise InvalidSettings("--detach leaves replicas to a Ray that goes on: name it with --address, such as auto")
    _join(address)
    try:
        _refuse_too_few_cores(options)
        serve.start(proxy_location="Disabled")
        say("starting replicas")
        try:
            if not _has_gateways(gateways):
                # First, so that probes are answered while the replicas load.
                serve.run(build_gateway(gateways), name=GATEWAY_APP_NAME, route_prefix=None)
            serve.run(build(options), name=APP_NAME, route_prefix=None)
        except (RuntimeError, ray.exceptions.RayError) as error:
            raise StartupError(f"the replicas cannot be started: {first_line(error)}") from error
        settings = options.loaded()
        say(f"the cluster serves on {settings.host} port {settings.port} with {options.replicas} replicas or more")
        if not detach:
            _await_signal(say)
            serve.delete(GATEWAY_APP_NAME)
            serve.delete(APP_NAME)
            if address is None:
                serve.shutdown()
    finally:
        ray.shutdown()


def _has_gateways(wanted: GatewayOptions) -> bool:
    """Whether gateways run with these settings. They are left alone then: their restart would refuse connections."""
    status = serve.status().applications.get(GATEWAY_APP_NAME)
    if status is None or status.status != "RUNNING":
        return False
    number = sum(sum(states.replica_states.values()) for states in status.deployments.values())
    told = serve.get_app_handle(GATEWAY_APP_NAME).told.remote().result()
    return bool(told == gateway_settings(load_settings(**wanted.settings)) and number == wanted.gateways)


def _join(address: str | None) -> None:
    try:
        if address is None:
            # Ray trusts whoever reaches its ports: alone on a machine it is to listen there only.
            ray.init(
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                object_store_memory=STORE_BYTES,
                log_to_driver=True,
            )
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, OSError) as error:
        where = "be started" if address is None else f"be joined at {address}"
        raise StartupError(f"Ray cannot {where}: {first_line(error)}") from error


def _refuse_too_few_cores(options: ClusterOptions) -> None:
    """Raise InvalidSettings if Ray could not place the replicas, for whose room it would wait for ever."""
    wanted, there = options.replicas * options.cpus_per_replica, ray.cluster_resources().get("CPU", 0.0)
    if wanted > there:
        raise InvalidSettings(
            f"{options.replicas} replicas of {options.cpus_per_replica:g} cores need {wanted:g}, and the cluster has "
            f"{there:g}: lower --cpus-per-replica, or add machines"
        )


def _await_signal(say: Callable[[str], None]) -> None:
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    told.wait()
    for number in (signal.SIGINT, signal.SIGTERM):
        # A second one ends the process at once.
        signal.signal(number, signal.SIG_DFL)
    say("draining")
