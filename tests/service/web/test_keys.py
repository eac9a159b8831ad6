"""API keys: where they come from, that they open what they should, and that they show up nowhere."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.errors import InvalidSettings, Unauthorized
from service.settings import Settings, load_settings
from service.telemetry.record import ANONYMOUS
from service.web.keys import Keyring, is_loopback
from tests.service.kinds import Samples
from tests.support.harness import app_of, client_of, metrics_of, two_engines

ALICE, BOB, ADMIN = "alice-0123456789", "bob-0123456789", "admin-0123456789"
KEYS = f"alice:{ALICE}, {BOB}"


def keyring(**settings: Any) -> Keyring:
    return Keyring(Settings(**settings))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_each_key_has_its_name() -> None:
    keys = keyring(api_keys=KEYS)
    assert keys.name_of(f"Bearer {ALICE}") == "alice"
    assert keys.name_of(f"bearer  {BOB} ") == "key2"


@pytest.mark.parametrize(
    "header",
    [None, "", ALICE, "Bearer", "Bearer ", f"Basic {ALICE}", f"Bearer {ALICE[:-1]}", f"Bearer {ALICE}x", "Bearer é"],
)
def test_anything_else_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthorized):
        keyring(api_keys=KEYS).name_of(header)


def test_without_keys_everybody_is_anonymous() -> None:
    assert keyring().name_of(None) == keyring().name_of("Bearer whatever") == ANONYMOUS


def test_two_keys_of_one_name_are_both_good() -> None:
    keys = keyring(api_keys=f"a:{ALICE},a:{BOB}")
    assert keys.name_of(f"Bearer {ALICE}") == keys.name_of(f"Bearer {BOB}") == "a"


def test_a_file_has_comments_and_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# team\nalice:{ALICE}  # since May\n\nwith#inside:{ALICE}\n".replace("with#inside:", "b:x#"))
    keys = keyring(api_keys_file=file)
    assert keys.name_of(f"Bearer {ALICE}") == "alice"
    assert keys.name_of(f"Bearer x#{ALICE}") == "b"
    file.write_text(f"{BOB}\n")
    keys.reload()
    assert keys.name_of(f"Bearer {BOB}") == "line1"
    with pytest.raises(Unauthorized):
        keys.name_of(f"Bearer {ALICE}")
    file.unlink()
    with pytest.raises(InvalidSettings):
        keys.reload()
    assert keys.name_of(f"Bearer {BOB}") == "line1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("short12", "8 to 512"),
        ("two words1", "no space"),
        ("naïve-secret", "ASCII"),
        (f"na me:{ALICE}", "no name"),
        (f":{ALICE}", "no name"),
        (f"a:{ALICE},b:{ALICE}", "twice"),
        ("x" * 513, "8 to 512"),
    ],
)
def test_a_bad_key_is_told_without_showing_it(text: str, words: str) -> None:
    with pytest.raises(InvalidSettings, match=words) as caught:
        keyring(api_keys=text)
    assert not any(part.partition(":")[2] in caught.value.message for part in text.split(",") if ":" in part)
    assert text not in caught.value.message


def test_a_missing_or_empty_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="cannot be read"):
        keyring(api_keys_file=tmp_path / "none")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(InvalidSettings, match="holds no key"):
        keyring(api_keys_file=tmp_path / "empty")


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", "localhost.example.org")],
)
def test_beyond_this_machine_a_key_is_needed(host: str, is_local: bool) -> None:
    assert is_loopback(host) is is_local
    keyring(host=host, api_keys=KEYS)
    keyring(host=host, allow_anonymous=True)
    if is_local:
        keyring(host=host)
    else:
        with pytest.raises(InvalidSettings, match=r"no API keys.*OTTAVA_API_KEYS.*allow_anonymous"):
            keyring(host=host)


def test_no_repr_and_no_message_shows_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(api_keys=KEYS)
    keys = Keyring(settings)
    shown = f"{settings!r} {settings} {settings.model_dump_json()} {vars(keys)!r} {keys._keys!r}"
    assert ALICE not in shown
    assert BOB not in shown
    monkeypatch.setenv("OTTAVA_API_KEYS", KEYS)
    assert Keyring(load_settings()).name_of(f"Bearer {ALICE}") == "alice"
    with pytest.raises(InvalidSettings) as caught:
        load_settings(api_keys=5, port=70000)
    assert "5" not in caught.value.message.partition("port")[0]


def answers(
    *requests: tuple[str, str, dict[str, str]], app: FastAPI | None = None, **settings: Any
) -> list[httpx.Response]:
    """(status, headers, json) of requests (method, path, headers) to one app."""

    async def go() -> list[httpx.Response]:
        async with client_of(app or app_of(two_engines(), **settings)) as client:
            return [
                await client.request(method, path, headers=headers, json={"prompt": "a"} if method == "POST" else None)
                for method, path, headers in requests
            ]

    return asyncio.run(go())


def test_a_refusal_has_the_one_shape_and_a_challenge() -> None:
    for headers in ({}, bearer("wrong-key-123")):
        (response,) = answers(("POST", "/generate", headers), api_keys=KEYS)
        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert response.headers["x-request-id"]
        error = response.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
        assert "wrong-key" not in response.text


def test_a_known_key_is_served() -> None:
    for key in (ALICE, BOB):
        (response,) = answers(("POST", "/generate", bearer(key)), api_keys=KEYS)
        assert response.status_code == 200


@pytest.mark.parametrize("sharing", [False, True])
def test_the_engine_is_told_whose_a_request_is(sharing: bool) -> None:
    async def go() -> list[tuple[str, str]]:
        engines = two_engines()
        async with client_of(app_of(engines, api_keys=KEYS, prefix_sharing=sharing)) as client:
            for key in (ALICE, BOB):
                for path in ("/generate", "/v1/completions"):
                    assert (await client.post(path, json={"prompt": "a"}, headers=bearer(key))).status_code == 200
        return [(request.params.owner, request.params.salt) for request in engines["w8a8"].submitted]

    told = asyncio.run(go())
    assert [owner for owner, _ in told] == ["alice", "alice", "key2", "key2"]
    assert [salt for _, salt in told] == ([""] * 4 if sharing else ["alice", "alice", "key2", "key2"])


DEFAULT_PUBLIC = {"/health", "/ready", "/", "/docs", "/openapi.json"}
GUARDED = {"/info", "/metrics", "/requests/recent", "/compare", "/nowhere", "/health/", "/HEALTH"}


@pytest.mark.parametrize("path", sorted(DEFAULT_PUBLIC | GUARDED))
def test_what_is_open_by_default(path: str) -> None:
    (without,) = answers(("GET", path, {}), api_keys=KEYS)
    assert (without.status_code != 401) is (path in DEFAULT_PUBLIC)
    (known,) = answers(("GET", path, bearer(ALICE)), api_keys=KEYS)
    assert known.status_code != 401


def test_what_is_open_is_a_setting() -> None:
    requests: list[tuple[str, str, dict[str, str]]] = [
        ("GET", path, {}) for path in ("/health", "/ready", "/metrics", "/info", "/", "/page/x.css", "/docs")
    ]
    opened = answers(*requests, api_keys=KEYS, public_routes="metrics,info")
    assert [response.status_code for response in opened] == [200, 200, 200, 200, 401, 401, 401]
    assert all(r.status_code == 401 for r in answers(*requests[2:], api_keys=KEYS, public_routes=""))
    with pytest.raises(InvalidSettings, match="public_routes"):
        load_settings(public_routes="health,admin")


def test_keys_are_in_no_log_and_no_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    requests = [
        ("POST", "/generate", bearer(ALICE)),
        ("GET", "/info", bearer(BOB)),
        ("POST", "/generate", bearer("no")),
    ]
    texts = "".join(response.text for response in answers(*requests, api_keys=KEYS))
    logged = "".join(f"{vars(record)} {record.getMessage()}" for record in caplog.records)
    assert "alice" in logged
    assert not any(key in text for key in (ALICE, BOB) for text in (texts, logged))


def test_the_api_says_that_it_needs_a_key() -> None:
    (known,) = answers(("GET", "/openapi.json", {}), api_keys=KEYS)
    assert known.json()["security"] == [{"key": []}]
    assert known.json()["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert "security" not in known.json()["paths"]["/admin/reload"]["post"]
    (open_to_all,) = answers(("GET", "/openapi.json", {}))
    assert "security" not in open_to_all.json()
    (with_admins,) = answers(("GET", "/openapi.json", {}), api_keys=KEYS, admin_api_keys=ADMIN)
    assert with_admins.json()["paths"]["/admin/reload"]["post"]["security"] == [{"admin": []}]
    assert with_admins.json()["components"]["securitySchemes"]["admin"] == {"type": "http", "scheme": "bearer"}


RELOAD = ("POST", "/admin/reload")


def reload_statuses(*keys: str | None, **settings: Any) -> list[int]:
    """422 is past the gate: the request has no body."""
    requests = [(*RELOAD, {} if key is None else bearer(key)) for key in keys]
    return [response.status_code for response in answers(*requests, **settings)]


def test_admin_routes_have_keys_of_their_own() -> None:
    assert reload_statuses(None, ALICE, ADMIN, api_keys=KEYS, admin_api_keys=f"op:{ADMIN}") == [401, 401, 422]
    assert reload_statuses(None, ADMIN, admin_api_keys=ADMIN) == [401, 422]
    requests = [("POST", "/generate", bearer(ADMIN)), ("GET", "/info", bearer(ADMIN))]
    assert [r.status_code for r in answers(*requests, api_keys=KEYS, admin_api_keys=ADMIN)] == [401, 401]


def test_without_admin_keys_admin_routes_answer_on_loopback_without_keys_alone() -> None:
    assert reload_statuses(None, ALICE) == [422, 422]
    assert reload_statuses(None, ADMIN, ALICE, api_keys=KEYS) == [401, 401, 403]
    assert reload_statuses(None, host="0.0.0.0", allow_anonymous=True, allowed_hosts="*") == [403]
    (refused,) = answers((*RELOAD, bearer(ALICE)), api_keys=KEYS)
    assert refused.json()["error"]["code"] == "admin_closed"
    assert "OTTAVA_ADMIN_API_KEYS" in refused.json()["error"]["message"]


def test_a_file_of_admin_keys_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "admins"
    file.write_text(f"op:{ADMIN}\n")
    keys = keyring(admin_api_keys_file=file)
    assert keys.admin_name_of(f"Bearer {ADMIN}") == "op"
    file.write_text(f"op:{ADMIN}2\n")
    keys.reload()
    with pytest.raises(Unauthorized, match="admin key"):
        keys.admin_name_of(f"Bearer {ADMIN}")


def test_no_key_is_both() -> None:
    with pytest.raises(InvalidSettings, match="as API key or as admin key"):
        keyring(api_keys=KEYS, admin_api_keys=ALICE)


def test_refusals_are_counted_once() -> None:
    async def go() -> Samples:
        async with client_of(app_of(two_engines(), api_keys=KEYS)) as client:
            await client.post("/generate", json={"prompt": "a"})
            await client.get("/info")
            await client.post("/generate", json={"prompt": "a"}, headers=bearer(ALICE))
            client.headers.update(bearer(ALICE))
            return await metrics_of(client)

    samples = asyncio.run(go())
    counts = {key[1:]: value for key, value in samples.items() if key[0] == "ottava_requests_total" and value}
    assert counts == {("outcome=rejected", "variant=none"): 1, ("outcome=stop", "variant=w8a8"): 1}
