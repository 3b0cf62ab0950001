"""Clients that must not affect others: stalled bodies, slow readers, pages of other origins, unusual images."""

import contextlib
import io
import socket
import time
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import cv2
import numpy as np
from malformed import chunk, png
from PIL import Image
from serving import TIMEOUT, TOKEN, FakeNetwork, Gate, fake_server, first_label, red_png, request, wait_until

from ocrnet.serve import request_body, server


def test_a_body_that_stalls_after_a_fast_start_times_out(monkeypatch):
    monkeypatch.setattr(request_body, "FIRST_SECONDS", 1.0)
    with fake_server(FakeNetwork(), max_megabytes=1) as served:
        with socket.create_connection(urlsplit(served.url).netloc.split(":"), timeout=TIMEOUT) as sock:
            sock.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n" + bytes(899_999)
            )
            started = time.monotonic()
            assert sock.recv(1000).split()[1] == b"408"
        assert time.monotonic() - started < 20  # the minimum rate would allow a pause of 54 seconds


def test_stalled_bodies_are_dropped_when_others_need_the_memory(monkeypatch):
    monkeypatch.setattr(request_body, "BODIES", 1)
    monkeypatch.setattr(request_body, "FIRST_SECONDS", TIMEOUT)
    monkeypatch.setattr(request_body, "BEHIND_SECONDS", 0.1)
    with fake_server(FakeNetwork(), max_megabytes=1) as served:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 600000\r\n\r\n"
        with socket.create_connection(urlsplit(served.url).netloc.split(":"), timeout=TIMEOUT) as silent:
            silent.sendall(head + bytes(599_999))
            wait_until(lambda: served.service.reader._held >= 599_999)
            time.sleep(0.2)
            padded = red_png(7) + bytes(600_000)
            assert first_label(request(served.url, "/predict", padded)) == 7
            assert silent.recv(1000).split()[1] == b"408"
        wait_until(lambda: served.service.reader._held == 0)


def test_a_body_counts_until_it_is_decoded_and_is_then_freed(monkeypatch):
    class WatchedBytes(bytearray):
        """A body that supports weak references."""

    references, counts, gate, decode = [], [], Gate(), request_body.decode
    monkeypatch.setattr(request_body.Reader, "_extract_image", lambda self, data, kind: watch(data))

    def watch(data):
        image = WatchedBytes(data)
        references.append(weakref.ref(image))
        return image

    def count_and_decode(data, head):
        counts.append(served.service.reader._held)
        return decode(data, head)

    monkeypatch.setattr(request_body, "decode", count_and_decode)
    data = red_png(3) + bytes(5000)
    with fake_server(FakeNetwork(gate)) as served, ThreadPoolExecutor(1) as pool:
        response = pool.submit(request, served.url, "/predict", data)
        assert gate.reached.wait(TIMEOUT)
        assert counts == [len(data)]
        wait_until(lambda: references[0]() is None)
        assert served.service.reader._held == 0
        gate.opened.set()
        assert first_label(response.result()) == 3


def test_a_large_response_reaches_a_slow_client_and_is_dropped_for_a_stuck_one(monkeypatch):
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.5)
    noise = np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), np.uint8)
    data = cv2.imencode(".bmp", noise)[1].tobytes()
    with fake_server(FakeNetwork()) as served:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)

        def send_image():
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            sock.settimeout(TIMEOUT)
            host, port = urlsplit(served.url).netloc.split(":")
            sock.connect((host, int(port)))
            sock.sendall(head + data)
            return sock

        with send_image() as slow, send_image() as stuck:
            response = b""
            for _ in range(10):  # more than twice the time after which idle connections are closed
                response += slow.recv(65_536, socket.MSG_WAITALL)
                time.sleep(0.2)
            top, _, content = response.partition(b"\r\n\r\n")
            length = next(
                int(line.split()[1]) for line in top.split(b"\r\n") if line.lower().startswith(b"content-length")
            )
            assert length > 5_000_000
            while len(content) < length and (chunk_read := slow.recv(1_000_000)):
                content += chunk_read
            assert len(content) == length
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while chunk_read := stuck.recv(1_000_000):
                    received += len(chunk_read)
            assert received < length


def test_requests_from_other_origins_and_host_names_are_refused():
    image = red_png(5)

    def status(url, method="POST", **fields):
        headers = {name.replace("_", "-"): value for name, value in fields.items()}
        return request(
            url, "/predict" if method == "POST" else "/health", image if method == "POST" else None, headers
        ).status

    with fake_server(FakeNetwork()) as served:
        url, address = served.url, urlsplit(served.url).netloc
        port = address.rpartition(":")[2]
        assert status(url, Origin="http://evil.example") == 403
        assert status(url, Origin="null") == status(url, Origin="http://[") == 403
        assert status(url, Origin=f"http://127.0.0.1:{int(port) - 1}") == 403
        assert status(url, Origin=f"http://{address}") == 200
        for site, code in (("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)):
            assert status(url, Origin=f"http://{address}", Sec_Fetch_Site=site) == code
        for method in ("POST", "GET"):  # the attacker's host name resolves to this server
            foreign = {"Host": f"evil.example:{port}", "Sec_Fetch_Site": "same-origin"}
            assert status(url, method, Origin=f"http://evil.example:{port}", **foreign) == 403
            for host in ("localhost", "LOCALHOST:9", "127.0.0.1", f"[::1]:{port}"):
                assert status(url, method, Host=host) == 200
            for host in ("", "localhost.evil.example", "evil.example", "127.0.0.1:80:80", "[::2]:80"):
                assert status(url, method, Host=host) == 403
    with fake_server(FakeNetwork(), host="0.0.0.0") as served:
        url = served.url
        assert status(url, Host="seg.example", Origin="https://seg.example") == 200
        assert status(url, Host="seg.example:443", Origin="https://seg.example") == 200
        assert status(url, Host="seg.example:444", Origin="https://seg.example") == 403
    with fake_server(FakeNetwork(), token=TOKEN) as served:  # pages of other origins do not know the token
        assert status(served.url, Host="seg.example", Authorization=f"Bearer {TOKEN}") == 200
        assert status(served.url, Host="seg.example") == 401


def test_head_is_supported_and_a_trailing_slash_is_not_redirected():
    with fake_server(FakeNetwork()) as served:
        for path in ("/", "/health"):
            response = request(served.url, path, method="HEAD")
            assert (response.status, response.data) == (200, b"")
        assert request(served.url, "/model/").status == 404  # no redirect, which would go to the value of Host


def multi_picture_jpeg(count=2):
    image = Image.new("RGB", (8, 6), (200, 0, 0))
    file = io.BytesIO()
    image.save(file, "MPO", save_all=True, append_images=[image] * (count - 1))
    return file.getvalue()


def test_images_with_unusual_headers_are_decoded_or_refused(monkeypatch):
    mpo = multi_picture_jpeg()
    assert Image.open(io.BytesIO(mpo)).format == "MPO"
    profile = zlib.compress(bytes(2 * 2**20))
    plain = png(5, 4, bytes(24))
    large = plain[:33] + chunk(b"iCCP", b"x\0\0" + profile) + plain[33:]
    damaged = mpo[:-2]
    wide = png(1_000_001, 1, bytes(1_000_002))
    with fake_server(FakeNetwork()) as served:
        assert request(served.url, "/predict", mpo).status == 200
        assert request(served.url, "/predict", large).status == 200
        response = request(served.url, "/predict", damaged)
        assert (response.status, response.json["error"]) == (
            400, "the image is damaged: its JPEG data cannot be decoded")  # fmt: skip
        response = request(served.url, "/predict", wide)
        assert (response.status, response.json["error"]) == (
            413, "the image exceeds the limit of 1,000,000 pixels in width or height")  # fmt: skip
        monkeypatch.setattr(request_body.Image, "open", lambda *args, **kwargs: {}["odd"])
        assert request(served.url, "/predict", mpo).status == 400
