"""The server's limits, batching options and optional access token."""

import ipaddress
from dataclasses import dataclass

TOKEN_VARIABLE = "OCRNET_SERVE_TOKEN"
SHORTEST_TOKEN = 16
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")  # as in a client's Host header
MOST_MEGAPIXELS = 150  # above this, Pillow itself rejects a header


@dataclass(frozen=True)
class Settings:
    """The settings of a server; if ``token`` is None, anyone who can reach the port can use it."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    max_batch: int = 1
    batch_wait: float = 0.005  # seconds
    max_requests: int = 64
    timeout: float = 60.0  # seconds
    max_megabytes: int = 20
    max_megapixels: int = 16
    token: str | None = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """The host names that requests may use, or None for any.

        The restriction prevents DNS rebinding: a site whose name resolves to this machine could read the responses.
        """
        return (*LOOPBACK, self.host) if self.loopback and self.token is None else None

    @property
    def max_bytes(self) -> int:
        """The maximum size of an image file, in bytes."""
        return self.max_megabytes * 10**6

    @property
    def max_pixels(self) -> int:
        """The maximum number of pixels of an image."""
        return self.max_megapixels * 10**6
