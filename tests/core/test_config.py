"""The config: every shipped YAML loads, and every error in one names the key, value, source and remedy."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from ocrnet import config
from ocrnet.cli.flags import load_config, parse
from ocrnet.config import Config, loader
from ocrnet.config.loader import SourcedValue
from ocrnet.utils.errors import OcrnetError

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "config").rglob("*.yml"))


def load(tmp_path: Path, text: str, *argv: str) -> Config:
    path = tmp_path / "c.yml"
    path.write_text(text)
    return load_config(parse("train", ["--config", str(path), *argv]))


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_every_shipped_yaml_loads(path):
    cfg = load_config(parse("train", ["--config", str(path)]))
    config.check(cfg)


def test_the_original_yamls_are_shipped():
    names = {p.relative_to(ROOT / "config").as_posix() for p in YAMLS}
    expected = {f"ocrnet/config_ocrnet_hrw{w}_{k}k.yml" for w in (18, 32, 48) for k in (8, 16)}
    assert expected | {"cityscapes.yml"} <= names
    assert 'dataset_dir: "your cityscapes"' in (ROOT / "config/cityscapes.yml").read_text()


def test_the_original_recipe_is_unchanged():
    cfg = load_config(parse("train", ["--config", str(ROOT / "config/ocrnet/config_ocrnet_hrw48_16k.yml")]))
    assert (cfg.total_step, cfg.warmup_step, cfg.lr_init, cfg.end_lr) == (160_000, 500, 0.01, 1e-6)
    assert (cfg.backbone.width, cfg.batch_size, cfg.data.crop_size) == (48, 2, (512, 1024))
    assert (cfg.optimizer.weight_decay, cfg.optimizer.momentum, cfg.schedule) == (4e-4, 0.9, "linear")
    assert len(cfg.data.class_weights) == 19
    assert (cfg.loss.aux, cfg.loss.ocr) == (0.4, 1.0)


def test_resolved_config_reads_back_equal(tmp_path):
    cfg = load(tmp_path, "batch_size: 3\ndata: {crop_size: [64, 96], class_weights: [1, 2.5]}\nnum_classes: 2\n")
    again = load(tmp_path, yaml.safe_dump(config.as_dict(cfg)))
    assert again == cfg


def test_later_base_wins_and_the_file_wins_over_bases(tmp_path):
    (tmp_path / "a.yml").write_text("seed: 1\nbatch_size: 1\nlog_interval: 1\n")
    (tmp_path / "b.yml").write_text("seed: 2\nbatch_size: 2\n")
    cfg = load(tmp_path, "__BASE__: [a.yml, b.yml]\nseed: 3\n")
    assert (cfg.seed, cfg.batch_size, cfg.log_interval) == (3, 2, 1)


def test_circular_bases_are_refused(tmp_path):
    (tmp_path / "a.yml").write_text("__BASE__: c.yml\n")
    with pytest.raises(OcrnetError, match=r"(a|c)\.yml: circular __BASE__"):
        load(tmp_path, "__BASE__: a.yml\n")


BAD = [
    ("bach_size: 2", r"c\.yml: unknown key 'bach_size'; did you mean 'batch_size'\?"),
    ("data: {crop_sise: [1, 2]}", r"unknown key 'data\.crop_sise'; did you mean 'data\.crop_size'"),
    ("crop_size: [64, 64]", r"unknown key 'crop_size'; did you mean 'data\.crop_size'"),
    ("img_ratios: [1.0]", r"'img_ratios' is not supported; equivalent: eval\.scales"),
    ("data: {map_label: [1.0]}", r"'data\.map_label' is not supported; equivalent: data\.class_weights"),
    ("batch_size: two", r"c\.yml: batch_size is 'two', but must be a whole number"),
    ("batch_size: 2.0", r"batch_size is 2\.0, but must be a whole number"),
    ("batch_size: 0", r"batch_size is 0, but must be at least 1"),
    ("mix: 1", r"mix is 1, but must be True or False"),
    ("lr_init: .nan", r"lr_init is nan"),
    ("data: {crop_size: [64]}", r"data\.crop_size is \[64\], but must have 2 values"),
    ("data: {crop_size: 64}", r"data\.crop_size is 64, but must be a list"),
    ("schedule: cosine", r"schedule is 'cosine', but must be one of linear, poly"),
    ("data: {name: cityscape}", r"must be one of cityscapes, camvid, folder; did you mean 'cityscapes'"),
    ("data: cityscapes", r"'data' is a group of keys"),
    ("seed: 1\nseed: 2", r"'seed' is given twice"),
    ("[1, 2]", r"must hold 'key: value' lines"),
    ("a: [", r"not valid YAML"),
    ("{[a]: 1}", r"c\.yml, line 1: a key must be a word"),
    ("warmup_step: 20\ntotal_step: 10", r"warmup_step 20 is more than total_step 10"),
    ("num_classes: 3\ndata: {class_weights: [1.0, 2.0]}", r"class_weights has 2 values but num_classes is 3"),
    ("loss: {aux: 0.0, ocr: 0.0}", r"loss\.aux and loss\.ocr are both 0"),
    ("backbone: {pretrained: True}", r"backbone_ckpt is empty; download"),
    ("data: {scale_range: [2.0, 0.5]}", r"scale_range"),
    ("eval: {scales: []}", r"eval\.scales is empty"),
    ("batch_size: 1\ndata: {crop_size: [32, 32]}", r"crop_size \[32, 32\] with batch_size 1"),
    ("seed: " + "[" * 5000, r"not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text[:30].replace("\n", " ") for text, _ in BAD])
def test_an_invalid_config_is_refused_with_the_key_and_the_reason(tmp_path, text, message):
    with pytest.raises(OcrnetError, match=message):
        load(tmp_path, text)


def test_merge_keys_work_and_do_not_count_as_given_twice(tmp_path):
    assert load(tmp_path, "<<: {seed: 1, batch_size: 3}\nseed: 2\n") == Config(seed=2, batch_size=3)


def test_the_number_of_classes_comes_from_the_dataset_and_must_not_contradict_it():
    assert config.with_classes(Config(), 11, "camvid").num_classes == 11
    with pytest.raises(OcrnetError, match="num_classes is 19 but camvid has 11 classes"):
        config.with_classes(Config(num_classes=19), 11, "camvid")
    weighted = Config(data=config.Data(class_weights=(1.0,) * 19))
    with pytest.raises(OcrnetError, match="class_weights has 19 values but num_classes is 11"):
        config.with_classes(weighted, 11, "camvid")


def test_a_missing_config_suggests_a_similar_file(tmp_path):
    (tmp_path / "camvid.yml").write_text("seed: 1")
    with pytest.raises(OcrnetError, match=r"camvidd\.yml' does not exist; did you mean '.*camvid\.yml'"):
        loader.read_yaml(tmp_path / "camvidd.yml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e-1", -0.25),
        (".5", 0.5),
        ("3", 3),
        ("True", True),
        ("[1, 2]", [1, 2]),
        ("abc", "abc"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_command_line_values_are_yaml_with_scientific_notation(text, value):
    parsed = loader.parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_every_key_has_help_and_a_valid_default():
    for name, item in config.schema():
        assert item.metadata["help"], name
        default = item.default
        assert (
            loader.convert(name, SourcedValue(list(default) if isinstance(default, tuple) else default, "default"))
            == default
        )


def test_the_config_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 2


def test_the_documented_table_matches_the_schema():
    """After a change of the schema, replace the table in docs/config.md by the result of `config.table()`."""
    assert (ROOT / "docs/config.md").read_text().endswith("\n" + config.table() + "\n")


def test_a_tilde_means_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["--config", str(ROOT / "config/own.yml"), "--save_dir", "~/run", "--set", "data.dataset_dir=~/images"]
    cfg = load_config(parse("train", argv))
    assert (cfg.save_dir, cfg.data.dataset_dir) == (str(tmp_path / "run"), str(tmp_path / "images"))
    assert parse("predict", ["~/a.jpg", "--output", "~/b"]).options == {
        "source": str(tmp_path / "a.jpg"),
        "output": str(tmp_path / "b"),
    }


@pytest.mark.parametrize(("old", "new"), loader.OLD_KEYS.items())
def test_the_old_name_of_a_key_is_accepted_with_a_warning(old, new, tmp_path, caplog):
    value = {"expect": 0.5, "sinks": ["mlflow"], "save_ckpt": True, "cloud.drain": 7}[old]
    group, _, name = old.rpartition(".")
    tree = {group: {name: value}} if group else {name: value}
    (tmp_path / "run.yml").write_text(yaml.safe_dump(tree))
    cfg = load_config(parse("train", ["--config", str(tmp_path / "run.yml")]))
    loaded = config.value(cfg, new)
    assert loaded == (tuple(value) if isinstance(value, list) else value)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert all(text in warning.getMessage() for text in (str(tmp_path / "run.yml"), f"'{old}'", f"'{new}'"))
    caplog.clear()
    (tmp_path / "new.yml").write_text("{}")
    cfg = load_config(parse("train", ["--config", str(tmp_path / "new.yml"), "--set", f"{old}={value}"]))
    assert config.value(cfg, new) == loaded
    assert f"'{old}'" in caplog.text


def test_the_old_and_the_current_name_of_a_key_together_are_refused(tmp_path):
    (tmp_path / "run.yml").write_text("expect: 0.5\nmin_miou: 0.6\n")
    with pytest.raises(OcrnetError, match="min_miou"):
        loader.read_yaml(tmp_path / "run.yml")
    (tmp_path / "run.yml").write_text("{}")
    with pytest.raises(OcrnetError, match="min_miou"):
        parse("train", ["--config", "run.yml", "--set", "expect=0.5", "min_miou=0.6"])


def test_a_recorded_config_gets_the_current_names():
    assert loader.with_current_keys({"expect": 0.5, "cloud.drain": 7, "seed": 1}) == {
        "min_miou": 0.5, "cloud.push_timeout": 7, "seed": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("misspelled", "current"),
    [
        ("drain", "cloud.push_timeout"),
        ("expects", "min_miou"),
        ("sink", "trackers"),
        ("cloud.drian", "cloud.push_timeout"),
    ],
)
def test_a_misspelled_old_key_leads_to_the_current_name(misspelled, current):
    with pytest.raises(OcrnetError, match=current):
        parse("train", ["--config", "run.yml", "--set", f"{misspelled}=1"])


def test_an_old_key_given_as_a_flag_leads_to_the_current_name():
    with pytest.raises(OcrnetError, match="--set min_miou=VALUE"):
        parse("train", ["--expect", "0.1"])
