"""Handling common to every response: metrics, security headers, and hidden details of internal errors."""

import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from ocrnet.serve.metrics import Metrics

Message = MutableMapping[str, Any]
FAULT = "internal server error; see the server's log"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """An ASGI application that wraps another.

    ``known`` are the paths that metrics count by name. ``hosts`` are the only accepted host names; None accepts any.
    """

    def __init__(self, app: Callable, metrics: Metrics, known: Iterable[str], hosts: Iterable[str] | None) -> None:
        self._app, self._metrics, self._known = app, metrics, frozenset(known)
        self._hosts = None if hosts is None else frozenset(hosts)

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Process one request."""
        begun, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        try:
            # mutation: refuse-foreign-host-names
            if self._hosts is not None and _without_port(_host(scope)) not in self._hosts:
                await _answer(sending, 403, "Host must be localhost or 127.0.0.1; other names need a token")
            elif _from_elsewhere(scope):
                await _answer(sending, 403, "requests from pages of other sites are rejected")
            else:
                await self._app(scope, receive, sending)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if status == 0:
                await _answer(sending, 500, FAULT)
        finally:
            path = scope["path"] if scope["path"] in self._known else "other"
            self._metrics.request(path, status, time.monotonic() - begun)


def _from_elsewhere(scope: Message) -> bool:
    """Return whether a page of another site made a browser send this POST; such a page may not use the network."""
    headers = dict(scope["headers"])
    if scope["method"] != "POST":
        return False
    # A page cannot set this header. Browsers omit it if the address is neither https nor this machine.
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site not in (b"same-origin", b"none")
    origin = headers.get(b"origin")
    # mutation: compare-origin
    return origin is not None and not _same(origin.decode("latin1"), _host(scope))


def _host(scope: Message) -> str:
    return dict(scope["headers"]).get(b"host", b"").decode("latin1").lower()


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _same(origin: str, host: str) -> bool:
    """Return whether an origin, such as https://name:port, belongs to a host; default ports may be omitted."""
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return False
    usual = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return bool(usual) and parts.netloc.removesuffix(usual) == host.removesuffix(usual)


async def _answer(send: Callable[[Message], Awaitable[None]], status: int, text: str) -> None:
    data = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
