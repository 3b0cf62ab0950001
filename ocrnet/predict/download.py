"""Download of an image from an http(s) URL, with limits on bytes, pixels and seconds."""

import io
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
import warnings
from http.client import HTTPException
from typing import Any

from PIL import Image, UnidentifiedImageError

from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import block_signals
from ocrnet.utils.version import __version__

MOST_BYTES = 100 * 2**20
MOST_PIXELS = 100_000_000
MOST_SECONDS = 60.0
MOST_REDIRECTS = 5
SCHEMES = ("http", "https")

_CHUNK_BYTES = 2**16


def check_url(url: str, *, offline: bool) -> None:
    """Raise `OcrnetError` if a URL is not http(s) or has no host, or if ``offline`` is true."""
    parts = _parts(url)
    if parts.scheme not in SCHEMES:
        raise OcrnetError(f"'{urls.scrub(url)}' must be a path or begin with http:// or https://")
    if not parts.hostname:
        raise OcrnetError(f"'{urls.scrub(url)}' has no host")
    if offline:
        raise OcrnetError(f"--offline: '{urls.scrub(url)}' is not downloaded; use a file, or omit --offline")


def name_of(url: str) -> str:
    """Return the name for the results of a URL: the last part of its path without the suffix, safe as a file name."""
    last = urllib.parse.unquote(_parts(url).path.rstrip("/").rpartition("/")[2])
    name = re.sub(r"\.\w{1,5}$", "", re.sub(r"[^\w.-]+", "_", last))
    return name.strip("._")[:100] or "image"


def image(url: str) -> bytes:
    """Download an image file and return its bytes, after validating type and number of pixels by its header.

    Raise `OcrnetError` if the download fails or exceeds a limit, or if the file is not an image.
    """
    data = _fetch(url)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as header:
                width, height = header.size
    except UnidentifiedImageError:
        raise OcrnetError(f"{urls.scrub(url)} is not an image: it begins with {data[:16]!r}") from None
    except Image.DecompressionBombError:
        raise OcrnetError(f"{urls.scrub(url)} has more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow raises many types for damaged headers
        raise OcrnetError(f"{urls.scrub(url)} is damaged or not an image ({error})") from None
    # mutation: bound-url-image-pixels
    if width * height > MOST_PIXELS:
        raise OcrnetError(
            f"{urls.scrub(url)} is {height}x{width}, more than {MOST_PIXELS:,} pixels; download it yourself "
            "and pass the file"
        )
    return data


def _fetch(url: str) -> bytes:
    """Return the bytes of a URL; raise `OcrnetError` if the download takes longer than `MOST_SECONDS`.

    The download runs in a daemon thread, which is abandoned at the time limit. A socket timeout would not limit the
    total time: it covers neither a server that sends single bytes, nor a name resolver that does not respond.
    """
    outcome: dict[str, Any] = {}
    canceled = threading.Event()

    def work() -> None:
        try:
            outcome["data"] = _read(url, canceled)
        except OcrnetError as error:
            outcome["error"] = error
        except urllib.error.HTTPError as error:
            outcome["error"] = OcrnetError(f"{urls.scrub(url)}: the server returned {error.code} {error.reason}")
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            outcome["error"] = OcrnetError(f"{urls.scrub(url)} cannot be read: {reason or type(reason).__name__}")

    with block_signals():
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
    # mutation: bound-url-download-time
    thread.join(MOST_SECONDS)
    canceled.set()
    if not outcome:
        raise OcrnetError(
            f"{urls.scrub(url)} was not downloaded within {MOST_SECONDS:g} seconds; download it yourself and "
            "pass the file"
        )
    if "error" in outcome:
        raise outcome["error"]
    return outcome["data"]


def _read(url: str, canceled: threading.Event) -> bytes:
    opener = urllib.request.OpenerDirector()  # the default opener accepts ftp:// redirects and file://
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _Redirects,
        urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    request = urllib.request.Request(_encoded(url), headers={"User-Agent": f"ocrnet/{__version__}"})
    data = bytearray()
    with opener.open(request, timeout=MOST_SECONDS) as response:
        declared = int(response.headers.get("Content-Length", "-1"))
        # mutation: refuse-large-url-download
        if declared > MOST_BYTES:
            raise _too_large(url)
        while not canceled.is_set() and (chunk := response.read1(_CHUNK_BYTES)):
            data += chunk
            if len(data) > MOST_BYTES:
                raise _too_large(url)
    # mutation: check-url-download-length
    if declared > len(data):
        raise OcrnetError(f"{urls.scrub(url)} is incomplete: got {len(data):,} of {declared:,} bytes")
    return bytes(data)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MOST_REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        # mutation: redirect-to-http-only
        if _parts(newurl).scheme not in SCHEMES:
            raise OcrnetError(
                f"{urls.scrub(req.full_url)} redirects to {urls.scrub(newurl)}, which is not an http(s) URL"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _encoded(url: str) -> str:
    """Return a URL in ASCII, as HTTP requires: the host IDNA-encoded, other characters percent-encoded."""
    parts = _parts(url)
    credentials, at, host = parts.netloc.rpartition("@")
    host = host if host.isascii() else host.encode("idna").decode()
    return re.sub(
        r"[^!-~]+",
        lambda match: urllib.parse.quote(match[0].encode("utf-8", "surrogateescape")),
        parts._replace(netloc=f"{credentials}{at}{host}").geturl(),
    )


def _too_large(url: str) -> OcrnetError:
    return OcrnetError(
        f"{urls.scrub(url)} is larger than {MOST_BYTES // 2**20} MiB; download it yourself and pass the file"
    )


def _parts(url: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(url)
    except ValueError as error:
        raise OcrnetError(f"'{urls.scrub(url)}' is not a URL: {error}") from None
