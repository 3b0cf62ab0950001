"""URLs in a config: valid forms, settings without effect, arguments of ModelArts, and refused credentials."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from ocrnet import config
from ocrnet.cli import eval as eval_command
from ocrnet.cli import main
from ocrnet.cli.flags import load_config, parse
from ocrnet.cloud.factory import open_store
from ocrnet.cloud.store import StoreError
from ocrnet.config import Cloud, loader
from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "config/own.yml")


def load(*argv: str):
    return load_config(parse("train", ["--config", CONFIG, *argv]))


@pytest.mark.parametrize(
    ("text", "parts", "parent"),
    [
        ("obs://b/some/set.tar.gz", ("obs", "b", "some/set.tar.gz"), "obs://b/some"),
        ("s3://b/x/", ("s3", "b", "x"), "s3://b"),
        ("s3://b", ("s3", "b", ""), "s3://b"),
        ("file:///mnt/x", ("file", "", "/mnt/x"), "file:///mnt"),
        ("/mnt/x.tar", ("", "", "/mnt/x.tar"), "/mnt"),
        ("x.tar", ("", "", "x.tar"), "."),
    ],
)
def test_a_url_is_split_into_its_parts(text, parts, parent):
    url = urls.parse("data_url", text)
    assert (url.scheme, url.bucket, url.path) == parts
    assert str(url) == text.rstrip("/")
    assert str(url.parent) == parent
    assert url.is_archive == (".tar" in text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data_url", "http://host/x"], r"data_url is 'http://host/x', but must begin with obs://, s3:// or file://"),
        (["--train_url", "ob://b/x"], r"train_url is 'ob://b/x', but .* did you mean 'obs'\?"),
        (["--data_url", "obs:///x"], r"needs a bucket: obs://BUCKET/FOLDER"),
        (["--data_url", "file://x"], r"a file:// URL needs an absolute path"),
        (["--set", "data.dataset_dir=obs://b/x"], r"data\.dataset_dir must be a local path, .* set data_url"),
        (["--train_url", "out/there", "--save_dir", "out"], r"train_url out/there is inside save_dir out"),
        (["--train_url", "file:///out", "--save_dir", "/out"], r"train_url file:///out is inside save_dir /out"),
        (["--resume_ckpt", "s3://b/x"], r"--resume_ckpt s3://b/x: must be a path on this machine; .* --ckpt_url"),
        (["--save_dir", "s3://b/x"], r"save_dir must be a local path, .* set train_url to the url"),
        (["--set", "cloud.endpoint=https://host"], r"cloud\.endpoint has no effect"),
        (["--data_url", "s3://b/x", "--set", "cloud.endpoint=host"], r"must include its protocol: https://host"),
        (
            ["--data_url", "s3://b/x", "--train_url", "obs://b/x", "--set", "cloud.endpoint=https://host"],
            r"cannot serve both obs:// and s3://; .* OBS_ENDPOINT and AWS_ENDPOINT_URL",
        ),
        (["--set", "data_dir=/cache/data"], r"'data_dir' is not supported; equivalent: cloud\.cache_dir"),
        (
            ["--init_method", "tcp://job:1"],
            r"unknown flag '--init_method'; if ModelArts adds it, set enable_modelarts",
        ),
    ],
)
def test_invalid_urls_and_flags_are_refused(argv, message):
    with pytest.raises(OcrnetError, match=message):
        load(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--data_url", "s3://KEY:hunter2@bucket/x"],
        ["--train_url", "obs://hunter2@bucket/x"],
        ["--data_url", "s3://bucket/x", "--set", "cloud.endpoint=https://KEY:hunter2@host"],
        ["--data_url", "a", "--set", "data_url=s3://KEY:hunter2@bucket/x"],
        ["--data_url", "sftp://KEY:hunter2@bucket/x"],
    ],
)
def test_credentials_in_a_url_are_refused_and_not_printed(argv, tmp_path, capsys):
    assert main.main(["train", "--config", CONFIG, "--save_dir", str(tmp_path / "out"), *argv]) == 2
    output = "".join(capsys.readouterr())
    assert "contains an access key or a password before an '@'; remove it" in output or "given twice" in output
    assert "hunter2" not in output
    assert not (tmp_path / "out").exists()


def test_arguments_added_by_modelarts_are_ignored_and_reported(caplog):
    argv = [
        "--enable_modelarts",
        "True",
        "--init_method=tcp://job:1",
        "--rank",
        "0",
        "--world_size",
        "1",
        "--num_gpus=1",
    ]
    assert load(*argv, "--train_url", "/outputs").enable_modelarts
    assert "enable_modelarts: ignored: --init_method, --rank, --world_size, --num_gpus" in caplog.messages
    assert "no effect without data_url or train_url" not in caplog.text
    load("--enable_modelarts", "True")
    assert "no effect without data_url or train_url" in caplog.text
    with pytest.raises(OcrnetError, match="unknown flag '--rnk'"):
        load("--enable_modelarts", "True", "--rnk", "0")


def test_two_checkpoint_sources_are_refused(tmp_path):
    argv = ["--config", CONFIG, "--checkpoint_path", "x", "--ckpt_url", "y", "--save_dir", str(tmp_path)]
    with pytest.raises(OcrnetError, match="--checkpoint_path x and ckpt_url y both name a checkpoint; keep one"):
        eval_command.main(argv)


@pytest.mark.parametrize(
    ("url", "package", "command"),
    [("s3://b/x", "s3fs", r"pip install 'ocrnet\[s3\]'"), ("obs://b/x", "obs", r"pip install 'ocrnet\[obs\]'")],
)
def test_a_missing_package_is_reported_with_its_install_command(url, package, command, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OcrnetError, match=command):
        open_store(urls.parse("data_url", url), Cloud())


def test_credentials_of_the_environment_are_scrubbed(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcd/efgh")
    monkeypatch.setenv("AccessKeyID", "HWKEY")
    assert str(StoreError("signed abcd/efgh by HWKEY for s3://u:p@b/x")) == "signed *** by *** for s3://***@b/x"


@pytest.mark.parametrize("page", ["README.md", "README_CN.md", "docs/cloud.md"])
def test_configs_and_commands_of_the_pages_are_accepted(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text(encoding="utf-8")
    (block,) = [
        block for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if "_url" in block
    ]
    (tmp_path / "c.yml").write_text(block)
    cfg = loader.build(loader.read_yaml(tmp_path / "c.yml"))
    config.check(cfg)
    assert cfg.enable_modelarts
    assert cfg.train_url.startswith("obs://")
    for line in re.findall(r"^python train\.py (.*--data_url.*)$", text.replace("\\\n", " "), re.MULTILINE):
        load_config(parse("train", shlex.split(line)))


def test_docs_cloud_lists_the_defaults_and_existing_tests():
    text = (ROOT / "docs/cloud.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(cloud\.\w+)` \| (.*?) ?\|", text, re.MULTILINE))
    assert documented.keys() == {name for name, _ in config.schema() if name.startswith("cloud.")}
    for name, item in config.schema():
        if name in documented and item.default != "":
            assert documented[name] == str(item.default), name
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests/cloud").glob("*.py"))
    named = re.findall(r"`((?:test|assert)_\w+)`", text)
    assert len(named) > 8
    assert [name for name in named if f"def {name}(" not in source] == []
