"""`ocrnet serve` as it is run: answers are those of the offline prediction, wrong requests get 4xx, its end is good."""

import gzip
import io
import json
import signal
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import cv2
import malformed
import numpy as np
import pytest
from PIL import Image
from serving import PATIENCE, ask, form, real, write_tiny

import ocrnet
from ocrnet.config import EVAL_SCALES
from ocrnet.data.image_io import decode_image
from ocrnet.data.visualize import overlay

SIZES = ((96, 128), (75, 101), (1, 1), (3, 200))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(tiny):
    with real(tiny, "--max_megabytes", "1") as found:
        yield found


@pytest.fixture(scope="module")
def offline(tiny):
    return ocrnet.load(tiny, engine="torch", device_target="CPU")


def picture(size=(96, 128), seed=0):
    # Smooth, as a photograph: noise would be one class.
    small = np.random.default_rng(seed).integers(0, 256, (max(1, size[0] // 8), max(1, size[1] // 8), 3), np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


def as_png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def from_png(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def arrays(data):
    (length,) = struct.unpack("<I", data[:4])
    head, offset = json.loads(data[4 : 4 + length]), 4 + length
    for entry in head["arrays"]:
        size = int(np.prod(entry["shape"]))
        head[entry["name"]] = np.frombuffer(data[offset : offset + size], np.uint8).reshape(entry["shape"])
        offset += size
    assert offset == len(data)
    return head


def test_labels_are_those_of_the_offline_prediction(served, offline):
    assert len(np.unique(offline.predict(picture()))) > 1  # so that equality says something
    for number, size in enumerate(SIZES):
        image = picture(size, number)
        answer = ask(served.url, "/predict", as_png(image))
        assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
        labels = from_png(answer.data)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, offline.predict(image))


def test_many_at_once_are_answered_each_its_own(served, offline):
    images = [picture(SIZES[i % 2], i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda image: ask(served.url, "/predict", as_png(image)), images))
    for image, answer in zip(images, answers, strict=True):
        np.testing.assert_array_equal(from_png(answer.data), offline.predict(image))


def test_a_form_and_a_body_are_the_same(served):
    image = as_png(picture())
    body, headers = form("image", image)
    other, _ = form("picture", image)
    raw = ask(served.url, "/predict", image)
    assert (
        raw.data == ask(served.url, "/predict", body, headers).data == ask(served.url, "/predict", other, headers).data
    )
    chunked = ask(served.url, "/predict", iter([image[:100], image[100:]]))
    assert chunked.data == raw.data


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP"])
def test_every_kind_is_read_as_offline_and_upright(served, offline, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    how = {} if kind == "BMP" else {"exif": exif}
    Image.fromarray(picture((64, 96))).save(file, kind, **how)
    image = decode_image(file.getvalue(), "it", upright=True)
    assert image.shape[:2] == ((64, 96) if kind == "BMP" else (96, 64))
    np.testing.assert_array_equal(from_png(ask(served.url, "/predict", file.getvalue()).data), offline.predict(image))


def test_overlay_color_and_json(served, offline):
    image = picture()
    labels = offline.predict(image)
    seen = from_png(ask(served.url, "/predict?output=overlay", as_png(image)).data)
    np.testing.assert_array_equal(seen[..., ::-1], overlay(image, labels, offline.palette))
    seen = from_png(ask(served.url, "/predict?output=color", as_png(image)).data)
    np.testing.assert_array_equal(seen[..., ::-1], np.array(offline.palette, np.uint8)[labels])
    by_query = ask(served.url, "/predict?output=json", as_png(image)).json
    by_accept = ask(served.url, "/predict", as_png(image), {"Accept": "application/json"}).json
    assert by_query | {"seconds": 0} == by_accept | {"seconds": 0}
    assert (by_query["height"], by_query["width"]) == (96, 128)
    counts = np.bincount(labels.reshape(-1))
    assert {row["index"]: row["pixels"] for row in by_query["classes"]} == {
        int(i): int(counts[i]) for i in np.flatnonzero(counts)
    }
    shares = [row["share"] for row in by_query["classes"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_many_scales_and_the_mirror_image(served, offline):
    image = picture((64, 80))
    answer = ask(served.url, "/predict?multi_scale=true&flip=true", as_png(image))
    np.testing.assert_array_equal(from_png(answer.data), offline.predict(image, EVAL_SCALES, flip=True))


def test_what_is_explained_is_what_the_network_answers(served, offline):
    image = picture()
    answer = ask(served.url, "/explain", as_png(image), {"Accept-Encoding": "gzip"})
    head = arrays(gzip.decompress(answer.data))
    plain = arrays(ask(served.url, "/explain", as_png(image)).data)
    found = offline.outputs(image, ("labels", "confidence", "relation"))
    np.testing.assert_array_equal(found["labels"], offline.predict(image))
    for seen in (head, plain):
        np.testing.assert_array_equal(seen["labels"], found["labels"])
        for name in ("confidence", "relation"):
            np.testing.assert_array_equal(seen[name], np.rint(found[name] * 255).astype(np.uint8))
    assert head["relation"].shape == (5, 24, 32)
    averaged = arrays(ask(served.url, "/explain?multi_scale=1&flip=1", as_png(image)).data)
    np.testing.assert_array_equal(averaged["labels"], offline.predict(image, EVAL_SCALES, flip=True))
    np.testing.assert_array_equal(averaged["relation"], head["relation"])  # of one look, whatever is averaged


def test_sixty_malformed_uploads_get_4xx_and_the_server_lives(served, offline):
    table = malformed.uploads(10**6)
    assert len(table) >= 60
    wrong = {}
    for name, (path, body, headers, method) in table.items():
        try:
            answer = ask(served.url, path, body, headers, method)
        except OSError as error:
            wrong[name] = repr(error)
            continue
        text = answer.data.decode()
        told = answer.json and set(answer.json) == {"error"} and "/tmp" not in text and "Traceback" not in text
        if not (400 <= answer.status < 500 and told and ".py" not in text):
            wrong[name] = answer.status, text[:200]
    assert wrong == {}
    expected = {
        "text": 415, "gif": 415, "empty": 400, "png bomb": 413, "just too many bytes": 413, "too many bytes": 413,
        "chunked and too long": 413, "JPEG cut at 60 %": 400, "PNG cut at 90 %": 400, "png just above the limit": 413,
        "sent by another site": 403, "GET of predict": 405, "unknown address": 404, "compressed body": 415,
    }  # fmt: skip
    assert {name: ask(served.url, *table[name][:2], *table[name][2:]).status
            for name in expected if name != "chunked and too long"} == {
        name: status for name, status in expected.items() if name != "chunked and too long"}  # fmt: skip
    assert served.process.poll() is None
    np.testing.assert_array_equal(
        from_png(ask(served.url, "/predict", as_png(picture())).data), offline.predict(picture())
    )


@pytest.mark.parametrize(
    "sent",
    [
        b"oops\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + 100_000 * b"a",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_400(served, sent):
    with socket.create_connection(urlsplit(served.url).netloc.split(":"), timeout=PATIENCE) as sock:
        sock.sendall(sent)
        assert sock.recv(1000).split()[1] == b"400"


def test_the_page_and_its_files(served):
    for path in ("/", "/page.css", "/page.js", "/arrays.js", "/icon.svg"):
        answer = ask(served.url, path)
        assert answer.status == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert b"https://" not in answer.data  # nothing from elsewhere
        assert b"http://" not in answer.data.replace(b"http://www.w3.org/2000/svg", b"")
    assert ask(served.url, "/docs").status == ask(served.url, "/redoc").status == 404  # FastAPI's load from a CDN


def test_openapi_describes_what_there_is(served):
    found = ask(served.url, "/openapi.json").json
    assert set(found["paths"]) == {"/predict", "/explain", "/model", "/health", "/metrics"}
    predict = found["paths"]["/predict"]["post"]
    assert {one["name"] for one in predict["parameters"]} == {"output", "multi_scale", "flip"}
    assert {"multipart/form-data", "image/jpeg", "image/png", "image/webp", "image/bmp"} == set(
        predict["requestBody"]["content"]
    )
    assert {"200", "400", "401", "403", "408", "413", "415", "500", "503", "504"} <= set(predict["responses"])


def test_health_model_and_metrics(served, offline):
    assert ask(served.url, "/health").json == {"status": "ok"}
    assert [one["name"] for one in ask(served.url, "/model").json["classes"]] == list(offline.names)
    before = samples(ask(served.url, "/metrics").data)
    ask(served.url, "/predict", as_png(picture()))
    ask(served.url, "/predict", b"hello")
    after = samples(ask(served.url, "/metrics").data)

    def more(name):
        return after[name] - before.get(name, 0)

    assert more('ocrnet_requests_total{path="/predict",status="200"}') == 1
    assert more('ocrnet_requests_total{path="/predict",status="415"}') == 1
    assert more('ocrnet_request_seconds_count{path="/predict"}') == 2
    assert more('ocrnet_request_seconds_bucket{path="/predict",le="+Inf"}') == 2
    assert more("ocrnet_batch_images_count") == more("ocrnet_batch_images_sum") == 1
    assert after["ocrnet_waiting"] == after["ocrnet_requests_in_work"] == 0
    assert after["process_resident_memory_bytes"] > 1e7


def samples(text):
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_sigterm_lets_what_is_in_work_end(tiny, offline):
    image = picture((160, 240))
    with real(tiny) as served, ThreadPoolExecutor(3) as pool:
        path = "/predict?multi_scale=true&flip=true"
        answers = [pool.submit(ask, served.url, path, as_png(image)) for _ in range(3)]
        until = time.monotonic() + PATIENCE
        while samples(ask(served.url, "/metrics").data)["ocrnet_requests_in_work"] < 3:
            assert time.monotonic() < until
            time.sleep(0.02)
        served.process.send_signal(signal.SIGTERM)
        for answer in answers:
            np.testing.assert_array_equal(
                from_png(answer.result().data), offline.predict(image, EVAL_SCALES, flip=True)
            )
        _, said = served.process.communicate(timeout=PATIENCE)
        assert served.process.returncode == 128 + signal.SIGTERM
        assert said.startswith("SIGTERM: finishing the requests in progress")
        assert "Traceback" not in said
    with pytest.raises(ConnectionRefusedError):
        ask(served.url, "/health")
