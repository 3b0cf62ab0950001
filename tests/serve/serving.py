"""Servers for tests: `ocrnet serve` with a tiny network, and the server code in a thread with a fake network."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import cv2
import numpy as np

from ocrnet import architecture, config
from ocrnet.architecture import Arch
from ocrnet.config import Config
from ocrnet.serve import server
from ocrnet.serve.app import Service
from ocrnet.serve.metrics import Metrics
from ocrnet.serve.settings import Settings
from ocrnet.serve.worker import Job, Prediction, Worker
from ocrnet.utils.signals import StopRequest
from ocrnet.weights import checkpoint

ARCH = Arch(width=4, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)
TIMEOUT = 120  # in seconds, of everything that a test waits for
TOKEN = "a-token-of-some-length"


def write_checkpoint(folder: Path) -> Path:
    """Write a checkpoint of a tiny network whose weights predict several classes; return its path."""
    path = folder / "tiny.safetensors"
    rng = np.random.default_rng(0)
    weights = architecture.init(ARCH, 3)
    weights["cls_head.weight"] = rng.normal(size=weights["cls_head.weight"].shape).astype(np.float32)
    weights["aux_head.3.weight"] = rng.normal(size=weights["aux_head.3.weight"].shape).astype(np.float32)
    checkpoint.save(path, weights, {"config": config.as_dict(Config()), "step": 0})
    return path


@contextlib.contextmanager
def real_server(path: Path, *flags: str) -> Iterator[SimpleNamespace]:
    """Run `ocrnet serve` on a free port; yield its process, its url and the output up to "serving at"."""
    command = [sys.executable, "-m", "ocrnet", "serve", "--checkpoint_path", str(path), "--port", "0", *flags]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith("serving at "):
                break
        else:
            raise AssertionError(output + process.stderr.read())
        yield SimpleNamespace(process=process, url=line.split()[-1], output=output)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT)


class FakeNetwork:
    """A network that predicts red values as labels; it calls ``before`` first, which may wait or raise."""

    explains = averages = True

    def __init__(self, before: Callable[[Sequence[Job]], None] = lambda jobs: None) -> None:
        names, palette = tuple(f"class {i}" for i in range(256)), tuple((i, i, i) for i in range(256))
        self.model = SimpleNamespace(arch=ARCH, names=names, palette=palette)
        self.before, self.batches = before, []

    def __call__(self, jobs: Sequence[Job]) -> list[Prediction]:
        self.batches.append(len(jobs))
        self.before(jobs)
        return [Prediction(job.image[..., 0].copy(), batch=len(jobs)) for job in jobs]


@contextlib.contextmanager
def fake_server(network: FakeNetwork, **options: object) -> Iterator[SimpleNamespace]:
    """Serve a fake network in a thread; yield url, service, logged errors, stop request and thread."""
    settings = Settings(**({"port": 0} | options))
    logged: list[BaseException] = []
    metrics = Metrics()
    worker = Worker(
        network, max_batch=settings.max_batch, batch_wait=settings.batch_wait, max_requests=settings.max_requests,
        log=logged.append, on_batch=metrics.batch,
    )  # fmt: skip
    service, stop, ready = Service(network, worker, metrics, settings), StopRequest(), threading.Event()
    with server.bind(settings.host, settings.port) as sock:
        url = server.url(sock)
        thread = threading.Thread(target=server.run, args=(service, sock, stop, ready.set))
        worker.start()
        thread.start()
        assert ready.wait(TIMEOUT)
        try:
            yield SimpleNamespace(url=url, service=service, logged=logged, stop=stop, thread=thread)
        finally:
            stop.number = signal.SIGTERM
            thread.join(TIMEOUT)
            worker.close()
            service.pool.shutdown()
            assert not thread.is_alive()


def request(
    url: str, path: str, body: object = None, headers: dict | None = None, method: str | None = None
) -> SimpleNamespace:
    """Send one request on a new connection; return its status, headers, data, and parsed JSON or None."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return SimpleNamespace(
        status=response.status, headers=response.headers, data=data, json=json.loads(data) if is_json and data else None
    )


def form(name: str, data: bytes, filename: str | None = "photo.png") -> tuple[bytes, dict[str, str]]:
    """Return the body of a multipart form with one field, and its headers."""
    disposition = f'name="{name}"' + (f'; filename="{filename}"' if filename else "")
    head = f"--limit\r\nContent-Disposition: form-data; {disposition}\r\nContent-Type: image/png\r\n\r\n"
    return head.encode() + data + b"\r\n--limit--\r\n", {"Content-Type": "multipart/form-data; boundary=limit"}


def red_png(red: int, size: tuple[int, int] = (4, 6)) -> bytes:
    """Return a PNG with the red value ``red`` everywhere, which a `FakeNetwork` predicts as the label."""
    image = np.zeros((*size, 3), np.uint8)
    image[..., 2] = red  # BGR
    return cv2.imencode(".png", image)[1].tobytes()


def first_label(response: SimpleNamespace) -> int:
    """Return the first label of a response."""
    return int(cv2.imdecode(np.frombuffer(response.data, np.uint8), cv2.IMREAD_UNCHANGED)[0, 0])


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until ``condition()`` is true."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Gate:
    """Blocks the network until ``opened`` is set; ``reached`` is set when the network is called."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()

    def __call__(self, jobs: Sequence[Job]) -> None:
        self.reached.set()
        assert self.opened.wait(TIMEOUT)
