"""Download an image from an http(s) URL, within limits of bytes, pixels and seconds that no server can exceed."""

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

_BLOCK = 2**16


def check_url(url: str, *, offline: bool) -> None:
    """Raise `OcrnetError` if a URL is not http(s), has no host, or is forbidden by ``offline``."""
    parts = _parts(url)
    if parts.scheme not in SCHEMES:
        raise OcrnetError(f"'{urls.scrub(url)}' must begin with http:// or https://, or be a path")
    if not parts.hostname:
        raise OcrnetError(f"'{urls.scrub(url)}' has no host")
    if offline:
        raise OcrnetError(f"--offline: '{urls.scrub(url)}' is not downloaded; give a file, or leave --offline out")


def name_of(url: str) -> str:
    """Return the name of a URL's result: the last part of its path without the suffix, safe as a file name."""
    last = urllib.parse.unquote(_parts(url).path.rstrip("/").rpartition("/")[2])
    name = re.sub(r"\.\w{1,5}$", "", re.sub(r"[^\w.-]+", "_", last))
    return name.strip("._")[:100] or "image"


def image(url: str) -> bytes:
    """Download an image and return its bytes; only the header is decoded, to validate the type and the pixel count.

    Raise `OcrnetError` naming the URL if the download fails, exceeds a limit, or is not an image.
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
            f"{urls.scrub(url)} is {height}x{width}, more than {MOST_PIXELS:,} pixels; save it, and give the file"
        )
    return data


def _fetch(url: str) -> bytes:
    """Return the bytes of a URL; raise `OcrnetError` if the download takes longer than `MOST_SECONDS`.

    A daemon thread downloads, and is abandoned if it takes longer. A socket timeout is not enough: it ends neither a
    server that sends a byte now and then, nor a resolver that does not respond.
    """
    found: dict[str, Any] = {}
    given_up = threading.Event()

    def work() -> None:
        try:
            found["data"] = _read(url, given_up)
        except OcrnetError as error:
            found["error"] = error
        except urllib.error.HTTPError as error:
            found["error"] = OcrnetError(f"{urls.scrub(url)}: the server returned {error.code} {error.reason}")
        except (OSError, HTTPException, ValueError) as error:
            why = getattr(error, "reason", None) or error
            found["error"] = OcrnetError(f"{urls.scrub(url)} cannot be read: {why or type(why).__name__}")

    with block_signals():
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
    # mutation: bound-url-download-time
    thread.join(MOST_SECONDS)
    given_up.set()
    if not found:
        raise OcrnetError(
            f"{urls.scrub(url)} was not downloaded within {MOST_SECONDS:g} seconds; save it, and give the file"
        )
    if "error" in found:
        raise found["error"]
    return found["data"]


def _read(url: str, given_up: threading.Event) -> bytes:
    opener = urllib.request.OpenerDirector()  # the default one follows redirects to ftp:// and opens file://
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _Redirects,
        urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    asked = urllib.request.Request(_encoded(url), headers={"User-Agent": f"ocrnet/{__version__}"})
    data = bytearray()
    with opener.open(asked, timeout=MOST_SECONDS) as answer:
        promised = int(answer.headers.get("Content-Length", "-1"))
        # mutation: refuse-large-url-download
        if promised > MOST_BYTES:
            raise _too_large(url)
        while not given_up.is_set() and (block := answer.read1(_BLOCK)):
            data += block
            if len(data) > MOST_BYTES:
                raise _too_large(url)
    # mutation: check-url-download-length
    if promised > len(data):
        raise OcrnetError(f"{urls.scrub(url)} is incomplete: got {len(data):,} of {promised:,} bytes")
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
    """Return a URL in ASCII, as HTTP requires: the host in IDNA, other parts percent-encoded unless visible ASCII."""
    parts = _parts(url)
    before, at, host = parts.netloc.rpartition("@")
    host = host if host.isascii() else host.encode("idna").decode()
    return re.sub(
        r"[^!-~]+",
        lambda found: urllib.parse.quote(found[0].encode("utf-8", "surrogateescape")),
        parts._replace(netloc=f"{before}{at}{host}").geturl(),
    )


def _too_large(url: str) -> OcrnetError:
    return OcrnetError(f"{urls.scrub(url)} is larger than {MOST_BYTES // 2**20} MiB; save it, and give the file")


def _parts(url: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(url)
    except ValueError as error:
        raise OcrnetError(f"'{urls.scrub(url)}' is not a URL: {error}") from None
