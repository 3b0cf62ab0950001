"""What clients may do to a server that answers others: silent bodies, slow readers, foreign pages, odd files."""

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
from serving import PATIENCE, TOKEN, Fake, Gate, ask, faked, picture, red, until

from ocrnet.serve import request_body, server


def test_who_sent_fast_may_not_be_silent_for_long(monkeypatch):
    monkeypatch.setattr(request_body, "FIRST_SECONDS", 1.0)
    with faked(Fake(), max_megabytes=1) as served:
        with socket.create_connection(urlsplit(served.url).netloc.split(":"), timeout=PATIENCE) as sock:
            sock.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n" + bytes(899_999)
            )
            begun = time.monotonic()
            assert sock.recv(1000).split()[1] == b"408"
        assert time.monotonic() - begun < 20  # by the rate alone, the silence would have had 54 seconds


def test_silent_bodies_make_room_for_others(monkeypatch):
    monkeypatch.setattr(request_body, "BODIES", 1)
    monkeypatch.setattr(request_body, "FIRST_SECONDS", PATIENCE)
    monkeypatch.setattr(request_body, "BEHIND_SECONDS", 0.1)
    with faked(Fake(), max_megabytes=1) as served:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 600000\r\n\r\n"
        with socket.create_connection(urlsplit(served.url).netloc.split(":"), timeout=PATIENCE) as silent:
            silent.sendall(head + bytes(599_999))
            until(lambda: served.service.reader._held >= 599_999)
            time.sleep(0.2)
            padded = picture(7) + bytes(600_000)
            assert red(ask(served.url, "/predict", padded)) == 7
            assert silent.recv(1000).split()[1] == b"408"
        until(lambda: served.service.reader._held == 0)


def test_a_body_is_counted_until_it_is_decoded_and_not_kept_after_it(monkeypatch):
    class Bytes(bytearray):
        """A body that can be watched."""

    watched, counted, gate, decode = [], [], Gate(), request_body.decode
    monkeypatch.setattr(request_body.Reader, "_extract_image", lambda self, data, kind: watched_bytes(data))

    def watched_bytes(data):
        image = Bytes(data)
        watched.append(weakref.ref(image))
        return image

    def counting(data, head):
        counted.append(served.service.reader._held)
        return decode(data, head)

    monkeypatch.setattr(request_body, "decode", counting)
    data = picture(3) + bytes(5000)
    with faked(Fake(gate)) as served, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, served.url, "/predict", data)
        assert gate.reached.wait(PATIENCE)
        assert counted == [len(data)]
        until(lambda: watched[0]() is None)
        assert served.service.reader._held == 0
        gate.opened.set()
        assert red(answer.result()) == 3


def test_a_large_answer_is_sent_to_a_slow_client_and_not_kept_for_a_silent_one(monkeypatch):
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.5)
    noise = np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), np.uint8)
    data = cv2.imencode(".bmp", noise)[1].tobytes()
    with faked(Fake()) as served:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)

        def begun():
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            sock.settimeout(PATIENCE)
            host, port = urlsplit(served.url).netloc.split(":")
            sock.connect((host, int(port)))
            sock.sendall(head + data)
            return sock

        with begun() as slow, begun() as silent:
            answer = b""
            for _ in range(10):  # more than twice the time after which idle connections are closed
                answer += slow.recv(65_536, socket.MSG_WAITALL)
                time.sleep(0.2)
            top, _, got = answer.partition(b"\r\n\r\n")
            length = next(
                int(line.split()[1]) for line in top.split(b"\r\n") if line.lower().startswith(b"content-length")
            )
            assert length > 5_000_000
            while len(got) < length and (part := slow.recv(1_000_000)):
                got += part
            assert len(got) == length
            taken = 0
            with contextlib.suppress(ConnectionResetError):
                while part := silent.recv(1_000_000):
                    taken += len(part)
            assert taken < length


def test_pages_of_others_are_refused_however_the_browser_says_it():
    image = picture(5)

    def status(url, method="POST", **headers):
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return ask(
            url, "/predict" if method == "POST" else "/health", image if method == "POST" else None, given
        ).status

    with faked(Fake()) as served:
        url, own = served.url, urlsplit(served.url).netloc
        port = own.rpartition(":")[2]
        assert status(url, Origin="http://evil.example") == 403
        assert status(url, Origin="null") == status(url, Origin="http://[") == 403
        assert status(url, Origin=f"http://127.0.0.1:{int(port) - 1}") == 403
        assert status(url, Origin=f"http://{own}") == 200
        for site, code in (("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)):
            assert status(url, Origin=f"http://{own}", Sec_Fetch_Site=site) == code
        for method in ("POST", "GET"):  # a name of the attacker's that leads here
            foreign = {"Host": f"evil.example:{port}", "Sec_Fetch_Site": "same-origin"}
            assert status(url, method, Origin=f"http://evil.example:{port}", **foreign) == 403
            for host in ("localhost", "LOCALHOST:9", "127.0.0.1", f"[::1]:{port}"):
                assert status(url, method, Host=host) == 200
            for host in ("", "localhost.evil.example", "evil.example", "127.0.0.1:80:80", "[::2]:80"):
                assert status(url, method, Host=host) == 403
    with faked(Fake(), host="0.0.0.0") as served:
        url = served.url
        assert status(url, Host="seg.example", Origin="https://seg.example") == 200
        assert status(url, Host="seg.example:443", Origin="https://seg.example") == 200
        assert status(url, Host="seg.example:444", Origin="https://seg.example") == 403
    with faked(Fake(), token=TOKEN) as served:  # without the token, which no other page knows, it is refused anyway
        assert status(served.url, Host="seg.example", Authorization=f"Bearer {TOKEN}") == 200
        assert status(served.url, Host="seg.example") == 401


def test_methods_and_addresses_that_clients_try():
    with faked(Fake()) as served:
        for path in ("/", "/health"):
            answer = ask(served.url, path, method="HEAD")
            assert (answer.status, answer.data) == (200, b"")
        assert ask(served.url, "/model/").status == 404  # and not sent on to wherever Host says


def jpeg_of_several(count=2):
    image = Image.new("RGB", (8, 6), (200, 0, 0))
    file = io.BytesIO()
    image.save(file, "MPO", save_all=True, append_images=[image] * (count - 1))
    return file.getvalue()


def test_heads_that_pillow_knows_otherwise(monkeypatch):
    whole = jpeg_of_several()
    assert Image.open(io.BytesIO(whole)).format == "MPO"
    profile = zlib.compress(bytes(2 * 2**20))
    plain = png(5, 4, bytes(24))
    large = plain[:33] + chunk(b"iCCP", b"x\0\0" + profile) + plain[33:]
    damaged = whole[:-2]
    wide = png(1_000_001, 1, bytes(1_000_002))
    with faked(Fake()) as served:
        assert ask(served.url, "/predict", whole).status == 200
        assert ask(served.url, "/predict", large).status == 200
        answer = ask(served.url, "/predict", damaged)
        assert (answer.status, answer.json["error"]) == (400, "the image is damaged: its JPEG data cannot be decoded")
        answer = ask(served.url, "/predict", wide)
        assert (answer.status, answer.json["error"]) == (
            413, "the image exceeds the limit of 1,000,000 pixels in width or height")  # fmt: skip
        monkeypatch.setattr(request_body.Image, "open", lambda *given, **named: {}["odd"])
        assert ask(served.url, "/predict", whole).status == 400
