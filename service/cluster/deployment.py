"""Two Serve applications: replicas of the app of `assemble`, and the gateways in front of them.

A Serve configuration names `service.cluster.deployment:build` and `:build_gateway`; `ottava cluster` runs the same.

Ray places replicas and the gateway, watches them, scales, drains and replaces them, and chooses the replica of each
request. The requests themselves go from the gateway to the replica over HTTP: a token that went through Ray's streams
would cost its processes several times what it costs a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import ray
import uvicorn
from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from service.cluster import directory
from service.cluster.exchange import Lease, Unreachable
from service.cluster.gateway import Gateway
from service.cluster.kept import KeptLeases
from service.cluster.leases import Leased, Leases
from service.cluster.options import (
    APP_NAME,
    ClusterOptions,
    GatewayOptions,
    gateway_settings,
    max_ongoing_requests,
    polling_of_replicas,
    replica_settings,
)
from service.cluster.upstream import HTTPUpstream
from service.errors import InvalidSettings, QueueFull, StartupError
from service.host.assemble import assemble
from service.process import settle
from service.settings import Settings, load_settings
from service.telemetry.logs import configure_logging, log_request
from service.web.draining import FAREWELL_S, drain
from service.web.keys import Keyring, is_loopback
from service.web.middleware.envelope import Envelope
from service.web.middleware.faults import Faults
from service.web.state import Serving
from service.web.uvicorn_config import allow_open_files, server_config

REPLICA, GATEWAY = "replica", "gateway"
POLL_S = 0.05
HEALTH_EVERY_S, HEALTH_TIMEOUT_S = 2.0, 30.0
DRAIN_POLL_S = 0.5
MARGIN_S = 5.0
"""Between the end of the drain and the time when Ray ends the process."""

BIND_S = 60.0
"""How long a gateway waits for its port, which the one before it may still hold."""

BACKLOG = 2048
ROUTER = "service.cluster.router:PrefixRouter"

log = logging.getLogger(__name__)


class RayLease:
    """Implements `service.cluster.exchange.Lease`.

    Args:
        calls: the answer to the replica's call, whose end is that of the lease.
        granted: what it has said.
        leases: where it is kept.
    """

    def __init__(
        self, calls: DeploymentResponseGenerator, granted: Mapping[str, Any], leases: KeptLeases[RayLease]
    ) -> None:
        self.replica: str = granted["replica"]
        self.url: str = granted["url"]
        self.number: int = granted["number"]
        self._calls = calls
        self._leases = leases
        self._has_ended = self._was_lost = False
        self._on_lost: Callable[[], None] | None = None

    def on_lost(self, call: Callable[[], None]) -> None:
        """See `Lease.on_lost`."""
        self._on_lost = call
        if self._was_lost:
            call()

    def done(self, is_whole: bool) -> None:
        """See `Lease.done`."""
        self._on_lost = None
        is_kept = self._leases.done(self, is_whole and not self._has_ended)
        if not (is_kept or self._has_ended):
            # Else Ray would count it for as long as the replica waits for another request.
            self._calls.cancel()

    async def watch(self) -> None:
        """Wait for the end of the lease."""
        try:
            async for _ in self._calls:
                pass
        except (RayError, RayServeException, asyncio.CancelledError):
            self._was_lost = True
            if self._on_lost is not None:
                self._on_lost()
        finally:
            self._has_ended = True
            self._leases.ended(self)


class RayFleet:
    """Implements `service.cluster.exchange.Fleet` by calls of the replicas' deployment."""

    def __init__(self, replicas: DeploymentHandle, queue_timeout_s: float) -> None:
        self._replicas = replicas
        self._lease = replicas.options(stream=True).lease
        self._leases: KeptLeases[RayLease] = KeptLeases(
            self._ask, directory.best, directory.knows, max_waiting=directory.max_waiting, timeout_s=queue_timeout_s
        )
        self._watching: set[asyncio.Task[None]] = set()

    def replicas(self) -> Mapping[str, str]:
        """See `Fleet.replicas`."""
        return directory.urls()

    async def lease(self, keys: Sequence[bytes], avoid: Set[str]) -> Lease:
        """See `Fleet.lease`."""
        lease = await self._leases.lease(keys, avoid)
        directory.sent(keys, lease.replica)
        return lease

    async def _ask(self, keys: Sequence[bytes], avoid: Set[str]) -> RayLease:
        """A lease from Ray."""
        calls = self._lease.remote(list(keys), sorted(avoid))
        try:
            granted = await anext(calls)
        except asyncio.CancelledError:
            calls.cancel()
            raise
        except BackPressureError as error:
            raise QueueFull("too many requests wait for a replica; send the request again later") from error
        except (RayActorError, RayServeException, TaskCancelledError, StopAsyncIteration) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        lease = RayLease(calls, granted, self._leases)
        watching = asyncio.create_task(lease.watch())
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)
        return lease

    async def find(self) -> None:
        """Make this process learn of the replicas before the first request; returns once there is one."""
        await self._replicas.options(stream=False).ping.remote([], [])


class Replica:
    """One replica: the app of `assemble`, on a port of its own, with its engines beside it.

    Args:
        settings: see `replica_settings`.
        needs_key: whether clients of the cluster need an API key.
    """

    async def __init__(self, settings: dict[str, Any], needs_key: bool) -> None:  # type: ignore[misc]
        self._settings = polling_of_replicas(load_settings(**settings))
        _refuse_loopback_for_many(self._settings)
        configure_logging(self._settings, sys.stderr)
        allow_open_files(self._settings.max_connections)
        app = assemble(self._settings)
        self._serving: Serving = app.state.serving
        if needs_key and self._serving.keys.is_empty:
            raise InvalidSettings(
                "the cluster was started with API keys, and this machine has none: set OTTAVA_API_KEYS where Ray is "
                "started on it, or use api_keys_file"
            )
        self._leases = Leases()
        address = "127.0.0.1" if is_loopback(self._settings.host) else ray.util.get_node_ip_address()
        listener = _listener(address, 0)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._url = f"http://{_in_url(address)}:{listener.getsockname()[1]}"
        self._server = QuietServer(server_config(Leased(app, self._leases), self._settings, lifespan="on"))
        self._running = asyncio.create_task(self._server.serve([listener]))
        await self._ready()
        settle()
        log.info("replica %s serves at %s", self._name, self._url)

    async def lease(self, keys: list[bytes], avoid: list[str]) -> AsyncIterator[dict[str, Any]]:  # noqa: ARG002
        """Grant a lease, and end with it. The arguments are the router's; see `Fleet.lease`."""
        with self._leases.open() as lease:
            yield {"replica": self._name, "url": self._url, "number": lease.number}
            await self._leases.over(lease)

    async def ping(self, keys: list[bytes], avoid: list[str]) -> str:  # noqa: ARG002
        """This replica's name. The arguments are the router's."""
        return str(self._name)

    def record_replica_metadata(self) -> dict[str, Any]:
        """Called by Ray once, which passes it to the router."""
        return {"url": self._url}

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises: the rule of GET /health."""
        failures = self._serving.failures()
        if failures or self._running.done():
            raise RuntimeError(f"replica {self._name} has failed: {failures or 'its server has stopped'}")

    async def __del__(self) -> None:
        """Called by Ray once no lease is open, or its time for that is over."""
        if not hasattr(self, "_running"):
            return
        await drain(self._serving, self._settings.drain_timeout_s, "Ray stops this replica")
        self._server.should_exit = True
        await self._running

    async def _ready(self) -> None:
        """Wait for what GET /ready waits for. Raises StartupError with the reason if that cannot come."""
        host = self._serving.host
        while host.stage is not None and not host.failed.is_set() and not self._running.done():
            await asyncio.sleep(POLL_S)
        refused = "; ".join(f"{variant}: {why}" for variant, why in host.refused.items())
        if host.failure is not None or refused or self._running.done():
            raise StartupError(str(host.failure or refused or "the server has stopped"))


class GatewayServer:
    """The gateway on the cluster's address.

    Args:
        settings: see `gateway_settings`.
    """

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        self._told = settings
        self._settings = load_settings(**settings)
        configure_logging(self._settings, sys.stderr, "gateway")
        # Each request takes a connection to its client and one to its replica.
        allow_open_files(2 * self._settings.max_connections)
        self._upstream = HTTPUpstream(0.8 * self._settings.keep_alive_s)
        # The replicas' application may come later.
        replicas = serve.get_deployment_handle(REPLICA, APP_NAME, _check_exists=False)
        fleet = RayFleet(replicas, self._settings.queue_timeout_s)
        self._gateway = Gateway(fleet, self._upstream, self._settings.max_body_bytes)
        app = Envelope(Faults(self._gateway), [log_request])
        farewell_s = math.ceil(self._settings.drain_timeout_s + FAREWELL_S)
        config = server_config(app, self._settings, lifespan="off", timeout_graceful_shutdown=farewell_s)
        listener = await _listener_in_time(self._settings.host, self._settings.port)
        self._server = QuietServer(config)
        self._running = asyncio.create_task(self._server.serve([listener]))
        self._finding = asyncio.create_task(fleet.find())
        log.info("the gateway listens on %s port %d", self._settings.host, listener.getsockname()[1])

    def told(self) -> dict[str, Any]:
        """The settings that it was started with."""
        return self._told

    def check_health(self) -> None:
        """Called by Ray, which replaces a gateway that raises."""
        if self._running.done():
            raise RuntimeError("the gateway's server has stopped")

    async def __del__(self) -> None:
        """Called by Ray at the end: refuse new requests and wait for the present ones."""
        if not hasattr(self, "_running"):
            return
        self._gateway.lifecycle.drain(self._settings.drain_timeout_s)
        # Closes the listener at once, idle connections too, and others after their answer.
        self._server.should_exit = True
        await self._running
        await self._upstream.close()


class QuietServer(uvicorn.Server):
    """uvicorn's server without signal handlers: Ray ends its processes."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Change nothing."""
        yield


def build(args: ClusterOptions) -> serve.Application:
    """The application of the replicas for these options; a Serve configuration has them under `args`.

    Raises:
        InvalidSettings: a setting is invalid, or the cluster cannot have that many replicas.
    """
    settings = args.loaded()
    needs_key = not Keyring(settings).is_empty
    most_gpus = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    _refuse_loopback_for_many(settings)
    replica = serve.deployment(Replica).options(
        name=REPLICA,
        max_ongoing_requests=max_ongoing_requests(settings),
        max_queued_requests=settings.max_waiting,
        ray_actor_options={
            "num_cpus": args.cpus_per_replica,
            "num_gpus": args.gpus(settings, most_gpus),
        },
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + FAREWELL_S + MARGIN_S,
        health_check_period_s=HEALTH_EVERY_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        max_surge_percent=args.surge_percent,
        # Ray would write a line for every lease.
        logging_config={"enable_access_log": False},
        request_router_config={
            "request_router_class": ROUTER,
            # By the router, so that a change of them does not restart the gateway.
            "request_router_kwargs": {"bound": args.bound(settings), "max_waiting": settings.max_waiting},
        },
        **_scale(args, settings),
    )
    return replica.bind(replica_settings(settings), needs_key)


def build_gateway(args: GatewayOptions) -> serve.Application:
    """The application of the gateways in front of those replicas, for a Serve configuration as `build`."""
    settings = load_settings(**args.settings)
    gateway = serve.deployment(GatewayServer).options(
        name=GATEWAY,
        num_replicas=args.gateways,
        max_replicas_per_node=1,
        ray_actor_options={"num_cpus": 0} | ({} if args.resource is None else {"resources": {args.resource: 1}}),
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + FAREWELL_S + MARGIN_S,
        health_check_period_s=HEALTH_EVERY_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
    )
    return gateway.bind(gateway_settings(settings))


def _scale(args: ClusterOptions, settings: Settings) -> dict[str, Any]:
    if args.max_replicas is None:
        return {"num_replicas": args.replicas}
    autoscaling = {
        "min_replicas": args.replicas,
        "max_replicas": args.max_replicas,
        "target_ongoing_requests": args.target(settings),
    }
    return {"autoscaling_config": autoscaling}


def _refuse_loopback_for_many(settings: Settings) -> None:
    """Raise InvalidSettings if replicas on loopback would stand on several machines."""
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if is_loopback(settings.host) and len(machines) > 1:
        raise InvalidSettings(
            f"host is {settings.host}, and the cluster has {len(machines)} machines, which could not reach each "
            "other's replicas: set host to 0.0.0.0, with API keys"
        )


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


async def _listener_in_time(host: str, port: int) -> socket.socket:
    """A listener, as soon as the port is free. Raises OSError if it is not within BIND_S."""
    until_s = asyncio.get_running_loop().time() + BIND_S
    while True:
        try:
            return _listener(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or asyncio.get_running_loop().time() > until_s:
                raise
        await asyncio.sleep(POLL_S)


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address
