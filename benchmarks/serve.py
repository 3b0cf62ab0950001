"""Measure `ocrnet serve` on loopback under load: throughput, latency, memory, and equality with offline predictions.

python benchmarks/serve.py --checkpoint quickstart/run [--out FILE] [--requests 2000]
python benchmarks/serve.py --quick      (a few requests, to test the script)

The images are street scenes of 128x256, served with and without batches. Clients and server share the cores. A client
sends its next image when it has received the response to the previous one. Without --checkpoint the network has fresh
weights, which may predict a single class.
"""

import argparse
import contextlib
import http.client
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from common import write_report

import ocrnet
from ocrnet import architecture, config
from ocrnet.architecture import Arch
from ocrnet.config import Config
from ocrnet.export.compare import draw
from ocrnet.tracking.run_dir import core_versions, git_commit
from ocrnet.weights import checkpoint

ARCH = Arch(width=18, blocks=1, modules=(1, 1, 1), num_classes=19, channels=64, key_channels=32)
SIZE = (128, 256)
IMAGES = 8
CLIENTS = (1, 4, 16, 64)


def write_network(path: Path) -> None:
    """Write fresh weights of the small network of the quick start."""
    checkpoint.save(path, architecture.init(ARCH, 0), {"config": config.as_dict(Config()), "step": 0})


@contextlib.contextmanager
def server(path: Path, batch: int) -> Iterator[str]:
    """Run the command on a free port; yield host:port."""
    command = [sys.executable, "-m", "ocrnet", "serve", "--checkpoint_path", str(path), "--port", "0",
               "--max_batch", str(batch), "--max_requests", "128"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("serving at "):
                yield line.split("/")[2]
                break
    finally:
        process.terminate()
        process.communicate(timeout=120)


class Load:
    """Clients that send images one after another, until the server has sent a number of responses."""

    def __init__(self, address: str, encoded_images: list[bytes], expected: list[np.ndarray]) -> None:
        self.address, self.encoded_images, self.expected = address, encoded_images, expected
        self.seconds: list[float] = []
        self.unequal = self.refused = self.pixels = 0
        self.memory: list[tuple[int, int]] = []  # (number of responses, bytes of the server)
        self._lock, self._next = threading.Lock(), 0

    def run(self, clients: int, requests: int) -> float:
        """Send the requests with a number of clients; return the total seconds."""
        threads = [threading.Thread(target=self._client, args=(requests,)) for _ in range(clients)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started

    def _client(self, requests: int) -> None:
        connection = http.client.HTTPConnection(self.address, timeout=120)
        while True:
            with self._lock:
                number = self._next
                self._next += 1
            if number >= requests:
                break
            started = time.perf_counter()
            connection.request("POST", "/predict", self.encoded_images[number % IMAGES])
            response = connection.getresponse()
            data = response.read()
            elapsed = time.perf_counter() - started
            labels = (
                cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if response.status == 200 else None
            )
            with self._lock:
                self.seconds.append(elapsed)
                if labels is None:
                    self.refused += 1
                elif not np.array_equal(labels, self.expected[number % IMAGES]):
                    self.unequal += 1
                    self.pixels += int((labels != self.expected[number % IMAGES]).sum())
                if len(self.seconds) % 200 == 0:
                    self.memory.append((len(self.seconds), memory(self.address)))
        connection.close()


def memory(address: str) -> int:
    """Return the resident memory of the server in bytes, from its metrics."""
    connection = http.client.HTTPConnection(address, timeout=120)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return int(float(next(line.split()[1] for line in lines if line.startswith("process_resident_memory_bytes "))))


def measure(path: Path, batch: int, requests: int, clients: tuple[int, ...]) -> dict:
    """Measure one server with each number of clients, which share ``requests`` equally; return the measurements."""
    model = ocrnet.load(path, engine="torch", device_target="CPU")
    images = [draw(SIZE, number) for number in range(IMAGES)]
    encoded_images = [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in images]
    expected = [model.predict(image) for image in images]
    found: dict = {"classes_an_image": [len(np.unique(labels)) for labels in expected]}
    with server(path, batch) as address:
        Load(address, encoded_images, expected).run(4, 16)  # the first requests are slow
        memories, total = [[0, memory(address)]], 0
        for number in clients:
            load = Load(address, encoded_images, expected)
            share = requests // len(clients)
            elapsed = load.run(number, share)
            ordered = sorted(load.seconds)
            found[str(number)] = {
                "requests": len(ordered),
                "per_second": round(len(ordered) / elapsed, 2),
                "p50_ms": round(1000 * statistics.median(ordered), 1),
                "p99_ms": round(1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 1),
                "refused": load.refused,
                "answers_unlike_offline": load.unequal,
                "pixels_unlike_offline": load.pixels,
            }
            memories += [[total + count, held] for count, held in load.memory]
            total += len(ordered)
            row = found[str(number)]
            print(f"batch {batch}, {number} clients: {row}", flush=True)
        found["memory_bytes_after_requests"] = memories
        print(f"memory: {[(count, held // 2**20) for count, held in memories]} MiB", flush=True)
    return found


def main() -> None:
    """Measure the server without and with batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    clients = (1, 2) if args.quick else CLIENTS
    report: dict = {
        "checkpoint": args.checkpoint.name if args.checkpoint else "fresh weights",
        "size": SIZE,
        "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
        "versions": core_versions(),
        "commit": git_commit(),
        "load_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint or Path(folder) / "small.safetensors"
        if not args.checkpoint:
            write_network(path)
        for batch in (1,) if args.quick else (1, 8):
            report[f"max_batch {batch}"] = measure(path, batch, 8 if args.quick else args.requests, clients)
    report["load_after"] = os.getloadavg()[0]
    write_report(report, args.out)


if __name__ == "__main__":
    main()
