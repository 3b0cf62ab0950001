"""ASGI middleware for every response: metrics, security headers, and 500 responses without details."""

import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from ocrnet.serve.metrics import Metrics

Message = MutableMapping[str, Any]
INTERNAL_ERROR = "internal server error; see the server's log"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Middleware that rejects requests of other sites, adds security headers, and counts requests.

    ``known`` are the paths that the metrics count by name; others count as "other". ``hosts`` are the accepted host
    names; None accepts any.
    """

    def __init__(self, app: Callable, metrics: Metrics, known: Iterable[str], hosts: Iterable[str] | None) -> None:
        self._app, self._metrics, self._known = app, metrics, frozenset(known)
        self._hosts = None if hosts is None else frozenset(hosts)

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Handle one request."""
        start, status = time.monotonic(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                security_headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *security_headers]
            await send(message)

        try:
            # mutation: refuse-foreign-host-names
            if self._hosts is not None and _without_port(_host(scope)) not in self._hosts:
                await _send_error(
                    send_with_headers,
                    403,
                    "Host must be localhost or 127.0.0.1; the server accepts other names only if it requires a token",
                )
            elif _is_cross_site(scope):
                await _send_error(send_with_headers, 403, "requests from pages of other sites are rejected")
            else:
                await self._app(scope, receive, send_with_headers)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if status == 0:
                await _send_error(send_with_headers, 500, INTERNAL_ERROR)
        finally:
            path = scope["path"] if scope["path"] in self._known else "other"
            self._metrics.request(path, status, time.monotonic() - start)


def _is_cross_site(scope: Message) -> bool:
    """Return whether a request is a POST that a browser sent for a page of another site."""
    headers = dict(scope["headers"])
    if scope["method"] != "POST":
        return False
    # A page cannot set this header. Browsers omit it for http addresses of other machines.
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site not in (b"same-origin", b"none")
    origin = headers.get(b"origin")
    # mutation: compare-origin
    return origin is not None and not _is_same_origin(origin.decode("latin1"), _host(scope))


def _host(scope: Message) -> str:
    return dict(scope["headers"]).get(b"host", b"").decode("latin1").lower()


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _is_same_origin(origin: str, host: str) -> bool:
    """Return whether an origin, such as https://name:port, has this host; default ports may be omitted."""
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return False
    default_port = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return bool(default_port) and parts.netloc.removesuffix(default_port) == host.removesuffix(default_port)


async def _send_error(send: Callable[[Message], Awaitable[None]], status: int, text: str) -> None:
    data = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
