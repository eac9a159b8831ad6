"""How a cluster is laid out: the options of `ottava cluster`, and the arguments of a Serve configuration."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import InvalidSettings
from service.settings import Settings, load_settings, without_secrets

APP_NAME = "ottava"
GATEWAY_APP_NAME = "ottava-gateway"
"""An application of its own, so that an update of the replicas' does not restart it."""

FOR_REPLICAS_ALONE = frozenset({"config"})
"""Already merged into the others."""

OF_THE_GATEWAY = (
    "host", "port", "max_body_bytes", "max_header_bytes", "max_connections", "receive_timeout_s", "send_timeout_s",
    "keep_alive_s", "drain_timeout_s", "queue_timeout_s", "log_level", "log_format",
)  # fmt: skip
"""Settings that the gateway reads."""


class ClusterOptions(BaseModel):
    """Every option; the order is that of help."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(1, ge=1, le=1024, description="Replicas to keep, however few requests there are.")
    max_replicas: int | None = Field(
        None, ge=1, le=1024, description="Most replicas under load; none: as many as `replicas`, without autoscaling."
    )
    target_requests: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Requests per replica that autoscaling aims at; none: three quarters of max_num_requests.",
    )
    gpus_per_replica: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="GPUs of one replica; none: `tensor_parallel`, which is 1, if the cluster has any, else 0.",
    )
    cpus_per_replica: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="CPU cores that Ray sets aside for one replica."
    )
    affinity_bound: int | None = Field(
        None,
        ge=0,
        description="Requests that a replica may have more than the least loaded one and still be chosen for a known "
        "prefix; none: a quarter of max_num_requests.",
    )
    surge_percent: int = Field(
        0,
        ge=0,
        le=100,
        description="Replicas of a new version that start before old ones stop, in percent; they need room of their "
        "own. 0: one old replica stops, then a new one starts.",
    )
    settings: dict[str, Any] = Field({}, description="Settings of `ottava serve`, for every replica.")

    @model_validator(mode="after")
    def _refuse_fewer_than_few(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, below replicas {self.replicas}: raise the first or lower the "
                "second"
            )
        return self

    def loaded(self) -> Settings:
        """The settings of a replica. Raises InvalidSettings as `load_settings`."""
        return load_settings(**self.settings)

    def bound(self, settings: Settings) -> int:
        """`affinity_bound`, or its default."""
        return self.affinity_bound if self.affinity_bound is not None else max(1, settings.max_num_requests // 4)

    def target(self, settings: Settings) -> float:
        """`target_requests`, or its default."""
        return self.target_requests or max(1.0, settings.max_num_requests * 0.75)

    def gpus(self, settings: Settings, most_gpus: float) -> float:
        """`gpus_per_replica`, or its default in a cluster whose machine with most GPUs has this many.

        Ray places a replica on one machine and shows its GPUs alone to it; its ranks inherit that.

        Raises:
            InvalidSettings: the settings want a GPU, and the cluster has none; or there is not one for each rank.
        """
        if settings.device == "cuda" and not most_gpus and self.gpus_per_replica is None:
            raise InvalidSettings("device is cuda, and no machine of the cluster has a GPU; add one, or serve on cpu")
        uses_gpus, size = bool(most_gpus) and settings.device != "cpu", settings.tensor_parallel
        wanted = (float(size) if uses_gpus else 0.0) if self.gpus_per_replica is None else self.gpus_per_replica
        # A cluster that scales may have no machine with a GPU yet.
        if most_gpus and wanted > most_gpus:
            raise InvalidSettings(
                f"a replica takes {wanted:g} GPUs of one machine (gpus_per_replica, tensor_parallel {size}), and no "
                f"machine of the cluster has more than {most_gpus:g}; lower tensor_parallel, or add such a machine"
            )
        if size > 1 and 0 < wanted < size:
            raise InvalidSettings(
                f"gpus_per_replica is {wanted:g}, and tensor_parallel {size} takes a GPU for each rank; raise the "
                f"first to {size}, or leave it out"
            )
        return wanted


class GatewayOptions(BaseModel):
    """Options of the gateways; in a Serve configuration the `args` of an application of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gateways: int = Field(1, ge=1, le=256, description="Machines that listen on host and port, one gateway on each.")
    resource: str | None = Field(
        None,
        min_length=1,
        description="A resource of Ray's, one of which a machine with a gateway must have; none: any.",
    )
    settings: dict[str, Any] = Field({}, description="Settings of `ottava serve`; those of HTTP count.")


def cluster_options(**given: Any) -> ClusterOptions:
    """Options from those that are not None. Raises InvalidSettings in one line with name, value and limit."""
    try:
        return ClusterOptions(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        said = [".".join(map(str, e["loc"])) + f" = {e['input']!r}: {e['msg']}" if e["loc"] else e["msg"]
                for e in error.errors()]  # fmt: skip
        raise InvalidSettings("; ".join(said).replace("Value error, ", "")) from error


def max_ongoing_requests(settings: Settings) -> int:
    """Requests that a replica takes: those that share a step, and those that may queue for it."""
    return settings.max_num_requests + settings.max_waiting


def polling_of_replicas(settings: Settings) -> Settings:
    """The settings of a replica, which may share its machine's cores: it polls if it is told to, or if it has several
    ranks, which wait for each other in every step."""
    if settings.busy_poll_ms is not None or settings.tensor_parallel > 1:
        return settings
    return settings.model_copy(update={"busy_poll_ms": 0.0})


def replica_settings(settings: Settings) -> dict[str, Any]:
    """What a replica is told: all but secrets, which it finds on its own machine, and a file that is read already."""
    told = without_secrets(settings)
    return {name: value for name, value in told.items() if value is not None and name not in FOR_REPLICAS_ALONE}


def gateway_settings(settings: Settings) -> dict[str, Any]:
    """What the gateway is told."""
    told = without_secrets(settings)
    return {name: told[name] for name in OF_THE_GATEWAY if told[name] is not None}
