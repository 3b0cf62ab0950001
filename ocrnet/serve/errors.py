"""What a client is told when its request is not answered: a status and one sentence, never a path or a traceback."""

from collections.abc import Mapping


class Refused(Exception):  # noqa: N818 - not a fault of ours
    """A request that is not answered; ``status`` is HTTP's, the text is for the client."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, dict(headers or {})


def busy(text: str) -> Refused:
    """Return the refusal of a server that has enough to do."""
    return Refused(503, text, {"Retry-After": "1"})
