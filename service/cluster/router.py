"""Ray's choice of a replica for a request.

Ray pickles this module by value into every process that sends requests, so it holds no state of its own: `directory`
is found by name there.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from service.cluster import directory


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Ray's choice of a replica for a lease, made by `ranked` in the process of the gateway."""

    def initialize_state(self, bound: int, max_waiting: int) -> None:
        """Called by Ray with `request_router_kwargs`."""
        self.bound = bound
        self.max_waiting = max_waiting
        directory.register(self)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas, best first; Ray takes the first one that is not full."""
        keys, avoid = _wanted(pending_request)
        found = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        names = [name for name in found if name not in avoid] or list(found)
        loads = {name: self.replica_queue_len_cache.get(found[name].replica_id) or 0 for name in names}
        return [[found[name]] for name in directory.best_first(keys, loads, self.bound)]

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: ReplicaResult,  # noqa: ARG002
    ) -> None:
        """Called by Ray once a replica has taken a request."""
        keys, _ = _wanted(pending_request)
        directory.sent(keys, replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray when replicas have come or gone."""
        before = set(self.curr_replicas)
        super().update_replicas(replicas)
        if before - set(self.curr_replicas):
            directory.keep(replica.replica_id.unique_id for replica in replicas)

    def urls(self) -> dict[str, str]:
        """Address of every replica that takes requests, by name."""
        replicas = list(self.curr_replicas.values())
        return {replica.replica_id.unique_id: replica.replica_metadata["url"] for replica in replicas}


def _wanted(pending_request: PendingRequest | None) -> tuple[list[bytes], list[str]]:
    """The arguments of `Replica.lease`."""
    if pending_request is None or len(pending_request.args) < 2:
        return [], []
    keys, avoid = pending_request.args[:2]
    return keys, avoid
