"""Error responses to clients: an HTTP status and one sentence, without paths and tracebacks."""

from collections.abc import Mapping


class HttpError(Exception):
    """An error response: its HTTP ``status``, the text for the client, and additional headers."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, dict(headers or {})


def busy(text: str) -> HttpError:
    """Return the error response of an overloaded server: status 503 with a Retry-After header."""
    return HttpError(503, text, {"Retry-After": "1"})
