"""HTTP to the replicas over kept connections, by aiohttp."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import aiohttp
from yarl import URL

from service.cluster.exchange import Answer, Headers, Lost, Sent, Unreachable

CONNECT_S = 5.0
MAX_LINE_BYTES = 1 << 16
OWN_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Headers that aiohttp would add; a request goes on as the client sent it."""


class HTTPUpstream:
    """Implements `service.cluster.exchange.Upstream`. Make and close it on the event loop that uses it.

    keep_alive_s: how long an idle connection is kept, less than the replicas keep it.
    """

    def __init__(self, keep_alive_s: float) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=keep_alive_s),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            skip_auto_headers=OWN_HEADERS,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
        )

    async def send(self, url: str, sent: Sent) -> Answer:
        """See `Upstream.send`."""
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in sent.headers]
        try:
            response = await self._session.request(
                sent.method,
                URL(url + sent.target, encoded=True),
                headers=headers,
                data=sent.body or None,
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(str(error)) from error
        return _Answer(response)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


class _Answer:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers: Headers = response.raw_headers
        self._response = response

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(str(error)) from error

    def close(self) -> None:
        # Keeps the connection if the body has been read to its end.
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()
