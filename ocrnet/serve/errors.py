"""Errors returned to clients: an HTTP status and one sentence, never a path or a traceback."""

from collections.abc import Mapping


class Refused(Exception):  # noqa: N818 - not an error of the server
    """A rejected request, with the HTTP ``status`` and the text for the client."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, dict(headers or {})


def busy(text: str) -> Refused:
    """Return the error of an overloaded server: status 503 with Retry-After."""
    return Refused(503, text, {"Retry-After": "1"})
