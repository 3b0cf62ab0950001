"""What a server allows and how it batches; and the token that requests must bring, where one is set."""

import ipaddress
from dataclasses import dataclass

TOKEN_VARIABLE = "OCRNET_SERVE_TOKEN"
SHORTEST_TOKEN = 16
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")  # as a client names it
MOST_MEGAPIXELS = 150  # beyond, Pillow refuses a header by itself


@dataclass(frozen=True)
class Settings:
    """The limits of a server; ``token`` None: whoever reaches the port may use it."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: one that is free
    max_batch: int = 1
    batch_wait: float = 0.005  # seconds
    max_requests: int = 64
    timeout: float = 60.0  # seconds
    max_megabytes: int = 20
    max_megapixels: int = 16
    token: str | None = None

    @property
    def loopback(self) -> bool:
        """Whether this machine alone reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """The only names by which requests may address the server, None for any.

        Another site's name may be made to lead to this machine, whose browser then takes the server for that site's.
        """
        return (*LOOPBACK, self.host) if self.loopback and self.token is None else None

    @property
    def max_bytes(self) -> int:
        """The largest body of a request."""
        return self.max_megabytes * 10**6

    @property
    def max_pixels(self) -> int:
        """The largest image."""
        return self.max_megapixels * 10**6
