"""A real S3 server on loopback, spoken to by both SDKs through a proxy."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from servers import SECRETS, Place, Proxy

from ocrnet.cloud import retry
from ocrnet.data.datasets import synthetic


@pytest.fixture(scope="session")
def cityscapes(tmp_path_factory) -> Path:
    """Return a Cityscapes tree: 6 train, 3 val, 1 test scenes of 96x192."""
    root = tmp_path_factory.mktemp("cityscapes") / "data"
    synthetic.write(root, train=6, val=3, test=1, size=(96, 192), seed=0)
    return root


@pytest.fixture(scope="session")
def moto() -> Iterator[tuple[str, int]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def proxy(moto) -> Iterator[Proxy]:
    found = Proxy(moto)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def quick(monkeypatch) -> None:
    """Pause but shortly between two tries, in this process."""
    monkeypatch.setattr(retry, "MAX_PAUSE", 0.05)


@pytest.fixture(params=["obs", "s3"])
def place(request, moto, proxy, monkeypatch) -> Place:
    """A fresh bucket as each SDK sees it: for what depends on the SDK."""
    return fresh(request.param, moto, proxy, monkeypatch)


@pytest.fixture
def bucket(moto, proxy, monkeypatch) -> Place:
    """A fresh bucket as one SDK sees it: for what comes after the SDK."""
    return fresh("s3", moto, proxy, monkeypatch)


def fresh(kind: str, moto: tuple[str, int], proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Make a bucket, and an environment in which this process and those it starts reach it by the proxy."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OBS_ENDPOINT", proxy.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    direct = boto3.client("s3", endpoint_url="http://{}:{}".format(*moto))
    name = f"bucket-{time.monotonic_ns()}-{os.getpid()}"
    direct.create_bucket(Bucket=name)
    return Place(kind, name, direct)
