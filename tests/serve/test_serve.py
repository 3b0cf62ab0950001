"""`ocrnet serve`: responses equal the offline prediction, wrong requests get 4xx, and SIGTERM finishes requests."""

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
from serving import TIMEOUT, form, real_server, request, write_checkpoint

import ocrnet
from ocrnet.config import EVAL_SCALES
from ocrnet.data.image_io import decode_image
from ocrnet.data.visualize import overlay

SIZES = ((96, 128), (75, 101), (1, 1), (3, 200))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(tiny):
    with real_server(tiny, "--max_megabytes", "1") as running:
        yield running


@pytest.fixture(scope="module")
def offline(tiny):
    return ocrnet.load(tiny, engine="torch", device_target="CPU")


def smooth_image(size=(96, 128), seed=0):
    # The image is smooth, because noise would be predicted as one class.
    small = np.random.default_rng(seed).integers(0, 256, (max(1, size[0] // 8), max(1, size[1] // 8), 3), np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


def encode_png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def decode_png(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def parse_arrays(data):
    (length,) = struct.unpack("<I", data[:4])
    head, offset = json.loads(data[4 : 4 + length]), 4 + length
    for entry in head["arrays"]:
        size = int(np.prod(entry["shape"]))
        head[entry["name"]] = np.frombuffer(data[offset : offset + size], np.uint8).reshape(entry["shape"])
        offset += size
    assert offset == len(data)
    return head


def test_labels_equal_the_offline_prediction(served, offline):
    assert len(np.unique(offline.predict(smooth_image()))) > 1  # otherwise equality would prove little
    for number, size in enumerate(SIZES):
        image = smooth_image(size, number)
        response = request(served.url, "/predict", encode_png(image))
        assert (response.status, response.headers["content-type"]) == (200, "image/png")
        labels = decode_png(response.data)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, offline.predict(image))


def test_concurrent_requests_get_the_labels_of_their_own_images(served, offline):
    images = [smooth_image(SIZES[i % 2], i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(lambda image: request(served.url, "/predict", encode_png(image)), images))
    for image, response in zip(images, responses, strict=True):
        np.testing.assert_array_equal(decode_png(response.data), offline.predict(image))


def test_a_form_a_body_and_a_chunked_body_get_the_same_response(served):
    image = encode_png(smooth_image())
    body, headers = form("image", image)
    other_form, _ = form("picture", image)
    raw = request(served.url, "/predict", image)
    assert request(served.url, "/predict", body, headers).data == raw.data
    assert request(served.url, "/predict", other_form, headers).data == raw.data
    chunked = request(served.url, "/predict", iter([image[:100], image[100:]]))
    assert chunked.data == raw.data


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP"])
def test_image_formats_are_decoded_as_offline_and_rotated_by_exif(served, offline, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    options = {} if kind == "BMP" else {"exif": exif}
    Image.fromarray(smooth_image((64, 96))).save(buffer, kind, **options)
    image = decode_image(buffer.getvalue(), "it", upright=True)
    assert image.shape[:2] == ((64, 96) if kind == "BMP" else (96, 64))
    response = request(served.url, "/predict", buffer.getvalue())
    np.testing.assert_array_equal(decode_png(response.data), offline.predict(image))


def test_overlay_color_and_json_equal_the_offline_prediction(served, offline):
    image = smooth_image()
    labels = offline.predict(image)
    received = decode_png(request(served.url, "/predict?output=overlay", encode_png(image)).data)
    np.testing.assert_array_equal(received[..., ::-1], overlay(image, labels, offline.palette))
    received = decode_png(request(served.url, "/predict?output=color", encode_png(image)).data)
    np.testing.assert_array_equal(received[..., ::-1], np.array(offline.palette, np.uint8)[labels])
    by_query = request(served.url, "/predict?output=json", encode_png(image)).json
    by_accept = request(served.url, "/predict", encode_png(image), {"Accept": "application/json"}).json
    assert by_query | {"seconds": 0} == by_accept | {"seconds": 0}
    assert (by_query["height"], by_query["width"]) == (96, 128)
    counts = np.bincount(labels.reshape(-1))
    assert {row["index"]: row["pixels"] for row in by_query["classes"]} == {
        int(i): int(counts[i]) for i in np.flatnonzero(counts)
    }
    shares = [row["share"] for row in by_query["classes"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_multi_scale_and_flip_equal_the_offline_prediction(served, offline):
    image = smooth_image((64, 80))
    response = request(served.url, "/predict?multi_scale=true&flip=true", encode_png(image))
    np.testing.assert_array_equal(decode_png(response.data), offline.predict(image, EVAL_SCALES, flip=True))


def test_explain_returns_the_outputs_of_the_network(served, offline):
    image = smooth_image()
    response = request(served.url, "/explain", encode_png(image), {"Accept-Encoding": "gzip"})
    compressed = parse_arrays(gzip.decompress(response.data))
    plain = parse_arrays(request(served.url, "/explain", encode_png(image)).data)
    predicted = offline.outputs(image, ("labels", "confidence", "relation"))
    np.testing.assert_array_equal(predicted["labels"], offline.predict(image))
    for parsed in (compressed, plain):
        np.testing.assert_array_equal(parsed["labels"], predicted["labels"])
        for name in ("confidence", "relation"):
            np.testing.assert_array_equal(parsed[name], np.rint(predicted[name] * 255).astype(np.uint8))
    assert compressed["relation"].shape == (5, 24, 32)
    averaged = parse_arrays(request(served.url, "/explain?multi_scale=1&flip=1", encode_png(image)).data)
    np.testing.assert_array_equal(averaged["labels"], offline.predict(image, EVAL_SCALES, flip=True))
    np.testing.assert_array_equal(averaged["relation"], compressed["relation"])  # always of one pass at scale 1


def test_sixty_malformed_uploads_get_4xx_and_the_server_survives(served, offline):
    table = malformed.uploads(10**6)
    assert len(table) >= 60
    failures = {}
    for name, (path, body, headers, method) in table.items():
        try:
            response = request(served.url, path, body, headers, method)
        except OSError as error:
            failures[name] = repr(error)
            continue
        text = response.data.decode()
        has_error = response.json and set(response.json) == {"error"} and "/tmp" not in text and "Traceback" not in text
        if not (400 <= response.status < 500 and has_error and ".py" not in text):
            failures[name] = response.status, text[:200]
    assert failures == {}
    expected = {
        "text": 415, "gif": 415, "empty": 400, "png bomb": 413, "just too many bytes": 413, "too many bytes": 413,
        "chunked and too long": 413, "JPEG cut at 60 %": 400, "PNG cut at 90 %": 400, "png just above the limit": 413,
        "request of another site": 403, "GET of predict": 405, "unknown path": 404, "compressed body": 415,
    }  # fmt: skip
    assert {name: request(served.url, *table[name][:2], *table[name][2:]).status
            for name in expected if name != "chunked and too long"} == {
        name: status for name, status in expected.items() if name != "chunked and too long"}  # fmt: skip
    assert served.process.poll() is None
    np.testing.assert_array_equal(
        decode_png(request(served.url, "/predict", encode_png(smooth_image())).data), offline.predict(smooth_image())
    )


@pytest.mark.parametrize(
    "data",
    [
        b"oops\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + 100_000 * b"a",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_malformed_http_gets_400(served, data):
    with socket.create_connection(urlsplit(served.url).netloc.split(":"), timeout=TIMEOUT) as sock:
        sock.sendall(data)
        assert sock.recv(1000).split()[1] == b"400"


def test_page_files_are_served_and_reference_no_other_host(served):
    for path in ("/", "/page.css", "/page.js", "/arrays.js", "/icon.svg"):
        response = request(served.url, path)
        assert response.status == 200
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert b"https://" not in response.data  # nothing is loaded from other hosts
        assert b"http://" not in response.data.replace(b"http://www.w3.org/2000/svg", b"")
    # The pages of FastAPI, which load files from a CDN, are off.
    assert request(served.url, "/docs").status == request(served.url, "/redoc").status == 404


def test_openapi_describes_all_paths_and_parameters(served):
    document = request(served.url, "/openapi.json").json
    assert set(document["paths"]) == {"/predict", "/explain", "/model", "/health", "/metrics"}
    predict = document["paths"]["/predict"]["post"]
    assert {parameter["name"] for parameter in predict["parameters"]} == {"output", "multi_scale", "flip"}
    assert {"multipart/form-data", "image/jpeg", "image/png", "image/webp", "image/bmp"} == set(
        predict["requestBody"]["content"]
    )
    assert {"200", "400", "401", "403", "408", "413", "415", "500", "503", "504"} <= set(predict["responses"])


def test_health_model_and_metrics_paths(served, offline):
    assert request(served.url, "/health").json == {"status": "ok"}
    assert [item["name"] for item in request(served.url, "/model").json["classes"]] == list(offline.names)
    before = samples(request(served.url, "/metrics").data)
    request(served.url, "/predict", encode_png(smooth_image()))
    request(served.url, "/predict", b"hello")
    after = samples(request(served.url, "/metrics").data)

    def increase(name):
        return after[name] - before.get(name, 0)

    assert increase('ocrnet_requests_total{path="/predict",status="200"}') == 1
    assert increase('ocrnet_requests_total{path="/predict",status="415"}') == 1
    assert increase('ocrnet_request_seconds_count{path="/predict"}') == 2
    assert increase('ocrnet_request_seconds_bucket{path="/predict",le="+Inf"}') == 2
    assert increase("ocrnet_batch_images_count") == increase("ocrnet_batch_images_sum") == 1
    assert after["ocrnet_waiting"] == after["ocrnet_requests_in_work"] == 0
    assert after["process_resident_memory_bytes"] > 1e7


def samples(text):
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_sigterm_finishes_the_requests_in_progress(tiny, offline):
    image = smooth_image((160, 240))
    with real_server(tiny) as served, ThreadPoolExecutor(3) as pool:
        path = "/predict?multi_scale=true&flip=true"
        responses = [pool.submit(request, served.url, path, encode_png(image)) for _ in range(3)]
        deadline = time.monotonic() + TIMEOUT
        while samples(request(served.url, "/metrics").data)["ocrnet_requests_in_work"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        served.process.send_signal(signal.SIGTERM)
        for response in responses:
            np.testing.assert_array_equal(
                decode_png(response.result().data), offline.predict(image, EVAL_SCALES, flip=True)
            )
        _, stderr = served.process.communicate(timeout=TIMEOUT)
        assert served.process.returncode == 128 + signal.SIGTERM
        assert stderr.startswith("SIGTERM: finishing the requests in progress")
        assert "Traceback" not in stderr
    with pytest.raises(ConnectionRefusedError):
        request(served.url, "/health")
