"""The server's limits, with a network that waits and fails as told: full, late, slow, gone, secret, broken."""

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from serving import PATIENCE, TOKEN, Fake, Gate, ask, faked, form, picture, red, until

from ocrnet.cli import flags
from ocrnet.cli.serve import settings_from_flags
from ocrnet.serve import request_body, server, settings
from ocrnet.utils.errors import OcrnetError


def test_waiting_images_of_one_size_and_wish_are_looked_at_together():
    gate = Gate()
    network = Fake(gate)
    with faked(network, max_batch=4) as served, ThreadPoolExecutor(9) as pool:

        def send(number, path="/predict", size=(4, 6)):
            future = pool.submit(ask, served.url, path, picture(number, size))
            until(lambda: served.service.worker.waiting == len(sent) or not sent)
            sent.append((number, future))

        sent = []
        send(0)
        assert gate.reached.wait(PATIENCE)
        for number in range(1, 6):
            send(number)
        send(6, size=(6, 4))
        send(7, "/predict?flip=true")
        until(lambda: served.service.worker.waiting == 7)
        gate.opened.set()
        assert [red(future.result()) for _, future in sent] == [number for number, _ in sent]
    assert network.batches == [1, 4, 1, 1, 1]  # the first alone; 1 to 4; 5; another size; another wish


def test_a_short_wait_gathers_what_comes_together():
    network = Fake()
    with faked(network, max_batch=3, batch_wait=PATIENCE) as served, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda number: ask(served.url, "/predict", picture(number)), range(3)))
    assert [red(answer) for answer in answers] == [0, 1, 2]
    assert network.batches == [3]  # it did not wait any longer than for the third


def test_a_full_server_says_when_to_come_again_and_reads_no_body():
    gate = Gate()
    with faked(Fake(gate), max_requests=2) as served, ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(ask, served.url, "/predict", picture(number)) for number in range(2)]
        until(lambda: served.service.worker.requests == 2)
        refused = ask(served.url, "/predict", picture(9))
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "2 requests are in progress" in refused.json["error"]
        with socket.create_connection(urlsplit(served.url).netloc.split(":"), timeout=PATIENCE) as sock:
            sock.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n")  # and no body
            assert sock.recv(1000).split()[1] == b"503"
        assert ask(served.url, "/health").status == 200
        gate.opened.set()
        assert sorted(red(answer.result()) for answer in taken) == [0, 1]
        until(lambda: served.service.worker.requests == 0)
        assert ask(served.url, "/predict", picture(9)).status == 200


def test_the_images_in_work_fit_into_memory(monkeypatch):
    monkeypatch.setattr("ocrnet.serve.worker.IMAGE_BYTES", 100)  # two of 4x6 are 144
    gate = Gate()
    with faked(Fake(gate)) as served, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, served.url, "/predict", picture(1))
        assert gate.reached.wait(PATIENCE)
        assert ask(served.url, "/predict", picture(2)).status == 503
        gate.opened.set()
        assert first.result().status == 200


def test_what_takes_too_long_is_given_up_and_never_looked_at():
    gate = Gate()
    network = Fake(gate)
    with faked(network, timeout=1.5) as served, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, served.url, "/predict", picture(number)) for number in range(2)]
        assert {answer.result().status for answer in answers} == {504}
        gate.opened.set()
        assert red(ask(served.url, "/predict", picture(5))) == 5
    assert network.batches == [1, 1]  # the second of the late ones was passed over


def test_who_went_away_is_not_answered():
    gate = Gate()
    network = Fake(gate)
    with faked(network) as served, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, served.url, "/predict", picture(1))
        assert gate.reached.wait(PATIENCE)
        data = picture(2)
        with socket.create_connection(urlsplit(served.url).netloc.split(":")) as gone:
            gone.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            until(lambda: served.service.worker.waiting == 1)
        until(lambda: served.service.worker.requests == 1)
        gate.opened.set()
        assert red(first.result()) == 1
        assert b'ocrnet_requests_total{path="/predict",status="499"} 1' in ask(served.url, "/metrics").data
    assert network.batches == [1]


def test_a_fault_is_told_to_the_operator_alone():
    def fail(jobs):
        raise OcrnetError("/secret/model.safetensors: no memory") if jobs[0].image[0, 0, 0] == 13 else ValueError("odd")

    with faked(Fake(fail)) as served:
        for number in (13, 14):
            answer = ask(served.url, "/predict", picture(number))
            assert answer.status == 500
            assert answer.json == {"error": "inference failed for this image; see the server's log"}
        assert [str(error) for error in served.logged] == ["/secret/model.safetensors: no memory", "odd"]


def test_an_image_that_fails_spoils_none_of_its_batch():
    def fail(jobs):
        if any(job.image[0, 0, 0] == 13 for job in jobs):
            raise ValueError("unlucky")

    with faked(Fake(fail), max_batch=3, batch_wait=PATIENCE) as served, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda number: ask(served.url, "/predict", picture(number)), (12, 13, 14)))
    assert [answer.status for answer in answers] == [200, 500, 200]
    assert [red(answers[0]), red(answers[2])] == [12, 14]


def test_an_unforeseen_fault_shows_no_traceback(monkeypatch, capfd):
    monkeypatch.setattr("ocrnet.serve.responses.png", lambda array: 1 / 0)
    with faked(Fake()) as served:
        answer = ask(served.url, "/predict", picture(1))
    assert (answer.status, answer.json) == (500, {"error": "internal server error; see the server's log"})
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_token_is_asked_for():
    with faked(Fake(), token=TOKEN) as served:
        for path, data in (("/predict", picture(1)), ("/explain", picture(1)), ("/model", None), ("/metrics", None)):
            for given in (
                {},
                {"Authorization": TOKEN},
                {"Authorization": f"Bearer {TOKEN}x"},
                {"Authorization": "Bearer ü"},
                {"Authorization": f"Basic {TOKEN}"},
            ):
                answer = ask(served.url, path, data, {k: v.encode("latin1") for k, v in given.items()})
                assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            for scheme in ("Bearer", "bearer"):
                assert ask(served.url, path, data, {"Authorization": f"{scheme} {TOKEN}"}).status == 200
        assert ask(served.url, "/health").status == ask(served.url, "/").status == 200


def test_where_a_token_comes_from(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")

    def given(*argv):
        return settings_from_flags(flags.parse("serve", argv), max_batch=1)

    monkeypatch.delenv(settings.TOKEN_VARIABLE, raising=False)
    assert given().token is None
    assert given("--token_file", str(file)).token == TOKEN
    monkeypatch.setenv(settings.TOKEN_VARIABLE, TOKEN[::-1])
    assert given().token == TOKEN[::-1]
    with pytest.raises(OcrnetError, match="keep one"):
        given("--token_file", str(file))
    monkeypatch.setenv(settings.TOKEN_VARIABLE, "short")
    with pytest.raises(OcrnetError, match="OCRNET_SERVE_TOKEN: the token must be one line of at least 16"):
        given()
    monkeypatch.delenv(settings.TOKEN_VARIABLE)
    with pytest.raises(OcrnetError, match="cannot be read"):
        given("--token_file", str(tmp_path / "none"))
    for argv, message in (
        (("--port", "70000"), "--port is 70000, but must be at most 65535"),
        (("--max_requests", "0"), "--max_requests is 0, but must be at least 1"),
        (("--max_megapixels", "1000"), "at most 150"),
        (("--timeout", "soon"), "must be a number"),
    ):
        with pytest.raises(OcrnetError, match=message):
            given(*argv)


def test_slow_clients_hold_nothing(monkeypatch):
    monkeypatch.setattr(server, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(request_body, "FIRST_SECONDS", 1.5)
    with faked(Fake(), max_requests=1) as served:
        where = urlsplit(served.url).netloc.split(":")
        silent, heads, bodies = (
            [socket.create_connection(where, timeout=PATIENCE) for _ in range(20)] for _ in range(3)
        )
        for sock in heads:
            sock.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-")
        for sock in bodies:
            sock.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n\x89PNG")
        assert ask(served.url, "/predict", picture(3)).status == 200  # while they are there
        for sock in silent + heads:
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(100) == b""
        for sock in bodies:
            assert sock.recv(1000).split()[1] == b"408"
        for sock in silent + heads + bodies:
            sock.close()


def test_bodies_that_are_being_read_share_a_bounded_memory(monkeypatch):
    monkeypatch.setattr(request_body, "BODIES", 1)
    monkeypatch.setattr(request_body, "BEHIND_SECONDS", PATIENCE)  # nobody is so far behind
    with faked(Fake(), max_megabytes=1) as served:
        part = bytes(700_000)
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n"
        where = urlsplit(served.url).netloc.split(":")
        with socket.create_connection(where, timeout=PATIENCE) as slow, socket.create_connection(where) as other:
            slow.sendall(head + part)
            until(lambda: served.service.reader._held >= 700_000)
            other.sendall(head + part)
            assert other.recv(1000).split()[1] == b"503"
        until(lambda: served.service.reader._held == 0)
        assert ask(served.url, "/predict", picture(3)).status == 200


@pytest.mark.parametrize("name", ["image", "photo"])
def test_forms_as_clients_write_them(name):
    data = bytes(range(256)) + b"\r\n--limi\r\n\r\n --limit"
    whole, headers = form(name, data)
    assert request_body.file_in_form(whole, headers["Content-Type"]) == data
    quoted = 'multipart/form-data; charset=utf-8; boundary="limit"'
    assert request_body.file_in_form(b"a preamble\r\n" + whole + b"an epilogue", quoted) == data


def test_an_address_in_use_is_named():
    with server.bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(OcrnetError, match=rf"cannot bind --host 127.0.0.1 --port {port}: "):
            server.bind("127.0.0.1", port)
    with pytest.raises(OcrnetError, match="--port 0 selects a free port"):
        server.bind("no.such.host.invalid", 0)
