"""What the gateway does with answers, losses and refusals, over replicas that are scripted."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence, Set
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from service.cluster.exchange import LEASE, Answer, Headers, Lease, Lost, Sent, Unreachable
from service.cluster.gateway import Gateway
from service.cluster.retries import MAX_UNSTARTED
from service.errors import Draining, EngineFailed, NotReady, OttavaError, QueueFull, RateLimited
from service.settings import Settings
from service.web.connection import ChunkWriter
from service.web.failures import error_body
from service.web.generation.sse import DONE, event
from service.web.middleware.envelope import Envelope
from service.web.middleware.faults import Faults
from service.web.uvicorn_config import server_config
from tests.support.harness import DEADLINE_S, until

JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"
BODY = {"prompt": "x", "max_tokens": 3}
SCOPE: dict[str, Any] = {
    "type": "http", "scheme": "http", "method": "POST", "path": "/generate", "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
}  # fmt: skip
TOKENS = [b'data: {"text": "a"}\n\n', b'data: {"text": "b"}\n\n']


class Scripted:
    """An answer of these chunks; an exception among them is raised in its place."""

    def __init__(self, status: int, kind: str, *chunks: bytes | Exception) -> None:
        self.status = status
        self.headers: Headers = [
            (b"Content-Type", kind.encode()), (b"Date", b"now"), (b"X-Request-Id", b"theirs"), (b"X-Own", b"kept"),
        ]  # fmt: skip
        self.is_closed = False
        self._chunks = chunks

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        for chunk in self._chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    def close(self) -> None:
        self.is_closed = True


class GivenLease:
    def __init__(self, replica: str, number: int) -> None:
        self.replica, self.url, self.number = replica, f"http://{replica}", number
        self.is_whole: list[bool] = []

    def on_lost(self, call: Callable[[], None]) -> None:
        self.lost = call

    def done(self, is_whole: bool) -> None:
        self.is_whole.append(is_whole)


class Cluster:
    """Replicas a, b, c ...: each has a list of what it does with one request after the other."""

    def __init__(self, **scripts: list[Scripted | Exception]) -> None:
        self.scripts = {name: list(script) for name, script in scripts.items()}
        self.sent: list[tuple[str, Sent]] = []
        self.avoided: list[Set[str]] = []
        self.keys: list[Sequence[bytes]] = []
        self.refusals: list[Exception] = []
        self.lent: list[GivenLease] = []
        self.gateway = Gateway(self, self, max_body_bytes=1000)
        self.app = Envelope(Faults(self.gateway), [])

    def replicas(self) -> Mapping[str, str]:
        return {name: f"http://{name}" for name in self.scripts}

    async def lease(self, keys: Sequence[bytes], avoid: Set[str]) -> Lease:
        if self.refusals:
            raise self.refusals.pop(0)
        self.avoided.append(set(avoid))
        self.keys.append(keys)
        fresh = [name for name in self.scripts if name not in avoid] or list(self.scripts)
        self.lent.append(GivenLease(fresh[0], 40 + len(self.sent)))
        return self.lent[-1]

    async def send(self, url: str, sent: Sent) -> Answer:
        name = url.removeprefix("http://")
        self.sent.append((name, sent))
        answer = self.scripts[name].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def asked(self) -> list[str]:
        return [name for name, _ in self.sent]

    def ask(self, method: str = "POST", path: str = "/generate", **options: Any) -> httpx.Response:
        async def scenario() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://cluster") as client:
                return await asyncio.wait_for(client.request(method, path, **options), DEADLINE_S)

        return asyncio.run(scenario())

    def generate(self) -> httpx.Response:
        return self.ask(json=BODY)

    def counts(self) -> dict[str, float]:
        families = text_string_to_metric_families(self.gateway.metrics.exposition({}))
        return {
            f"{sample.name} {next(iter(sample.labels.values()))}": sample.value
            for family in families
            for sample in family.samples
            if sample.name.endswith("_total") and sample.value
        }


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cluster.retries.MAX_PAUSE_S", 0.0)


def whole(status: int = 200, **body: Any) -> Scripted:
    return Scripted(status, JSON, json.dumps(body).encode())


def refused(error: OttavaError) -> Scripted:
    return Scripted(error.status, JSON, error_body(error).model_dump_json().encode())


def stream(*chunks: bytes | Exception) -> Scripted:
    return Scripted(200, EVENTS, *chunks)


def test_an_answer_is_passed_on() -> None:
    cluster = Cluster(a=[whole(text="hi")])
    answer = cluster.generate()
    assert (answer.status_code, answer.json()) == (200, {"text": "hi"})
    assert answer.headers["x-own"] == "kept"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert "date" not in answer.headers
    assert answer.headers["x-request-id"] != "theirs"
    ((_, sent),) = cluster.sent
    assert (sent.method, sent.target, json.loads(sent.body)) == ("POST", "/generate", BODY)
    headers = dict(sent.headers)
    assert headers[LEASE.encode()] == b"40"
    assert headers[b"x-request-id"].decode() == answer.headers["x-request-id"]
    assert headers[b"host"] == b"cluster"
    assert b"content-length" not in headers


def test_a_client_cannot_bring_a_lease_but_its_own_id_and_key() -> None:
    cluster = Cluster(a=[whole()])
    own = {LEASE: "7", "x-request-id": "mine", "authorization": "Bearer k"}
    assert cluster.ask(json=BODY, headers=own).headers["x-request-id"] == "mine"
    ((_, sent),) = cluster.sent
    assert [value for name, value in sent.headers if name == LEASE.encode()] == [b"40"]
    assert (b"x-request-id", b"mine") in sent.headers
    assert (b"authorization", b"Bearer k") in sent.headers


def test_a_stream_is_passed_on() -> None:
    cluster = Cluster(a=[stream(*TOKENS, DONE)])
    answer = cluster.generate()
    assert answer.content == b"".join(TOKENS) + DONE
    assert answer.headers["content-type"] == EVENTS
    assert cluster.counts() == {}


def test_behind_a_server_a_stream_goes_past_send(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = ChunkWriter.write

    def noted(self: ChunkWriter, data: bytes) -> bool:
        written.append(data)
        return write(self, data)

    monkeypatch.setattr(ChunkWriter, "write", noted)
    cluster = Cluster(a=[stream(b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n")])

    async def scenario() -> httpx.Response:
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(server_config(cluster.app, Settings(), log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with httpx.AsyncClient() as client:
                url = f"http://127.0.0.1:{listener.getsockname()[1]}/generate"
                return await asyncio.wait_for(client.post(url, json=BODY), DEADLINE_S)
        finally:
            server.should_exit = True
            await serving

    assert asyncio.run(scenario()).content == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert written == [b"data: 2\n\n", b"data: [DONE]\n\n"], "the first comes with the head of the answer"


def test_the_query_and_escapes_of_a_path_stay() -> None:
    cluster = Cluster(a=[whole()])
    cluster.ask("GET", "/v1/models/a%2Fb?x=%20y")
    assert cluster.sent[0][1].target == "/v1/models/a%2Fb?x=%20y"


@pytest.mark.parametrize("first", [Unreachable("refused"), refused(Draining("stops")), refused(NotReady("starts")),
                                   refused(QueueFull("full"))])  # fmt: skip
def test_what_has_not_started_goes_elsewhere(first: Scripted | Exception) -> None:
    cluster = Cluster(a=[first], b=[whole(text="hi")])
    assert cluster.generate().json() == {"text": "hi"}
    assert cluster.asked == ["a", "b"]
    assert cluster.avoided == [set(), {"a"}]
    assert cluster.counts() == {"ottava_cluster_retries_total unstarted": 1}


@pytest.mark.parametrize(
    "first",
    [
        Lost("reset"),
        Scripted(200, JSON, Lost("cut")),
        Scripted(200, JSON, b'{"text": "ha', Lost("cut")),
        stream(Lost("cut")),
        refused(EngineFailed("died")),
        stream(event(error_body(EngineFailed("died")))),
    ],
)  # fmt: skip
def test_what_is_lost_before_anything_was_sent_goes_elsewhere(first: Scripted | Exception) -> None:
    cluster = Cluster(a=[first], b=[stream(*TOKENS, DONE)])
    assert cluster.generate().content == b"".join(TOKENS) + DONE
    assert cluster.asked == ["a", "b"]
    assert cluster.counts() == {"ottava_cluster_retries_total lost": 1}


def test_a_stream_that_has_begun_ends_with_an_error_event() -> None:
    cluster = Cluster(a=[stream(*TOKENS, Lost("cut"))], b=[whole()])
    answer = cluster.generate()
    assert answer.status_code == 200
    *events, last, rest = answer.content.split(b"\n\n")
    assert [each + b"\n\n" for each in events] == TOKENS
    assert rest == b""
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"] == "engine_failed"
    assert "send the request again" in error["message"]
    assert cluster.asked == ["a"]
    assert cluster.counts() == {"ottava_cluster_lost_total sent": 1}


def test_an_error_of_a_running_stream_is_the_replicas_own() -> None:
    told = event(error_body(EngineFailed("died")))
    cluster = Cluster(a=[stream(TOKENS[0], told)], b=[whole()])
    assert cluster.generate().content == TOKENS[0] + told
    assert cluster.asked == ["a"]


def test_a_request_that_ends_two_replicas_is_not_sent_to_a_third() -> None:
    cluster = Cluster(a=[Lost("cut")], b=[Lost("cut")], c=[whole()])
    answer = cluster.generate()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")
    assert cluster.asked == ["a", "b"]
    assert cluster.counts() == {"ottava_cluster_retries_total lost": 1, "ottava_cluster_lost_total unsent": 1}


def test_the_last_refusal_is_passed_on() -> None:
    cluster = Cluster(a=[refused(Draining("it stops")) for _ in range(MAX_UNSTARTED)])
    answer = cluster.generate()
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "it stops")
    assert len(cluster.sent) == MAX_UNSTARTED


def test_without_a_replica_that_answers_a_client_is_told_so() -> None:
    cluster = Cluster(a=[Unreachable("refused") for _ in range(MAX_UNSTARTED)])
    answer = cluster.generate()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert "retry-after" in answer.headers


@pytest.mark.parametrize(
    ("error", "status"), [(RateLimited("slow down"), 429), (OttavaError("fault"), 500)]
)  # fmt: skip
def test_other_errors_are_the_clients(error: OttavaError, status: int) -> None:
    cluster = Cluster(a=[refused(error)], b=[whole()])
    assert cluster.generate().status_code == status
    assert cluster.asked == ["a"]


def test_a_full_cluster_refuses() -> None:
    cluster = Cluster(a=[])
    cluster.refusals = [QueueFull("full")]
    answer = cluster.generate()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_full")


def test_a_replica_that_ends_while_it_is_chosen_is_followed_by_another() -> None:
    cluster = Cluster(a=[whole(text="hi")])
    cluster.refusals = [Unreachable("ended")]
    assert cluster.generate().json() == {"text": "hi"}


def test_a_lost_lease_closes_its_answer() -> None:
    """A host that vanishes sends nothing more; Ray notices, and the request must not wait for the connection."""

    async def scenario() -> None:
        closed = asyncio.Event()

        class Hanging(Scripted):
            async def chunks(self) -> AsyncGenerator[bytes, None]:
                yield TOKENS[0]
                await closed.wait()
                raise Lost("closed")

            def close(self) -> None:
                closed.set()

        class Watched(Cluster):
            async def lease(self, keys: Sequence[bytes], avoid: Set[str]) -> Lease:
                self.lent = [GivenLease("a", 1)]
                return self.lent[0]

        cluster = Watched(a=[Hanging(200, EVENTS)])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(cluster.app), base_url="http://c") as client:
            asked = asyncio.create_task(client.post("/generate", json=BODY))
            while not cluster.sent:
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            cluster.lent[0].lost()
            answer = await asyncio.wait_for(asked, DEADLINE_S)
        assert b"engine_failed" in answer.content

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("first", "is_whole"),
    [
        (whole(text="hi"), True),
        (stream(*TOKENS, DONE), True),
        (refused(RateLimited("slower")), True),
        (stream(TOKENS[0], Lost("ended")), False),
        (refused(Draining("stopping")), False),
        (Unreachable("refused"), False),
        (Lost("ended"), False),
    ],
    ids=["whole", "stream", "refused", "cut off", "sent again", "unreachable", "lost"],
)
def test_a_lease_is_done_once_and_may_be_used_again_after_a_whole_answer(
    first: Scripted | Exception, is_whole: bool
) -> None:
    cluster = Cluster(a=[first], b=[whole(text="hi")])
    cluster.generate()
    assert cluster.lent[0].is_whole == [is_whole]
    assert all(lease.is_whole == [True] for lease in cluster.lent[1:])


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_client_that_leaves_gives_its_lease_back_unfinished(has_begun: bool) -> None:
    async def scenario() -> None:
        class Endless(Scripted):
            async def chunks(self) -> AsyncGenerator[bytes, None]:
                yield TOKENS[0]
                await asyncio.sleep(DEADLINE_S)

        class Slow(Cluster):
            async def send(self, url: str, sent: Sent) -> Answer:
                answer = await super().send(url, sent)
                await asyncio.sleep(0.0 if has_begun else DEADLINE_S)
                return answer

        cluster, begun = Slow(a=[Endless(200, EVENTS)]), asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await (begun.wait() if has_begun else until(lambda: bool(cluster.sent)))
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                begun.set()

        await asyncio.wait_for(cluster.app(SCOPE | {"state": {}}, receive, send), DEADLINE_S)
        assert [lease.is_whole for lease in cluster.lent] == [[False]]

    asyncio.run(scenario())


@pytest.mark.parametrize("answer", [whole(text="hi"), stream(*TOKENS, DONE)], ids=["whole", "stream"])
def test_a_client_that_reads_slowly_keeps_no_lease_and_takes_none_from_the_next(answer: Scripted) -> None:
    async def scenario() -> None:
        cluster, has_read = Cluster(a=[answer]), asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await has_read.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body" and not message["more_body"]:
                await has_read.wait()

        asked = asyncio.create_task(cluster.app(SCOPE | {"state": {}}, receive, send))
        await until(lambda: [lease.is_whole for lease in cluster.lent] == [[True]])
        # From now on another request may have it.
        has_read.set()
        await asyncio.wait_for(asked, DEADLINE_S)
        assert [lease.is_whole for lease in cluster.lent] == [[True]]

    asyncio.run(scenario())


def test_a_replica_that_vanishes_before_the_head_of_an_answer_is_lost() -> None:
    async def scenario() -> None:
        class Vanished(Cluster):
            async def send(self, url: str, sent: Sent) -> Answer:
                if url != "http://a":
                    return await super().send(url, sent)
                self.sent.append(("a", sent))
                await asyncio.sleep(DEADLINE_S)
                raise AssertionError

        cluster = Vanished(a=[], b=[whole(text="hi")])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(cluster.app), base_url="http://c") as client:
            asked = asyncio.create_task(client.post("/generate", json=BODY))
            await until(lambda: bool(cluster.sent))
            cluster.lent[0].lost()
            assert (await asyncio.wait_for(asked, DEADLINE_S)).json() == {"text": "hi"}
        assert cluster.asked == ["a", "b"]
        assert [lease.is_whole for lease in cluster.lent] == [[False], [True]]

    asyncio.run(scenario())


def test_prompts_are_routed_by_their_prefix() -> None:
    cluster = Cluster(a=[whole(), whole()])
    cluster.ask(json={"prompt": "x" * 600})
    cluster.ask("GET", "/compare")
    assert [len(keys) for keys in cluster.keys] == [2]


def test_a_long_body_is_refused_before_it_is_sent() -> None:
    cluster = Cluster(a=[])
    for options in ({"content": b"x" * 1001}, {"content": _parts()}):
        answer = cluster.ask(**options)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert cluster.sent == []


async def _parts() -> AsyncGenerator[bytes, None]:
    for _ in range(11):
        yield b"x" * 100


def test_other_routes_ask_the_first_replica_that_answers() -> None:
    cluster = Cluster(a=[whole(n=1), Lost("cut")], b=[whole(n=2)])
    assert cluster.ask("GET", "/compare").json() == {"n": 1}
    assert cluster.ask("GET", "/compare").json() == {"n": 2}
    assert cluster.asked == ["a", "a", "b"]


def test_a_draining_gateway_takes_no_generations() -> None:
    cluster = Cluster(a=[whole(ready=True, variants={})])
    cluster.gateway.lifecycle.drain(30)
    answer = cluster.generate()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    assert cluster.ask("GET", "/-/healthz").status_code == 503
    assert cluster.ask("GET", "/ready").status_code == 503


def test_health_is_the_gateways_own() -> None:
    cluster = Cluster(a=[], b=[])
    assert cluster.ask("GET", "/health").json() == {"status": "ok", "replicas": 2}
    assert cluster.ask("GET", "/-/healthz").text == "success"
    assert cluster.sent == []


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_head_is_answered_as_get_is(path: str) -> None:
    def answer() -> Scripted:
        content = b"" if path == "/metrics" else json.dumps({"ready": True, "variants": {}}).encode()
        return Scripted(200, JSON, content)

    cluster = Cluster(a=[answer(), answer()])
    get, head = cluster.ask("GET", path), cluster.ask("HEAD", path)
    assert (head.status_code, head.headers["content-length"]) == (get.status_code, get.headers["content-length"])
    assert {sent.method for _, sent in cluster.sent} <= {"GET"}


def test_a_cluster_is_ready_with_one_replica() -> None:
    ready: dict[str, Any] = {"ready": True, "variants": {"w8a8": "ready"}}
    starting: dict[str, Any] = {"ready": False, "variants": {"w8a8": "loading"}}
    cluster = Cluster(a=[whole(503, **starting)], b=[whole(**ready)], c=[Unreachable("gone")])
    answer = cluster.ask("GET", "/ready")
    assert answer.status_code == 200
    assert answer.json()["variants"] == {"w8a8": "ready"}
    assert answer.json()["replicas"]["a"] == starting
    assert answer.json()["replicas"]["c"]["ready"] is False


@pytest.mark.parametrize("scripts", [{}, {"a": [whole(503, ready=False, variants={"w8a8": "loading"})]}])
def test_a_cluster_without_a_ready_replica_is_not(scripts: dict[str, list[Scripted | Exception]]) -> None:
    answer = Cluster(**scripts).ask("GET", "/ready")
    assert (answer.status_code, answer.json()["ready"]) == (503, False)
    assert "retry-after" in answer.headers


def test_info_is_the_first_replicas_with_what_differs() -> None:
    info: dict[str, Any] = {"model": "m", "device": "cpu", "variants": {"w8a8": {"generation": 1}}}
    other: dict[str, Any] = info | {"variants": {"w8a8": {"generation": 2}}}
    cluster = Cluster(a=[whole(**info)], b=[whole(**other)], c=[Lost("cut")])
    answer = cluster.ask("GET", "/info").json()
    assert answer["model"] == "m"
    assert answer["replicas"] == {
        "a": {"device": "cpu", "generations": {"w8a8": 1}},
        "b": {"device": "cpu", "generations": {"w8a8": 2}},
        "c": {"device": None, "generations": {}},
    }


@pytest.mark.parametrize("path", ["/info", "/metrics"])
def test_a_missing_key_is_refused_by_the_replicas(path: str) -> None:
    cluster = Cluster(a=[whole(401, error={"code": "invalid_api_key"})])
    answer = cluster.ask("GET", path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["content-type"] == JSON


@pytest.mark.parametrize("path", ["/info"])
def test_without_replicas_info_is_not_ready(path: str) -> None:
    assert Cluster().ask("GET", path).json()["error"]["code"] == "not_ready"


def test_one_scrape_has_all_replicas() -> None:
    text = b'# HELP ottava_x X.\n# TYPE ottava_x gauge\nottava_x{variant="w8a8"} 3\n'
    cluster = Cluster(a=[Scripted(200, "text/plain", text)], b=[Lost("cut")])
    answer = cluster.ask("GET", "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert [(s.labels, s.value) for s in families["ottava_x"].samples] == [({"replica": "a", "variant": "w8a8"}, 3)]
    up = {s.labels["replica"]: s.value for s in families["ottava_cluster_replica_up"].samples}
    assert up == {"a": 1, "b": 0}


def test_a_scrape_before_there_are_replicas_has_the_gateways_series() -> None:
    answer = Cluster().ask("GET", "/metrics")
    assert answer.status_code == 200
    assert "ottava_cluster_retries_total" in answer.text


def test_a_reload_reaches_every_replica() -> None:
    cluster = Cluster(a=[whole(generation=2)], b=[whole(generation=2)])
    answer = cluster.ask("POST", "/admin/reload", json={"model": None})
    assert answer.json() == {"generation": 2, "replicas": {"a": {"generation": 2}, "b": {"generation": 2}}}
    assert cluster.asked == ["a", "b"]


def test_a_reload_that_fails_stops_there() -> None:
    cluster = Cluster(a=[whole(409, error={"code": "reload_failed"})], b=[whole()])
    assert cluster.ask("POST", "/admin/reload", json={}).status_code == 409
    assert cluster.asked == ["a"]
