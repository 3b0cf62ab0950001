"""The public flags: their table is frozen, they override the YAML, and unknown or repeated ones are errors."""

import re
from pathlib import Path

import pytest

from ocrnet.cli import flags
from ocrnet.cli.flags import load_config, parse
from ocrnet.cli.main import COMMANDS
from ocrnet.utils.errors import OcrnetError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "config/ocrnet/config_ocrnet_hrw32_16k.yml")

# A change of this table changes the command line of users: update README.md, README_CN.md and CHANGELOG.md with it.
FROZEN = {
    ("config", "train eval check submit", None, None),
    ("config", "export", None, None),
    ("device_target", "train eval predict submit report serve", "device_target", None),
    ("engine", "train eval predict submit report serve", "engine", None),
    ("mix", "train eval predict submit report serve", "mix", None),
    ("amp_level", "train eval", "amp_level", None),
    ("ms_mode", "train eval", "ms_mode", None),
    ("save_dir", "train eval", "save_dir", None),
    ("checkpoint_path", "eval predict submit serve", None, "ckpt_path"),
    ("checkpoint_path", "export", None, "ckpt_path"),
    ("checkpoint_path", "report", None, "ckpt_path"),
    ("input", "convert", None, None),
    ("output", "predict", None, None),
    ("output", "submit", None, None),
    ("output", "export", None, None),
    ("output", "convert", None, None),
    ("output", "report", None, None),
    ("save", "predict", None, None),
    ("offline", "predict", None, None),
    ("split", "submit", None, None),
    ("verify", "submit", None, None),
    ("to", "convert", None, None),
    ("allow_partial", "convert", None, None),
    ("size", "export", None, None),
    ("format", "export", None, None),
    ("dynamic", "export", None, None),
    ("input", "export", None, None),
    ("outputs", "export", None, None),
    ("precision", "export", None, None),
    ("calibration", "export", None, None),
    ("images", "export", None, None),
    ("images", "report", None, None),
    ("curves_only", "report", None, None),
    ("watch", "report", None, None),
    ("num_images", "export", None, None),
    ("tolerance", "export", None, None),
    ("multi_scale", "eval predict submit", "eval.scales", None),
    ("flip", "eval predict submit", "eval.flip", None),
    ("visualize", "eval", None, None),
    ("resume_ckpt", "train", None, None),
    ("batch_size", "train", "batch_size", None),
    ("seed", "train", "seed", None),
    ("log_interval", "train", "log_interval", None),
    ("run_eval", "train", "run_eval", None),
    ("lr_init", "train", "lr_init", None),
    ("enable_modelarts", "train eval", "enable_modelarts", None),
    ("data_url", "train eval", "data_url", None),
    ("train_url", "train eval", "train_url", None),
    ("ckpt_url", "train", "ckpt_url", None),
    ("ckpt_url", "eval", "ckpt_url", None),
    ("host", "serve", None, None),
    ("port", "serve", None, None),
    ("max_batch", "serve", None, None),
    ("batch_wait", "serve", None, None),
    ("max_requests", "serve", None, None),
    ("timeout", "serve", None, None),
    ("max_megabytes", "serve", None, None),
    ("max_megapixels", "serve", None, None),
    ("token_file", "serve", None, None),
    ("dry_run", "train", None, None),
}


def train(*argv: str):
    return load_config(parse("train", ["--config", CONFIG, *argv]))


def test_flag_table_is_frozen():
    assert {(f.name, " ".join(f.commands), f.key, f.alias) for f in flags.FLAGS} == FROZEN


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("doctor", "completion")])
def test_help_describes_each_flag_and_the_form_of_its_value(command, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[command](["--help"])
    entries = re.findall(r"^  --(\w+)(.*(?:\n {3,}.*)*)", capsys.readouterr().out, re.MULTILINE)
    assert entries
    for name, text in entries:
        form, description = re.match(
            r"((?: ?,? ?(?:--\w+|\[?\{[^}]+\}\]?|[A-Z\[][^ ]*))+)\s+(.+)", text, re.DOTALL
        ).groups()
        assert "VALUE" not in form or name == "set"
        assert len(description.split()) > 2, name


def test_choices_and_defaults_of_help_are_those_of_the_schema():
    for flag in flags.FLAGS:
        if flag.key and flag.key != "eval.scales":
            assert flag.values == flags.key_values(flag.key)
            default = flags.KEYS[flag.key].default
            assert f"(default: {default}" in flag.description or default in (None, "") or flag.name == "engine"


def test_flags_override_the_yaml_and_flag_defaults_do_not(tmp_path):
    path = tmp_path / "c.yml"
    path.write_text("batch_size: 8\nseed: 5\n")
    cfg = load_config(parse("train", ["--config", str(path), "--seed", "7"]))
    assert (cfg.batch_size, cfg.seed) == (8, 7)


def test_set_takes_several_values_up_to_the_next_flag_and_may_be_repeated():
    cfg = train("--set", "data.crop_size=[64,128]", "lr_init=1e-3", "--mix", "True", "--set", "total_step=20")
    assert cfg.data.crop_size == (64, 128)
    assert (cfg.lr_init, cfg.mix, cfg.total_step) == (1e-3, True, 20)


def test_set_keeps_text_keys_as_text():
    assert train("--set", "data.dataset_dir=2024").data.dataset_dir == "2024"
    assert train("--save_dir", "1e3").save_dir == "1e3"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bach_size", "2"], r"unknown flag '--bach_size'; did you mean '--batch_size'\?"),
        (["--multi_scale", "True"], r"unknown flag '--multi_scale'"),
        (["oops"], r"unexpected argument 'oops'"),
        (["--set", "seed=1", "oops"], r"unexpected argument 'oops'"),
        (["--set"], r"--set needs KEY=VALUE"),
        (["--set", "sed=1"], r"--set: unknown key 'sed'; did you mean 'seed'"),
        (["--batch_size", "two"], r"--batch_size: batch_size is 'two', but must be a whole number"),
        (
            ["--batch_size", "2", "--set", "batch_size=4"],
            r"batch_size is given twice: 4 by --set and 2 by --batch_size",
        ),
        (["--set", "seed=1", "seed=2"], r"seed is given twice"),
        (["--seed", "1", "--seed", "2"], r"--seed is given twice"),
        (["--mix"], r"expected"),
        (["--resume_ckpt", ""], r"--resume_ckpt is empty"),
        (["--device_target", "NPU"], r"device_target is 'NPU', but must be one of CPU, GPU, Ascend"),
        (["--mi", "True"], r"unknown flag '--mi'; did you mean '--mix'"),
    ],
)
def test_an_invalid_command_line_is_refused(argv, message):
    with pytest.raises(OcrnetError, match=message):
        train(*argv)


def test_equal_values_given_twice_are_accepted():
    assert train("--batch_size", "4", "--set", "batch_size=4").batch_size == 4


def test_config_is_required():
    with pytest.raises(OcrnetError, match="--config is required"):
        load_config(parse("train", []))


def test_a_shortened_run_shortens_warmup_and_logs_it(caplog):
    cfg = train("--set", "total_step=40")
    assert (cfg.total_step, cfg.warmup_step) == (40, 4)
    assert "warmup_step: 4 instead of 500" in caplog.text
    assert any(line.startswith("save_interval: 2000 is greater than total_step") for line in caplog.messages)
    with pytest.raises(OcrnetError, match="warmup_step 500 is more than total_step 40"):
        train("--set", "total_step=40", "warmup_step=500")


def test_multi_scale_means_six_scales():
    def scales(*argv: str):
        return load_config(parse("eval", ["--config", CONFIG, *argv])).eval.scales

    assert scales() == (1.0,)
    assert scales("--multi_scale", "True") == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    assert scales("--multi_scale", "False") == (1.0,)
    with pytest.raises(OcrnetError, match=r"eval\.scales is given twice"):
        scales("--multi_scale", "True", "--set", "eval.scales=[1.0]")


def test_ckpt_path_is_an_alias_of_checkpoint_path():
    assert parse("eval", ["--ckpt_path", "x"]).options == {"checkpoint_path": "x"}


def test_a_flag_without_value_means_true_and_predict_takes_its_source_first():
    assert flags.as_bool(parse("train", ["--dry_run"]), "dry_run")
    assert not flags.as_bool(parse("train", ["--dry_run", "False"]), "dry_run")
    assert not flags.as_bool(parse("train", []), "dry_run")
    args = parse("predict", ["photo.jpg", "--checkpoint_path", "run"])
    assert args.options == {"source": "photo.jpg", "checkpoint_path": "run"}
    with pytest.raises(OcrnetError, match="required: SOURCE"):
        parse("predict", ["--checkpoint_path", "run"])
