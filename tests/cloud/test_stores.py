"""All stores follow one interface: exact content and ranges, None for a missing object, no credentials in messages."""

import datetime
import ipaddress
import ssl
import time
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from servers import SECRETS, Bucket, Proxy

from ocrnet.cloud import moxing
from ocrnet.cloud.folder import FolderStore
from ocrnet.cloud.retry import MAX_PAUSE, pause
from ocrnet.cloud.store import StoreError, md5_of
from ocrnet.utils.urls import parse

FAKE_MOXING = '''
"""The documented functions of moxing.file, over a folder: the tests only show that they are called as documented."""
import os, shutil, types
ROOT = {root!r}
def at(url): return os.path.join(ROOT, url.removeprefix("obs://"))
def File(url, mode):
    if "w" in mode: os.makedirs(os.path.dirname(at(url)), exist_ok=True)
    return open(at(url), mode)
def copy(source, url):
    os.makedirs(os.path.dirname(at(url)), exist_ok=True)
    shutil.copy(source, at(url))
def list_directory(url, recursive=False):
    found = [os.path.join(top, name) for top, dirs, files in os.walk(at(url)) for name in dirs + files]
    return [os.path.relpath(path, at(url)) for path in found]
file = types.SimpleNamespace(
    File=File, copy=copy, list_directory=list_directory, copy_parallel=copy, exists=lambda url: os.path.exists(at(url)),
    get_size=lambda url: os.path.getsize(at(url)), remove=lambda url: os.remove(at(url)),
)
'''


@pytest.fixture
def modelarts(tmp_path, monkeypatch):
    """Put a package named moxing on the path, as on ModelArts."""
    (tmp_path / "packages/moxing").mkdir(parents=True)
    (tmp_path / "packages/moxing/__init__.py").write_text(FAKE_MOXING.format(root=str(tmp_path / "obs")))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    yield
    import sys

    sys.modules.pop("moxing", None)


def test_sdk_stores_follow_the_interface(sdk_bucket, tmp_path):
    check_store(sdk_bucket.store("some/folder"), tmp_path)
    assert {name.split("/")[0] for name in sdk_bucket.names()} == {"some"}


def test_folder_store_follows_the_interface(tmp_path):
    check_store(FolderStore(tmp_path / "store"), tmp_path)
    assert not list((tmp_path / "store").rglob("*.part"))


def test_moxing_store_follows_the_interface(modelarts, tmp_path):
    check_store(moxing.MoxingStore(parse("url", "obs://bucket/folder"), moxing.find()), tmp_path)


def check_store(store, tmp_path):
    content = np.random.default_rng(0).bytes(300_000)
    path = tmp_path / "a file"
    path.write_bytes(content)
    assert store.list() == []
    assert store.stat("deep/er/a b.bin") is None
    store.upload(path, "deep/er/a b.bin")
    store.upload(b"", "empty")
    store.upload(b"short", "deep/x")
    assert [(item.name, item.size) for item in store.list()] == [
        ("deep/er/a b.bin", len(content)), ("deep/x", 5), ("empty", 0)
    ]  # fmt: skip
    assert [item.name for item in store.list("deep/er")] == ["deep/er/a b.bin"]
    item = store.stat("deep/er/a b.bin")
    assert item == store.list("deep/er")[0]
    assert item.md5 in ("", md5_of(path).hex())
    assert store.read("deep/er/a b.bin", 1000, 70_000) == content[1000:71_000]
    with pytest.raises(StoreError, match="expected 6 bytes, got 5"):
        store.read("deep/x", 0, 6)
    store.upload(b"new", "deep/x")
    assert store.read("deep/x", 0, 3) == b"new"
    store.delete("deep/x")
    store.delete("deep/x")
    assert store.stat("deep/x") is None
    with pytest.raises(StoreError) as raised:
        store.read("deep/x", 0, 1)
    assert raised.value.final


def test_a_listing_of_several_pages_is_complete(sdk_bucket):
    for i in range(7):
        sdk_bucket.put(f"folder/{i}", b"")
    sdk_bucket.put("folder/", b"")  # the object that a web console creates for a folder
    store = sdk_bucket.store("folder")
    store.page = 3
    assert [item.name for item in store.list()] == [f"{i}" for i in range(7)]


def test_a_stalled_request_times_out(sdk_bucket, proxy):
    proxy.failure = lambda method, path: "stall"
    started = time.monotonic()
    with pytest.raises(StoreError) as raised:
        sdk_bucket.store("folder", timeout=1).list()
    assert time.monotonic() - started < 20
    assert not raised.value.final


def test_a_refused_request_is_not_retried(sdk_bucket):
    sdk_bucket.name = "there-is-no-such-bucket"
    with pytest.raises(StoreError, match=r"does not exist|NoSuchBucket") as raised:
        sdk_bucket.store("folder").list()
    assert raised.value.final


def test_keys_are_scrubbed_from_messages(bucket):
    error = StoreError(" ".join(SECRETS.values()) + " s3://user:word@bucket/x")
    assert str(error) == "*** *** *** *** s3://***@bucket/x"


def write_certificate(folder, name: str) -> Path:
    """Write a key and a self-signed certificate for an IP address; return the path of the file that holds both."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(name))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "server.pem"
    path.write_bytes(private + certificate.public_bytes(pem))
    return path


@pytest.mark.parametrize("in_trust_store", [True, False])
@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_obs_over_https_verifies_the_certificate(moto, tmp_path, monkeypatch, address, in_trust_store):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    path = write_certificate(tmp_path, address)
    if in_trust_store:
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    proxy = Proxy(moto)
    proxy.start(context)
    try:
        sdk_bucket = Bucket("obs", "there-is-no-such-bucket", None)
        with pytest.raises(StoreError) as raised:
            sdk_bucket.store("x", endpoint=proxy.url.replace("http:", "https:")).list()
    finally:
        proxy.stop()
    accepted = in_trust_store and address == "127.0.0.1"
    assert ("NoSuchBucket" in str(raised.value)) == accepted
    assert ("CERTIFICATE_VERIFY_FAILED" in str(raised.value)) == (not accepted)


def test_the_moxing_package_of_pypi_is_not_used(tmp_path, monkeypatch):
    assert moxing.find() is None
    (tmp_path / "moxing").mkdir()
    (tmp_path / "moxing/__init__.py").write_text("__version__ = '0.0.3'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert moxing.find() is None
    import sys

    sys.modules.pop("moxing")


def test_the_pause_between_retries_is_bounded_after_any_number_of_failures():
    assert all(0 < pause(tries) <= MAX_PAUSE for tries in (1, 2, 100, 10_000))
