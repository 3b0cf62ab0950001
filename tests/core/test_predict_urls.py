"""Images from URLs, with a real local server that also stalls, sends wrong lengths, or never ends a response."""

import io
import socket
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from ocrnet.predict import download, sources
from ocrnet.utils.errors import OcrnetError

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def png(*size: int) -> bytes:
    """Return the image as a PNG; ``size``, if given, replaces the width and height in its header."""
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "PNG")
    data = bytearray(file.getvalue())
    if size:
        data[16:24] = struct.pack(">II", *size)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        self.close_connection = True
        name = self.path.strip("/").partition("/")[0].partition(".")[0]
        getattr(self, name, self.missing)()

    def head(self, status=200, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data, length=None):
        self.head(Content_Length=len(data) if length is None else length)
        self.wfile.write(data)

    def missing(self):
        self.head(404, Content_Length=0)

    def photo(self):
        self.body(png())

    def text(self):
        self.body(b"<html>no image</html>")

    def bomb(self):
        self.body(png(20_000, 10_000))

    def wide(self):
        self.body(png(12_000, 10_000))

    def longer(self):  # its Content-Length is more than its body
        self.body(png(), len(png()) + 50)

    def shorter(self):  # its Content-Length is less than its body
        self.body(png(), len(png()) - 50)

    def huge(self):  # its Content-Length is above the limit; the client must not wait for the body
        self.head(Content_Length=download.MOST_BYTES + 1)
        self.stall()

    def endless(self):
        self.head(Transfer_Encoding="chunked")
        block = bytes(2**16)
        try:
            while True:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
        except OSError:
            self.server.ended.set()

    def broken(self):
        self.head(Transfer_Encoding="chunked")
        self.wfile.write(b"100\r\nhalf a chunk")

    def stall(self):
        self.server.released.wait(20)

    def trickle(self):  # a byte every 50 ms for ten seconds, so that no socket timeout ends it
        self.head(Content_Length=200)
        while not self.server.released.wait(0.05):
            self.wfile.write(b"x")

    def moved(self):
        self.head(302, Location="/photo.png", Content_Length=0)

    def around(self):
        self.head(302, Location=f"/around/{len(self.server.requests)}", Content_Length=0)

    def to_file(self):
        self.head(302, Location="file:///etc/hostname", Content_Length=0)

    def to_ftp(self):
        self.head(302, Location="ftp://127.0.0.1/photo.png", Content_Length=0)

    def ill(self):
        self.head(500, Content_Length=0)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.requests, http_server.ended, http_server.released = [], threading.Event(), threading.Event()
    http_server.url = f"http://127.0.0.1:{http_server.server_port}"
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield http_server
    http_server.released.set()
    http_server.shutdown()
    thread.join()
    http_server.server_close()


def read(url: str) -> np.ndarray:
    (source,) = sources.find(url, "out")
    return source.read()


def test_a_path_that_is_not_ascii_is_encoded(server):
    for path in ("photo/фото 1.jpg?größe=%41", "photo/\udcff.jpg"):
        np.testing.assert_array_equal(read(f"{server.url}/{path}"), IMAGE)
    assert server.requests == ["/photo/%D1%84%D0%BE%D1%82%D0%BE%201.jpg?gr%C3%B6%C3%9Fe=%41", "/photo/%FF.jpg"]
    assert download._encoded("https://me:pass@bücher.de:80/ü") == "https://me:pass@xn--bcher-kva.de:80/%C3%BC"


def test_an_image_is_downloaded_also_after_a_redirect(server):
    for path in ("photo.png?size=full#top", "moved"):
        np.testing.assert_array_equal(read(f"{server.url}/{path}"), IMAGE)
    assert server.requests == ["/photo.png?size=full", "/moved", "/photo.png"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.png", "the server returned 404"),
        ("ill.png", "the server returned 500"),
        ("text.png", "is not an image: it begins with b'<html>no image</'"),
        ("bomb.png", "has more than 100,000,000 pixels"),
        ("wide.png", "is 10000x12000, more than 100,000,000 pixels"),
        ("longer.png", "is incomplete: got"),
        ("shorter.png", "truncated"),
        ("huge.png", "is larger than 100 MiB"),
        ("broken.png", "cannot be read: IncompleteRead"),
        ("around.png", "the server returned 302 .*infinite loop"),
        ("to_file", "the server returned 302 .*not allowed"),
        ("to_ftp", r"redirects to ftp://127\.0\.0\.1/photo\.png, which is not an http"),
    ],
)
def test_invalid_responses_are_refused_with_the_reason(server, path, message):
    with pytest.raises(OcrnetError, match=message) as caught:
        read(f"{server.url}/{path}")
    assert path in str(caught.value)
    assert len(server.requests) <= 2 + download.MOST_REDIRECTS


@pytest.mark.parametrize("path", ["stall.png", "trickle.png"])
def test_a_slow_server_is_given_up(server, path, monkeypatch):
    monkeypatch.setattr(download, "MOST_SECONDS", 0.3)
    begun = time.monotonic()
    with pytest.raises(OcrnetError, match=r"was not downloaded within 0\.3 seconds|timed out"):
        read(f"{server.url}/{path}")
    assert time.monotonic() - begun < 3


def test_an_endless_response_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(download, "MOST_BYTES", 2**20)
    with pytest.raises(OcrnetError, match="is larger than 1 MiB"):
        read(f"{server.url}/endless.png")
    assert server.ended.wait(5)


def test_a_refused_connection_is_reported(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(OcrnetError, match="refused"):
            read(f"http://127.0.0.1:{free.getsockname()[1]}/a.png")


def test_offline_refuses_urls_and_sends_no_request(server):
    with pytest.raises(OcrnetError, match=r"--offline: .*photo\.png"):
        sources.find(f"{server.url}/photo.png", "out", offline=True)
    assert server.requests == []


@pytest.mark.parametrize("url", ["ftp://host/a.png", "file:///etc/passwd", "s3://bucket/a.png", "HTTP:///a.png"])
def test_other_urls_are_refused(url):
    with pytest.raises(OcrnetError, match=r"or begin with http://|has no host"):
        sources.find(url, "out")


def test_passwords_in_urls_are_not_printed(server):
    url = server.url.replace("://", "://user:secret@") + "/missing.png"
    with pytest.raises(OcrnetError) as caught:
        read(url)
    assert "secret" not in str(caught.value)
    assert sources.find(url, "out")[0].shown == url.replace("user:secret", "***")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/photo.png?x=1", "photo"), ("a/my%20photo.v2.jpg", "my_photo.v2"), ("", "image"), ("a/", "a"),
        ("a/..%2F..%2Fetc%2Fpasswd", "etc_passwd"), (".hidden", "hidden"), ("x" * 300 + ".png", "x" * 100),
    ],
)  # fmt: skip
def test_a_result_has_a_safe_name(path, name):
    (source,) = sources.find(f"https://host/{path}", "out")
    assert source.name == name
