"""Servers for tests: the real command on a tiny network, and the real HTTP side before a network that is none."""

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
PATIENCE = 120  # seconds
TOKEN = "a-token-of-some-length"


def write_tiny(folder: Path) -> Path:
    """Write a checkpoint of a tiny network with weights that answer several classes; return its path."""
    path = folder / "tiny.safetensors"
    rng = np.random.default_rng(0)
    weights = architecture.init(ARCH, 3)
    weights["cls_head.weight"] = rng.normal(size=weights["cls_head.weight"].shape).astype(np.float32)
    weights["aux_head.3.weight"] = rng.normal(size=weights["aux_head.3.weight"].shape).astype(np.float32)
    checkpoint.save(path, weights, {"config": config.as_dict(Config()), "step": 0})
    return path


@contextlib.contextmanager
def real(path: Path, *flags: str) -> Iterator[SimpleNamespace]:
    """Run `ocrnet serve` on a free port; give its process, its address and what it said."""
    command = [sys.executable, "-m", "ocrnet", "serve", "--checkpoint_path", str(path), "--port", "0", *flags]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("serving at "):
                break
        else:
            raise AssertionError(said + process.stderr.read())
        yield SimpleNamespace(process=process, url=line.split()[-1], said=said)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)


class Fake:
    """A network that answers an image's red values; ``before`` is called first, and may wait or raise."""

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
def faked(network: Fake, **chosen: object) -> Iterator[SimpleNamespace]:
    """Serve a fake network in a thread; give its address, its service and what was logged."""
    settings = Settings(**({"port": 0} | chosen))
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
        assert ready.wait(PATIENCE)
        try:
            yield SimpleNamespace(url=url, service=service, logged=logged, stop=stop, thread=thread)
        finally:
            stop.number = signal.SIGTERM
            thread.join(PATIENCE)
            worker.close()
            service.pool.shutdown()
            assert not thread.is_alive()


def ask(
    url: str, path: str, body: object = None, headers: dict | None = None, method: str | None = None
) -> SimpleNamespace:
    """Send one request on a connection of its own; return status, headers, data, and the JSON in it."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    return SimpleNamespace(
        status=answer.status, headers=answer.headers, data=data, json=json.loads(data) if is_json and data else None
    )


def form(name: str, data: bytes, filename: str | None = "photo.png") -> tuple[bytes, dict[str, str]]:
    """Return a form with one field, and its headers."""
    said = f'name="{name}"' + (f'; filename="{filename}"' if filename else "")
    head = f"--limit\r\nContent-Disposition: form-data; {said}\r\nContent-Type: image/png\r\n\r\n"
    return head.encode() + data + b"\r\n--limit--\r\n", {"Content-Type": "multipart/form-data; boundary=limit"}


def picture(red: int, size: tuple[int, int] = (4, 6)) -> bytes:
    """Return a PNG whose red values a `Fake` network answers."""
    image = np.zeros((*size, 3), np.uint8)
    image[..., 2] = red  # BGR
    return cv2.imencode(".png", image)[1].tobytes()


def red(answer: SimpleNamespace) -> int:
    """Return the first label of an answer."""
    return int(cv2.imdecode(np.frombuffer(answer.data, np.uint8), cv2.IMREAD_UNCHANGED)[0, 0])


def until(condition: Callable[[], object]) -> None:
    """Wait until something is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Gate:
    """Holds the network back until it is opened."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()

    def __call__(self, jobs: Sequence[Job]) -> None:
        self.reached.set()
        assert self.opened.wait(PATIENCE)
