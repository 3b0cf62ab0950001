"""Every store behaves alike: what goes up comes down, parts are exact, a missing object is none, keys stay unseen."""

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
from servers import SECRETS, Place, Proxy

from ocrnet.cloud import moxing
from ocrnet.cloud.folder import FolderStore
from ocrnet.cloud.retry import MAX_PAUSE, pause
from ocrnet.cloud.store import StoreError, md5_of
from ocrnet.utils.urls import parse

STAND_IN = '''
"""What ModelArts documents of moxing.file, over a folder: it can only show that the right calls are made."""
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
    """Put a package called moxing on the path, as ModelArts has it."""
    (tmp_path / "packages/moxing").mkdir(parents=True)
    (tmp_path / "packages/moxing/__init__.py").write_text(STAND_IN.format(root=str(tmp_path / "obs")))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    yield
    import sys

    sys.modules.pop("moxing", None)


def test_what_goes_up_comes_down(place, tmp_path):
    behaves(place.store("some/folder"), tmp_path)
    assert {name.split("/")[0] for name in place.names()} == {"some"}


def test_a_folder_is_a_store(tmp_path):
    behaves(FolderStore(tmp_path / "store"), tmp_path)
    assert not list((tmp_path / "store").rglob("*.part"))


def test_moxing_is_a_store_where_it_is_the_real_one(modelarts, tmp_path):
    behaves(moxing.MoxingStore(parse("url", "obs://bucket/folder"), moxing.find()), tmp_path)


def behaves(store, tmp_path):
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
    with pytest.raises(StoreError) as told:
        store.read("deep/x", 0, 1)
    assert told.value.final


def test_a_listing_has_many_pages(place):
    for i in range(7):
        place.put(f"folder/{i}", b"")
    place.put("folder/", b"")  # what a browser makes to stand for a folder
    store = place.store("folder")
    store.page = 3
    assert [item.name for item in store.list()] == [f"{i}" for i in range(7)]


def test_a_stalled_request_is_given_up(place, proxy):
    proxy.fault = lambda method, path: "stall"
    begun = time.monotonic()
    with pytest.raises(StoreError) as told:
        place.store("folder", timeout=1).list()
    assert time.monotonic() - begun < 20
    assert not told.value.final


def test_a_refused_request_is_not_tried_again(place):
    place.bucket = "there-is-no-such-bucket"
    with pytest.raises(StoreError, match=r"does not exist|NoSuchBucket") as told:
        place.store("folder").list()
    assert told.value.final


def test_keys_are_scrubbed_from_messages(bucket):
    error = StoreError(" ".join(SECRETS.values()) + " s3://user:word@bucket/x")
    assert str(error) == "*** *** *** *** s3://***@bucket/x"


def certificate(folder, name: str) -> Path:
    """Write a key and a certificate that it signed itself, for an address."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder(who, who, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(name))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "server.pem"
    path.write_bytes(private + made.public_bytes(pem))
    return path


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_obs_over_https_checks_whose_certificate_it_is(moto, tmp_path, monkeypatch, address, known):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    path = certificate(tmp_path, address)
    if known:
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    proxy = Proxy(moto)
    proxy.start(context)
    try:
        place = Place("obs", "there-is-no-such-bucket", None)
        with pytest.raises(StoreError) as told:
            place.store("x", endpoint=proxy.url.replace("http:", "https:")).list()
    finally:
        proxy.stop()
    trusted = known and address == "127.0.0.1"
    assert ("NoSuchBucket" in str(told.value)) == trusted
    assert ("CERTIFICATE_VERIFY_FAILED" in str(told.value)) == (not trusted)


def test_the_moxing_of_pypi_is_told_apart(tmp_path, monkeypatch):
    assert moxing.find() is None
    (tmp_path / "moxing").mkdir()
    (tmp_path / "moxing/__init__.py").write_text("__version__ = '0.0.3'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert moxing.find() is None
    import sys

    sys.modules.pop("moxing")


def test_the_pause_between_retries_is_bounded_after_any_number_of_failures():
    assert all(0 < pause(tries) <= MAX_PAUSE for tries in (1, 2, 100, 10_000))
