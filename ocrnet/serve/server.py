"""The HTTP server: its socket, the handling of slow connections, and shutdown."""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ocrnet.serve.app import Service, build
from ocrnet.serve.request_body import BYTES_PER_SECOND
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import StopRequest

# A connection without a request in progress is closed after one to two of these periods. This also ends connections
# whose headers do not arrive, and those whose client reads the response slower than `BYTES_PER_SECOND`.
IDLE_SECONDS = 10.0
# The kernel drops a connection whose client accepts no data for this long.
UNREAD_MILLISECONDS = 30_000
CONNECTIONS = 512


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address of this machine; raise `OcrnetError` if that fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise OcrnetError(
            f"cannot bind --host {host} --port {port}: {error.strerror or error}; --port 0 selects a free port"
        ) from None
    return sock


def url(sock: socket.socket) -> str:
    """Return the address of the page."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def run(service: Service, sock: socket.socket, stop: StopRequest, ready: Callable[[], None]) -> None:
    """Serve until ``stop`` requests shutdown, then finish the requests in progress.

    Args:
        service: The state of the application.
        sock: The bound socket.
        stop: The stop request, which handles the signals; ``stop()`` is true when the server must shut down.
        ready: Called once the server accepts connections.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # StopRequest handles the signals

        async def on_tick(self, counter: int) -> bool:
            return bool(stop()) or await super().on_tick(counter)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.stopping = True
            await super().shutdown(sockets)

    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    # Requests in progress end within their time limit; after that, the server does not wait any longer.
    config = uvicorn.Config(
        build(service), http=_protocol(), loop="asyncio", ws="none", lifespan="off", interface="asgi3",
        log_config=None, access_log=False, server_header=False, proxy_headers=False, limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(service.settings.timeout) + 5,
    )  # fmt: skip
    asyncio.run(Server(config).serve([sock]))


def _unsent_bytes(transport: Any) -> int:
    """Return the number of unsent bytes: those in the transport's buffer and, on Linux, those in the kernel's."""
    kernel_bytes = 0
    sock = transport.get_extra_info("socket")
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl
        import termios

        kernel_bytes = int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return transport.get_write_buffer_size() + kernel_bytes


def _protocol() -> Any:
    """Return uvicorn's protocol class, extended to close idle and stuck connections."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            sock = transport.get_extra_info("socket")
            if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MILLISECONDS)
            self._last_state: Any = None
            self._last_unsent = 0
            self._timer = self.loop.call_later(IDLE_SECONDS, self._check_idle)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _check_idle(self) -> None:
            idle = self.cycle is None or self.cycle.response_complete
            unsent = _unsent_bytes(self.transport)
            # mutation: keep-connection-of-slow-reader
            # mutation: close-connection-of-stuck-reader
            stuck = unsent > self._last_unsent - IDLE_SECONDS * BYTES_PER_SECOND if unsent else idle
            if stuck and self._last_state == (self.cycle, idle):
                # mutation: close-idle-connection
                self.transport.abort()
                return
            self._last_state, self._last_unsent = (self.cycle, idle), unsent
            self._timer = self.loop.call_later(IDLE_SECONDS, self._check_idle)

    return Protocol
