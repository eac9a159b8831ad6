"""API keys and admin keys: reads them from the settings and authenticates requests. Only their hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from service.errors import Forbidden, InvalidSettings, Unauthorized
from service.settings import Settings
from service.telemetry.record import ANONYMOUS

MIN_KEY_CHARS = 8
"""Guessing eight random letters and digits takes seven hundred years at ten thousand guesses a second."""

# A # inside a key is part of the key, not the start of a comment.
_COMMENT = re.compile(r"(^|\s)#.*")
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_KEY = re.compile(rf"[!-~]{{{MIN_KEY_CHARS},512}}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key's name, used in logs and limits, and its SHA-256. Keys with the same name share their limits."""

    name: str
    digest: bytes = field(repr=False)


class Keyring:
    """The API keys and admin keys that this server accepts.

    Raises:
        InvalidSettings: a file cannot be read or holds no key; a key is too short, contains a space, is duplicated,
            or has a malformed name; or there is no key at all, the server listens beyond this machine, and
            allow_anonymous is not set. No message contains a key.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys, self._admin_keys = _read(settings)

    @property
    def is_empty(self) -> bool:
        """Whether the server accepts requests without a key."""
        return not self._keys

    @property
    def has_admins(self) -> bool:
        return bool(self._admin_keys)

    def reload(self) -> None:
        """Read the keys again. Raises InvalidSettings as above and keeps the old keys then."""
        self._keys, self._admin_keys = _read(self._settings)

    def name_of(self, authorization: str | None) -> str:
        """The name of the key in an Authorization header; ANONYMOUS if the server has no keys.

        Raises:
            Unauthorized: the header is missing or not `Bearer KEY`, or the key is unknown.
        """
        return ANONYMOUS if self.is_empty else _name_of(authorization, self._keys, "API key")

    def admin_name_of(self, authorization: str | None) -> str:
        """The name of the admin key in an Authorization header; ANONYMOUS on loopback without any keys.

        Raises:
            Unauthorized: as `name_of`, of the admin keys; where there are none, of the API keys.
            Forbidden: there are none, and the server has API keys or listens beyond this machine.
        """
        if self.has_admins:
            return _name_of(authorization, self._admin_keys, "admin key")
        name = self.name_of(authorization)
        if self.is_empty and is_loopback(self._settings.host):
            return name
        raise Forbidden(
            "this server has no admin keys, so /admin is closed; start it with OTTAVA_ADMIN_API_KEYS or "
            "--admin-api-keys-file"
        )


def is_loopback(host: str) -> bool:
    """Whether a server that listens on host is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name_of(authorization: str | None, keys: Sequence[ApiKey], kind: str) -> str:
    """The name of the key in an Authorization header. Raises Unauthorized; kind is for its message."""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized(f"this needs an {kind}; send the header `Authorization: Bearer KEY`, or `x-api-key: KEY`")
    digest, found = _digest(key.strip()), None
    # Compares hashes, and with every key, so that the time does not reveal how close a guess was.
    for known in keys:
        if hmac.compare_digest(known.digest, digest):
            found = known.name
    if found is None:
        raise Unauthorized(f"the {kind} is not known here; check it, or ask for one where this server is run")
    return found


def _read(settings: Settings) -> tuple[tuple[ApiKey, ...], tuple[ApiKey, ...]]:
    """The API keys and the admin keys."""
    keys = tuple(_keys("api_keys", settings.api_keys, settings.api_keys_file))
    admin_keys = tuple(_keys("admin_api_keys", settings.admin_api_keys, settings.admin_api_keys_file))
    if len({key.digest for key in (*keys, *admin_keys)}) != len(keys) + len(admin_keys):
        raise InvalidSettings("an API key is there twice; write each once, as API key or as admin key")
    if not keys and not is_loopback(settings.host) and not settings.allow_anonymous:
        raise InvalidSettings(
            f"host is {settings.host}, which others can reach, and there are no API keys: set OTTAVA_API_KEYS or "
            "api_keys_file, or allow_anonymous to serve everybody who gets there, or listen on 127.0.0.1"
        )
    return keys, admin_keys


def _keys(setting: str, given: SecretStr | None, file: Path | None) -> Iterator[ApiKey]:
    """The keys of a setting and of the file beside it."""
    if given is not None:
        entries = [entry for part in given.get_secret_value().split(",") if (entry := part.strip())]
        for place, entry in enumerate(entries, 1):
            yield _parse(entry, f"key{place}", f"key {place} of {setting}")
    if file is None:
        return
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise InvalidSettings(f"{setting}_file cannot be read: {error}") from error
    used = {place: entry for place, line in enumerate(lines, 1) if (entry := _COMMENT.sub("", line).strip())}
    if not used:
        raise InvalidSettings(f"{setting}_file {file} holds no key; write one per line")
    for place, entry in used.items():
        yield _parse(entry, f"line{place}", f"line {place} of {file}")


def _parse(entry: str, default_name: str, where: str) -> ApiKey:
    name, colon, key = entry.partition(":")
    if not colon:
        name, key = default_name, entry
    if not _NAME.fullmatch(name):
        raise InvalidSettings(f"{where}: what stands before the colon is no name; use letters, digits, `_`, `.`, `-`")
    if not _KEY.fullmatch(key):
        raise InvalidSettings(
            f"{where}: the key must have {MIN_KEY_CHARS} to 512 printable ASCII characters and no space"
        )
    return ApiKey(name, _digest(key))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
