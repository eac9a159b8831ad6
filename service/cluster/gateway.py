"""The one address of a cluster: passes requests on to replicas, and answers for all of them together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.datastructures import Headers as HeadersOf
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from service.cluster.exchange import LEASE, Answer, Fleet, Headers, Lease, Lost, Sent, Unreachable, Upstream
from service.cluster.exposition import joined
from service.cluster.prefixes import prefix_keys
from service.cluster.retries import Tries, Trouble, trouble_of
from service.errors import ClientGone, EngineFailed, NotReady, OttavaError
from service.telemetry.record import RequestRecord
from service.web.chunks import WriteChunk, chunk_writer
from service.web.failures import error_body, refusal
from service.web.generation.sse import event, unless_disconnected
from service.web.lifecycle import Lifecycle
from service.web.middleware.envelope import REQUEST_ID
from service.web.middleware.gate import is_generation, refuse_declared, too_large
from service.web.state import STOPPING

ASK_S = 5.0
"""For one replica's part of an answer about all of them."""

HOP_HEADERS = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"proxy-connection", b"expect"}
)
NOT_SENT_ON = HOP_HEADERS | {b"content-length", LEASE.encode(), REQUEST_ID.encode()}
NOT_SENT_BACK = HOP_HEADERS | {b"date", b"content-length", REQUEST_ID.encode()}

LOST = "the replica that had this request has ended, and the answer with it; send the request again"


class GatewayMetrics:
    """What only the gateway can count; what replicas count has a label `replica` instead."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._up = Gauge(
            "ottava_cluster_replica_up", "1 if this replica answered the scrape", ("replica",), registry=self.registry
        )
        self._retries = Counter(
            "ottava_cluster_retries", "Requests sent to another replica", ("reason",), registry=self.registry
        )
        self._lost = Counter(
            "ottava_cluster_lost", "Requests that ended with their replica", ("stage",), registry=self.registry
        )
        for reason in ("unstarted", "lost"):
            self._retries.labels(reason)
        for stage in ("unsent", "sent"):
            self._lost.labels(stage)

    def retried(self, reason: Trouble) -> None:
        """Count a request that is sent again."""
        self._retries.labels(reason).inc()

    def lost(self, stage: str) -> None:
        """Count a request whose client is told of a loss: before it was sent anything (unsent), or after (sent)."""
        self._lost.labels(stage).inc()

    def exposition(self, expositions: Mapping[str, str | None]) -> str:
        """Everything in Prometheus' text format. expositions: of each replica; None if it did not answer."""
        self._up.clear()
        for replica, text in expositions.items():
            self._up.labels(replica).set(text is not None)
        own = generate_latest(self.registry).decode()
        return own + joined({replica: text for replica, text in expositions.items() if text is not None})


@dataclass(slots=True)
class Relay:
    """A request on its way to replicas.

    send, write: to its client; see `service.web.chunks` for the second.   avoid: replicas that have failed it.
    """

    sent: Sent
    is_generation: bool
    send: Send
    write: WriteChunk
    tries: Tries = field(default_factory=Tries)
    avoid: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Place:
    """Where a request is sent. lease: None for a request that is no generation, and once it is done with its lease."""

    replica: str
    url: str
    headers: Headers
    lease: Lease | None = None

    def done(self, is_whole: bool) -> None:
        """See `Lease.done`. The first call counts: after it another request may have the lease."""
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.done(is_whole)


class Gateway:
    """An ASGI application in front of the replicas' applications.

    A generation needs a lease; see `Fleet.lease`. It is sent to another replica as long as its client has been sent
    nothing of an answer and `Tries` allows it. So the head of an answer is held back until the first bytes of its body
    are there, and an answer that is no stream until it is complete.

    Args:
        fleet: the replicas.
        upstream: sends to them.
        max_body_bytes: longest request body, which is kept until the answer has begun.
    """

    def __init__(self, fleet: Fleet, upstream: Upstream, max_body_bytes: int) -> None:
        self.lifecycle = Lifecycle()
        self.metrics = GatewayMetrics()
        self._fleet = fleet
        self._upstream = upstream
        self._max_body_bytes = max_body_bytes
        self._own = {
            ("GET", "/-/healthz"): self._alive,
            ("GET", "/health"): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", "/info"): self._info,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/admin/reload"): self._reload,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: RequestRecord = scope["state"]["record"]
        record.route = scope["path"]
        self.lifecycle.enter()
        try:
            sent = Sent(scope["method"], _target(scope), _forwarded(scope, record.id), await self._body(scope, receive))
            # The server sends the head alone of what answers HEAD.
            asked = replace(sent, method="GET") if sent.method == "HEAD" else sent
            own = self._own.get((asked.method, scope["path"]))
            if own is not None:
                await (await own(asked))(scope, receive, send)
                return
            relay = Relay(sent, is_generation(scope), send, chunk_writer(scope))
            if relay.is_generation:
                self.lifecycle.refuse_if_draining()
            await unless_disconnected(receive, self._relay(relay))
        except ClientGone:
            return
        except OttavaError as error:
            await refusal(error, scope["path"])(scope, receive, send)
        finally:
            self.lifecycle.leave()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises TooLarge, or ClientGone if the client leaves before it is complete."""
        refuse_declared(HeadersOf(scope=scope), self._max_body_bytes)
        parts: list[bytes] = []
        num_bytes, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            if num_bytes > self._max_body_bytes:
                raise too_large(self._max_body_bytes, "longer")
            more = message.get("more_body", False)
        return b"".join(parts)

    async def _relay(self, relay: Relay) -> None:
        """Send the request until a replica answers it, and pass the answer on.

        Raises:
            EngineFailed: two replicas ended while they had it.
            NotReady: no replica can be reached.
            QueueFull, QueueTimeout: as `Fleet.lease`.
        """
        keys = prefix_keys(relay.sent.body) if relay.is_generation else ()
        while True:
            place: Place | None = None
            try:
                place = await self._place(relay, keys)
                if await self._try(relay, place):
                    return
            except Unreachable as error:
                if not self._may_retry(relay, "unstarted"):
                    raise NotReady("no replica can be reached; send the request again") from error
            except Lost as error:
                if not self._may_retry(relay, "lost"):
                    self.metrics.lost("unsent")
                    raise EngineFailed(LOST) from error
            if place is not None:
                relay.avoid.add(place.replica)
            await asyncio.sleep(relay.tries.pause_s)

    def _may_retry(self, relay: Relay, trouble: Trouble) -> bool:
        is_allowed = relay.tries.allows(trouble)
        if is_allowed:
            self.metrics.retried(trouble)
        return is_allowed

    async def _place(self, relay: Relay, keys: Sequence[bytes]) -> Place:
        """A lease for a generation; for anything else the first replica, so that a page sees one and the same."""
        if relay.is_generation:
            lease = await self._fleet.lease(keys, relay.avoid)
            headers = [*relay.sent.headers, (LEASE.encode(), b"%d" % lease.number)]
            return Place(lease.replica, lease.url, headers, lease)
        replicas = self._fleet.replicas()
        untried = [name for name in replicas if name not in relay.avoid] or list(replicas)
        if not untried:
            raise Unreachable("there is no replica yet")
        return Place(untried[0], replicas[untried[0]], relay.sent.headers)

    async def _try(self, relay: Relay, place: Place) -> bool:
        """Send the request to this replica, and pass its answer on. False if it is to be sent to another one.

        Raises:
            Unreachable, Lost: the replica is gone, and the client has been sent nothing.
        """
        try:
            answer = await self._answer(relay, place)
            with closing(answer):
                if place.lease is not None:
                    place.lease.on_lost(answer.close)
                async with aclosing(answer.chunks()) as chunks:
                    held = await _first(chunks) if _is_stream(answer) else await _all(chunks)
                    trouble = trouble_of(answer.status, held)
                    if trouble is not None:
                        place.done(is_whole=False)
                        if self._may_retry(relay, trouble):
                            return False
                    await self._pass_on(relay, place, answer, held, chunks)
        finally:
            place.done(is_whole=False)
        return True

    async def _answer(self, relay: Relay, place: Place) -> Answer:
        """Send the request to this replica and wait for the head of its answer. Raises Unreachable or Lost."""
        sending = asyncio.ensure_future(self._upstream.send(place.url, replace(relay.sent, headers=place.headers)))
        is_lost = False

        def lost() -> None:
            nonlocal is_lost
            is_lost = True
            sending.cancel()

        if place.lease is not None:
            # A host that vanishes closes no connection; Ray notices.
            place.lease.on_lost(lost)
        try:
            return await sending
        except asyncio.CancelledError:
            sending.cancel()
            if is_lost:
                raise Lost(f"replica {place.replica} has ended") from None
            raise

    async def _pass_on(
        self, relay: Relay, place: Place, answer: Answer, held: bytes, chunks: AsyncIterator[bytes]
    ) -> None:
        """Send an answer to the client. The place is done with the replica's part, however slowly the client reads."""
        send = relay.send
        headers = [(name.lower(), value) for name, value in answer.headers if name.lower() not in NOT_SENT_BACK]
        is_stream = _is_stream(answer)
        if not is_stream:
            place.done(is_whole=True)
            headers.append((b"content-length", b"%d" % len(held)))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        if is_stream:
            await send({"type": "http.response.body", "body": held, "more_body": True})
            held = b""
            try:
                async for chunk in chunks:
                    if not relay.write(chunk):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                place.done(is_whole=True)
            except Lost:
                self.metrics.lost("sent")
                # As a replica ends a stream that failed: an event that says so, and no [DONE].
                held = event(error_body(EngineFailed(LOST)))
        await send({"type": "http.response.body", "body": held, "more_body": False})

    async def _alive(self, _: Sent) -> Response:
        """What KubeRay asks on the port of Serve before it sends traffic to a pod."""
        is_draining = self.lifecycle.is_draining
        return Response("draining" if is_draining else "success", 503 if is_draining else 200, media_type="text/plain")

    async def _health(self, _: Sent) -> Response:
        """200 while the gateway runs: Ray watches the replicas and replaces those that fail."""
        return JSONResponse({"status": "ok", "replicas": len(self._fleet.replicas())})

    async def _ready(self, sent: Sent) -> Response:
        """200 if a replica is ready, with the state of each; else 503."""
        answers = await self._ask_all(sent)
        states = {name: _json(answer) for name, answer in answers.items()}
        ready = [state for state in states.values() if state.get("ready") is True]
        if ready and not self.lifecycle.is_draining:
            return JSONResponse({"ready": True, "variants": ready[0]["variants"], "replicas": states})
        retry = {"retry-after": str(self.lifecycle.retry_after_s)}
        why = STOPPING if self.lifecycle.is_draining else "no replica is ready yet"
        return JSONResponse({"ready": False, "variants": {"cluster": why}, "replicas": states}, 503, retry)

    async def _info(self, sent: Sent) -> Response:
        """The first replica's answer, and under `replicas` what may differ: device and generation of the weights."""
        answers = await self._ask_all(sent)
        first = _first_success(answers)
        if first is None:
            return _refused(answers)
        replicas = {name: _summary(_json(answer)) for name, answer in answers.items()}
        return JSONResponse(_json(first) | {"replicas": replicas})

    async def _metrics(self, sent: Sent) -> Response:
        """The series of all replicas with a label `replica`, and the gateway's own."""
        answers = await self._ask_all(sent)
        if answers and _first_success(answers) is None:
            return _refused(answers)
        texts = {
            name: answer.content.decode() if answer is not None and answer.status == 200 else None
            for name, answer in answers.items()
        }
        return Response(self.metrics.exposition(texts), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def _reload(self, sent: Sent) -> Response:
        """Reload one replica after the other. The first failure is the answer; later ones keep their weights."""
        reloaded: dict[str, Any] = {}
        content: dict[str, Any] = {}
        for name, url in self._fleet.replicas().items():
            answer = await self._ask(url, sent, None)
            if answer is None or answer.status != 200:
                return _refused({name: answer})
            content = _json(answer)
            reloaded[name] = content
        if not reloaded:
            raise NotReady("there is no replica yet; send the request again")
        return JSONResponse(content | {"replicas": reloaded})

    async def _ask_all(self, sent: Sent) -> dict[str, Whole | None]:
        replicas = self._fleet.replicas()
        answers = await asyncio.gather(*(self._ask(url, sent, ASK_S) for url in replicas.values()))
        return dict(zip(replicas, answers, strict=True))

    async def _ask(self, url: str, sent: Sent, timeout_s: float | None) -> Whole | None:
        """One replica's whole answer; None if it is gone or takes too long."""
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._upstream.send(url, sent)
                with closing(answer):
                    async with aclosing(answer.chunks()) as chunks:
                        return Whole(answer.status, answer.headers, await _all(chunks))
        except (Unreachable, Lost, TimeoutError):
            return None


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer with its whole body."""

    status: int
    headers: Headers
    content: bytes


async def _first(chunks: AsyncIterator[bytes]) -> bytes:
    return await anext(chunks, b"")


async def _all(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


def _is_stream(answer: Answer) -> bool:
    return any(name.lower() == b"content-type" and b"event-stream" in value for name, value in answer.headers)


def _target(scope: Scope) -> str:
    query: bytes = scope["query_string"]
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    return (path.partition(b"?")[0] + (b"?" + query if query else b"")).decode("latin-1")


def _forwarded(scope: Scope, request_id: str) -> Headers:
    """The client's headers, and the id under which both logs have the request."""
    kept = [(name, value) for name, value in scope["headers"] if name not in NOT_SENT_ON]
    return [*kept, (REQUEST_ID.encode(), request_id.encode())]


def _json(answer: Whole | None) -> dict[str, Any]:
    """The object in an answer; one that says why there is none."""
    if answer is None:
        return {"ready": False, "error": "this replica does not answer"}
    try:
        found = json.loads(answer.content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _first_success(answers: Mapping[str, Whole | None]) -> Whole | None:
    return next((answer for answer in answers.values() if answer is not None and answer.status == 200), None)


def _refused(answers: Mapping[str, Whole | None]) -> Response:
    """A replica's refusal as it is, such as of a missing key; 503 if none answers."""
    answer = next((answer for answer in answers.values() if answer is not None), None)
    if answer is None:
        raise NotReady("no replica answers; send the request again")
    response = Response(answer.content, answer.status)
    response.raw_headers.extend(
        (name.lower(), value) for name, value in answer.headers if name.lower() not in NOT_SENT_BACK
    )
    return response


def _summary(info: Mapping[str, Any]) -> dict[str, Any]:
    """What may differ between replicas."""
    variants = info.get("variants") or {}
    return {
        "device": info.get("device"),
        "generations": {name: variant.get("generation") for name, variant in variants.items()},
    }
