"""A proxy that injects failures into the requests to an S3 server, and a bucket with one of the SDKs."""

import http.client
import http.server
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ocrnet.cloud.factory import open_store
from ocrnet.cloud.store import Store
from ocrnet.config import Cloud
from ocrnet.utils.urls import parse

# Credentials that must not be in any output or file.
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTKEYOFS3", "AWS_SECRET_ACCESS_KEY": "secret-of-s3-0123456789",
    "AccessKeyID": "TESTKEYOFOBS", "SecretAccessKey": "secret-of-obs-0123456789",
}  # fmt: skip

SIGNED = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"

Failure = Callable[[str, str], str | None]


@dataclass
class Proxy:
    """An HTTP proxy of the S3 server; ``failure(method, path)`` returns the failure to inject into a request, or None.

    ``fail``: respond with 503. ``stall``: do not respond until `healed` is set. ``short``: send half of the body.
    ``flip``: alter a byte of the body. ``grow``: add 1 to a size, in a listing or the response to HEAD.
    ``requests`` holds (method, path) of all requests, ``failures`` (failure, method, path) of the failures injected.
    """

    server: tuple[str, int]
    requests: list[tuple[str, str]] = field(default_factory=list)
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    failure: Failure = lambda method, path: None
    healed: threading.Event = field(default_factory=threading.Event)

    def heal(self) -> None:
        """Stop injecting failures."""
        self.failure = lambda method, path: None
        self.healed.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, context: ssl.SSLContext | None = None) -> None:
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the client gave up
                    self.close_connection = True

            def respond(self) -> None:
                if self.headers.get("Expect") == "100-continue":
                    pass  # the base class has responded
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests.append((self.command, self.path))
                kind = proxy.failure(self.command, self.path)
                if kind:
                    proxy.failures.append((kind, self.command, self.path))
                if kind == "fail":
                    self.reply(503, {}, b"<Error><Code>ServiceUnavailable</Code><Message>later</Message></Error>")
                    return
                if kind == "stall":
                    proxy.healed.wait(60)
                    self.close_connection = True
                    return
                upstream = http.client.HTTPConnection(*proxy.server, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
                if headers.get("Authorization", "").startswith("AWS "):
                    headers["Authorization"] = SIGNED  # moto parses an old signature that contains a slash as a host
                upstream.request(self.command, self.path, body, headers)
                response = upstream.getresponse()
                content = response.read()
                self.reply(response.status, dict(response.getheaders()), content, kind)
                upstream.close()

            def reply(self, status: int, headers: dict, content: bytes, kind: str | None = None) -> None:
                length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else len(content)
                if kind == "grow" and self.command == "HEAD":
                    length = int(length) + 1
                if kind == "grow" and self.command == "GET":
                    start, end = content.index(b"<Size>") + 6, content.index(b"</Size>")
                    content = content[:start] + str(int(content[start:end]) + 1).encode() + content[end:]
                    length = len(content)
                if kind == "flip":
                    content = bytes([content[0] ^ 1]) + content[1:]
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if kind == "short":
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                elif self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = respond  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        if context:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()


def every_third(*methods: str) -> Failure:
    """Return a failure function that fails every third request of these methods."""
    lock, counts = threading.Lock(), dict.fromkeys(methods, 0)

    def failure(method: str, path: str) -> str | None:
        with lock:
            if method in counts:
                counts[method] += 1
            return "fail" if method in counts and counts[method] % 3 == 0 else None

    return failure


@dataclass
class Bucket:
    """A bucket: `store` opens it with the SDK ``kind`` through the proxy, ``direct`` is a client without the proxy."""

    kind: str
    name: str
    direct: object

    def url(self, path: str) -> str:
        return f"{self.kind}://{self.name}/{path}"

    def store(self, path: str, **cloud: object) -> Store:
        return open_store(parse("url", self.url(path)), Cloud(**{"timeout": 2, "retries": 4} | cloud))

    def put(self, key: str, content: bytes) -> None:
        self.direct.put_object(Bucket=self.name, Key=key, Body=content)

    def get(self, key: str) -> bytes:
        return self.direct.get_object(Bucket=self.name, Key=key)["Body"].read()

    def names(self, prefix: str = "") -> set[str]:
        listing = self.direct.list_objects_v2(Bucket=self.name, Prefix=prefix)
        return {entry["Key"] for entry in listing.get("Contents", [])}
