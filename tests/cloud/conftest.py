"""Fixtures: an S3 server on the loopback interface, which both SDKs reach through a proxy."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from servers import SECRETS, Bucket, Proxy

from ocrnet.cloud import retry
from ocrnet.data.datasets import synthetic


@pytest.fixture(scope="session")
def cityscapes(tmp_path_factory) -> Path:
    """Return a dataset folder in Cityscapes layout: 6 train, 3 val and 1 test images of 96x192."""
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
    proxy = Proxy(moto)
    proxy.start()
    yield proxy
    proxy.stop()


@pytest.fixture
def short_pauses(monkeypatch) -> None:
    """Shorten the pauses between retries in this process."""
    monkeypatch.setattr(retry, "MAX_PAUSE", 0.05)


@pytest.fixture(params=["obs", "s3"])
def sdk_bucket(request, moto, proxy, monkeypatch) -> Bucket:
    """Return a new bucket, for each SDK: for tests that depend on the SDK."""
    return create_bucket(request.param, moto, proxy, monkeypatch)


@pytest.fixture
def bucket(moto, proxy, monkeypatch) -> Bucket:
    """Return a new bucket for one SDK: for tests that do not depend on the SDK."""
    return create_bucket("s3", moto, proxy, monkeypatch)


def create_bucket(kind: str, moto: tuple[str, int], proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Create a bucket, and set the environment so that this process and its children reach it through the proxy."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OBS_ENDPOINT", proxy.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    direct = boto3.client("s3", endpoint_url="http://{}:{}".format(*moto))
    name = f"bucket-{time.monotonic_ns()}-{os.getpid()}"
    direct.create_bucket(Bucket=name)
    return Bucket(kind, name, direct)
