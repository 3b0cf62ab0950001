"""Limits of the server, with a fake network that waits or fails: load, timeouts, disconnects, tokens, errors."""

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from serving import TIMEOUT, TOKEN, FakeNetwork, Gate, fake_server, first_label, form, red_png, request, wait_until

from ocrnet.cli import flags
from ocrnet.cli.serve import settings_from_flags
from ocrnet.serve import request_body, server, settings
from ocrnet.utils.errors import OcrnetError


def test_queued_images_of_the_same_size_and_options_are_batched():
    gate = Gate()
    network = FakeNetwork(gate)
    with fake_server(network, max_batch=4) as served, ThreadPoolExecutor(9) as pool:

        def send(number, path="/predict", size=(4, 6)):
            future = pool.submit(request, served.url, path, red_png(number, size))
            wait_until(lambda: served.service.worker.waiting == len(sent) or not sent)
            sent.append((number, future))

        sent = []
        send(0)
        assert gate.reached.wait(TIMEOUT)
        for number in range(1, 6):
            send(number)
        send(6, size=(6, 4))
        send(7, "/predict?flip=true")
        wait_until(lambda: served.service.worker.waiting == 7)
        gate.opened.set()
        assert [first_label(future.result()) for _, future in sent] == [number for number, _ in sent]
    assert network.batches == [1, 4, 1, 1, 1]  # image 0; images 1 to 4; image 5; another size; another option


def test_batch_wait_collects_concurrent_requests():
    network = FakeNetwork()
    with fake_server(network, max_batch=3, batch_wait=TIMEOUT) as served, ThreadPoolExecutor(3) as pool:
        responses = list(pool.map(lambda number: request(served.url, "/predict", red_png(number)), range(3)))
    assert [first_label(response) for response in responses] == [0, 1, 2]
    assert network.batches == [3]  # the wait ends with the third image


def test_a_full_server_sends_retry_after_and_reads_no_body():
    gate = Gate()
    with fake_server(FakeNetwork(gate), max_requests=2) as served, ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(request, served.url, "/predict", red_png(number)) for number in range(2)]
        wait_until(lambda: served.service.worker.requests == 2)
        refused = request(served.url, "/predict", red_png(9))
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "2 requests are in progress" in refused.json["error"]
        with socket.create_connection(urlsplit(served.url).netloc.split(":"), timeout=TIMEOUT) as sock:
            sock.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n")  # without a body
            assert sock.recv(1000).split()[1] == b"503"
        assert request(served.url, "/health").status == 200
        gate.opened.set()
        assert sorted(first_label(response.result()) for response in accepted) == [0, 1]
        wait_until(lambda: served.service.worker.requests == 0)
        assert request(served.url, "/predict", red_png(9)).status == 200


def test_the_memory_of_images_in_progress_is_limited(monkeypatch):
    monkeypatch.setattr("ocrnet.serve.worker.IMAGE_BYTES", 100)  # two images of 4x6 have 144 bytes
    gate = Gate()
    with fake_server(FakeNetwork(gate)) as served, ThreadPoolExecutor(1) as pool:
        first = pool.submit(request, served.url, "/predict", red_png(1))
        assert gate.reached.wait(TIMEOUT)
        assert request(served.url, "/predict", red_png(2)).status == 503
        gate.opened.set()
        assert first.result().status == 200


def test_a_request_that_times_out_gets_504_and_is_not_predicted():
    gate = Gate()
    network = FakeNetwork(gate)
    with fake_server(network, timeout=1.5) as served, ThreadPoolExecutor(2) as pool:
        responses = [pool.submit(request, served.url, "/predict", red_png(number)) for number in range(2)]
        assert {response.result().status for response in responses} == {504}
        gate.opened.set()
        assert first_label(request(served.url, "/predict", red_png(5))) == 5
    assert network.batches == [1, 1]  # the second request that timed out was skipped


def test_the_image_of_a_disconnected_client_is_not_predicted():
    gate = Gate()
    network = FakeNetwork(gate)
    with fake_server(network) as served, ThreadPoolExecutor(1) as pool:
        first = pool.submit(request, served.url, "/predict", red_png(1))
        assert gate.reached.wait(TIMEOUT)
        data = red_png(2)
        with socket.create_connection(urlsplit(served.url).netloc.split(":")) as gone:
            gone.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            wait_until(lambda: served.service.worker.waiting == 1)
        wait_until(lambda: served.service.worker.requests == 1)
        gate.opened.set()
        assert first_label(first.result()) == 1
        assert b'ocrnet_requests_total{path="/predict",status="499"} 1' in request(served.url, "/metrics").data
    assert network.batches == [1]


def test_error_details_are_logged_and_not_sent_to_the_client():
    def fail(jobs):
        raise OcrnetError("/secret/model.safetensors: no memory") if jobs[0].image[0, 0, 0] == 13 else ValueError("odd")

    with fake_server(FakeNetwork(fail)) as served:
        for number in (13, 14):
            response = request(served.url, "/predict", red_png(number))
            assert response.status == 500
            assert response.json == {"error": "inference failed for this image; see the server's log"}
        assert [str(error) for error in served.logged] == ["/secret/model.safetensors: no memory", "odd"]


def test_an_image_that_fails_does_not_fail_its_batch():
    def fail(jobs):
        if any(job.image[0, 0, 0] == 13 for job in jobs):
            raise ValueError("unlucky")

    with fake_server(FakeNetwork(fail), max_batch=3, batch_wait=TIMEOUT) as served, ThreadPoolExecutor(3) as pool:
        responses = list(pool.map(lambda number: request(served.url, "/predict", red_png(number)), (12, 13, 14)))
    assert [response.status for response in responses] == [200, 500, 200]
    assert [first_label(responses[0]), first_label(responses[2])] == [12, 14]


def test_an_unexpected_error_sends_no_traceback(monkeypatch, capfd):
    monkeypatch.setattr("ocrnet.serve.responses.png", lambda array: 1 / 0)
    with fake_server(FakeNetwork()) as served:
        response = request(served.url, "/predict", red_png(1))
    assert (response.status, response.json) == (500, {"error": "internal server error; see the server's log"})
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_requests_without_the_token_get_401():
    with fake_server(FakeNetwork(), token=TOKEN) as served:
        for path, data in (("/predict", red_png(1)), ("/explain", red_png(1)), ("/model", None), ("/metrics", None)):
            for headers in (
                {},
                {"Authorization": TOKEN},
                {"Authorization": f"Bearer {TOKEN}x"},
                {"Authorization": "Bearer ü"},
                {"Authorization": f"Basic {TOKEN}"},
            ):
                response = request(served.url, path, data, {k: v.encode("latin1") for k, v in headers.items()})
                assert (response.status, response.headers["www-authenticate"]) == (401, "Bearer")
            for scheme in ("Bearer", "bearer"):
                assert request(served.url, path, data, {"Authorization": f"{scheme} {TOKEN}"}).status == 200
        assert request(served.url, "/health").status == request(served.url, "/").status == 200


def test_the_token_is_read_from_a_file_or_the_environment_and_flags_are_checked(tmp_path, monkeypatch):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")

    def read_settings(*argv):
        return settings_from_flags(flags.parse("serve", argv), max_batch=1)

    monkeypatch.delenv(settings.TOKEN_VARIABLE, raising=False)
    assert read_settings().token is None
    assert read_settings("--token_file", str(path)).token == TOKEN
    monkeypatch.setenv(settings.TOKEN_VARIABLE, TOKEN[::-1])
    assert read_settings().token == TOKEN[::-1]
    with pytest.raises(OcrnetError, match="keep one"):
        read_settings("--token_file", str(path))
    monkeypatch.setenv(settings.TOKEN_VARIABLE, "short")
    with pytest.raises(OcrnetError, match="OCRNET_SERVE_TOKEN: the token must be one line of at least 16"):
        read_settings()
    monkeypatch.delenv(settings.TOKEN_VARIABLE)
    with pytest.raises(OcrnetError, match="cannot be read"):
        read_settings("--token_file", str(tmp_path / "none"))
    for argv, message in (
        (("--port", "70000"), "--port is 70000, but must be at most 65535"),
        (("--max_requests", "0"), "--max_requests is 0, but must be at least 1"),
        (("--max_megapixels", "1000"), "at most 150"),
        (("--timeout", "soon"), "must be a number"),
    ):
        with pytest.raises(OcrnetError, match=message):
            read_settings(*argv)


def test_slow_clients_do_not_block_others(monkeypatch):
    monkeypatch.setattr(server, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(request_body, "FIRST_SECONDS", 1.5)
    with fake_server(FakeNetwork(), max_requests=1) as served:
        address = urlsplit(served.url).netloc.split(":")
        silent, heads, bodies = (
            [socket.create_connection(address, timeout=TIMEOUT) for _ in range(20)] for _ in range(3)
        )
        for sock in heads:
            sock.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-")
        for sock in bodies:
            sock.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n\x89PNG")
        assert request(served.url, "/predict", red_png(3)).status == 200  # while the slow clients are connected
        for sock in silent + heads:
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(100) == b""
        for sock in bodies:
            assert sock.recv(1000).split()[1] == b"408"
        for sock in silent + heads + bodies:
            sock.close()


def test_bodies_in_progress_share_a_memory_limit(monkeypatch):
    monkeypatch.setattr(request_body, "BODIES", 1)
    monkeypatch.setattr(request_body, "BEHIND_SECONDS", TIMEOUT)  # no body is that far behind
    with fake_server(FakeNetwork(), max_megabytes=1) as served:
        part = bytes(700_000)
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n"
        address = urlsplit(served.url).netloc.split(":")
        with socket.create_connection(address, timeout=TIMEOUT) as slow, socket.create_connection(address) as second:
            slow.sendall(head + part)
            wait_until(lambda: served.service.reader._held >= 700_000)
            second.sendall(head + part)
            assert second.recv(1000).split()[1] == b"503"
        wait_until(lambda: served.service.reader._held == 0)
        assert request(served.url, "/predict", red_png(3)).status == 200


@pytest.mark.parametrize("name", ["image", "photo"])
def test_form_variants_are_parsed(name):
    data = bytes(range(256)) + b"\r\n--limi\r\n\r\n --limit"
    body, headers = form(name, data)
    assert request_body.file_in_form(body, headers["Content-Type"]) == data
    quoted = 'multipart/form-data; charset=utf-8; boundary="limit"'
    assert request_body.file_in_form(b"a preamble\r\n" + body + b"an epilogue", quoted) == data


def test_the_error_of_an_address_that_cannot_be_bound_names_it():
    with server.bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(OcrnetError, match=rf"cannot bind --host 127.0.0.1 --port {port}: "):
            server.bind("127.0.0.1", port)
    with pytest.raises(OcrnetError, match="--port 0 selects a free port"):
        server.bind("no.such.host.invalid", 0)
