"""What a server allows and how it batches; and the token that requests must bring, where one is set."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from ocrnet import flags
from ocrnet.errors import OcrnetError

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


def from_flags(args: flags.Args, *, max_batch: int) -> Settings:
    """Return what the command line says; ``max_batch`` is the device's own choice."""
    defaults = Settings(max_batch=max_batch)
    numbers = {
        name: flags.as_number(args, name, getattr(defaults, name))
        for name in ("port", "max_batch", "batch_wait", "max_requests", "timeout", "max_megabytes", "max_megapixels")
    }
    for name in numbers.keys() - {"port", "batch_wait"}:
        if numbers[name] == 0:
            raise OcrnetError(f"--{name} is 0, so nothing could be answered; give more")
    if numbers["max_megapixels"] > MOST_MEGAPIXELS:
        raise OcrnetError(f"--max_megapixels is {numbers['max_megapixels']}, but at most {MOST_MEGAPIXELS} are served")
    if numbers["port"] > 65535:
        raise OcrnetError(f"--port is {numbers['port']}, but ports end at 65535; 0 takes a free one")
    return Settings(
        host=args.options.get("host", defaults.host), token=_token(args.options.get("token_file")), **numbers
    )


def _token(path: str | None) -> str | None:
    """Return the token in a file or the environment; never from the command line, which every user can list."""
    given = os.environ.get(TOKEN_VARIABLE)
    if path is not None:
        if given is not None:
            raise OcrnetError(f"--token_file and {TOKEN_VARIABLE} both name a token; keep one")
        try:
            given = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OcrnetError(f"--token_file {path} cannot be read: {error}") from None
    if given is None:
        return None
    token, source = given.strip(), f"--token_file {path}" if path else TOKEN_VARIABLE
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise OcrnetError(
            f"{source}: a token is one line of at least {SHORTEST_TOKEN} letters, digits and signs without spaces; "
            "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        )
    return token
