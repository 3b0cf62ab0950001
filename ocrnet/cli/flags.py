"""The table of all public flags, and the parser that converts them to config values."""

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ocrnet import config
from ocrnet.config import Config, loader
from ocrnet.config.loader import KEYS, SourcedValue
from ocrnet.distributed.launcher import read_world
from ocrnet.utils.errors import OcrnetError, nearest

RUN = ("train", "eval")
ENGINE = (*RUN, "predict", "submit", "report", "serve")

# Flags that ModelArts adds to the command of a job, according to its documentation (framework images, runner, training
# service), and those that the public MindSpore scripts accept from it. With enable_modelarts they are ignored: rank
# and world size are read from the environment.
MODELARTS = (
    "init_method", "rank", "world_size", "local_rank", "local_size", "num_gpus", "launcher",
    "task_index", "job_name", "ps_hosts", "worker_hosts", "data_dir",
)  # fmt: skip

# The positional argument of a command: its name and help.
POSITIONAL = {
    "predict": ("source", "an image, a video, a folder, a quoted glob pattern, or the http(s) URL of an image"),
}

# The positional argument of a command that accepts it one or more times: its name and help.
SEVERAL = {"report": ("run", "the folder of a run or of an evaluation; give several folders to compare them")}


@dataclass(frozen=True)
class Flag:
    """One flag: the commands that accept it, the config key that it sets, and its help.

    A flag whose ``key`` is None sets no config key; its command interprets it. A ``bare`` flag may be used without a
    value, which means True.
    """

    name: str
    commands: tuple[str, ...]
    key: str | None
    help: str
    alias: str | None = None
    bare: bool = False


FLAGS = (
    Flag(
        "config",
        (*RUN, "check", "submit", "export"),
        None,
        "YAML file whose values replace the defaults, for example config/ocrnet/config_ocrnet_hrw48_16k.yml",
    ),
    Flag("device_target", ENGINE, "device_target", "CPU, GPU or Ascend; default: Ascend or GPU if available, else CPU"),
    Flag("engine", ENGINE, "engine", "auto, torch or mindspore; default auto"),
    Flag("mix", ENGINE, "mix", "use mixed precision, True or False; default False"),
    Flag(
        "amp_level",
        RUN,
        "amp_level",
        "level of --mix in the mindspore engine: auto, O0, O1, O2 or O3; default auto",
    ),
    Flag(
        "ms_mode",
        RUN,
        "ms_mode",
        "mindspore engine: graph (compiled) or pynative (op by op); default graph",
    ),
    Flag("save_dir", RUN, "save_dir", "folder of the run; default output"),
    Flag(
        "checkpoint_path",
        ("eval", "predict", "submit", "export", "report", "serve"),
        None,
        "checkpoint file, or a folder to use its newest valid checkpoint; eval, predict, submit and serve also accept "
        "an exported file; report: default the best checkpoint of the run",
        "ckpt_path",
    ),
    Flag("input", ("convert",), None, "weights of another implementation, or an ocrnet checkpoint"),
    Flag(
        "output",
        ("predict", "submit", "export", "convert", "report"),
        None,
        "output path; predict: a folder, default predictions; submit: a .zip; export, convert: a file; "
        "report: a file, default RUN/report.html",
    ),
    Flag(
        "save",
        ("predict",),
        None,
        "results to write, separated by commas: overlay, indices, labelIds, color, side, confidence, json; "
        "default overlay,indices,color,json, for videos overlay,json",
    ),
    Flag("offline", ("predict",), None, "download nothing and reject a URL; default False", bare=True),
    Flag("split", ("submit",), None, "split to submit, test or val; default test"),
    Flag("verify", ("submit",), None, "validate this .zip instead of writing one"),
    Flag(
        "to",
        ("convert",),
        None,
        "format to convert to: hrnet, mmseg or mindspore; default: an ocrnet checkpoint",
    ),
    Flag(
        "allow_partial",
        ("convert",),
        None,
        "convert the parameters that match and initialize the others; default False",
        bare=True,
    ),
    Flag(
        "size",
        ("export",),
        None,
        "input height and width of the exported network, as [1024, 2048]; default [512, 1024]",
    ),
    Flag(
        "format",
        ("export",),
        None,
        "onnx, openvino, torchscript, torch_export, mindir, tensorrt or triton (a folder); default: by the suffix of "
        "--output",
    ),
    Flag("dynamic", ("export",), None, "accept any batch size, height and width; default False", bare=True),
    Flag(
        "input",
        ("export",),
        None,
        "input: uint8 (unprocessed images) or normalized (float32 N,3,H,W); default by format",
    ),
    Flag(
        "outputs",
        ("export",),
        None,
        "output: labels, probabilities, or logits at a quarter of the size; default by format",
    ),
    Flag("precision", ("export",), None, "float32, float16 (openvino) or int8 (onnx, openvino); default float32"),
    Flag("calibration", ("export",), None, "folder of representative images, required for --precision int8"),
    Flag("images", ("export",), None, "folder of images for the comparison; default: synthetic street scenes"),
    Flag("images", ("report",), None, "number of validation images to evaluate, evenly spaced; 0 means all; default 0"),
    Flag("curves_only", ("report",), None, "omit the evaluation of the validation images; default False", bare=True),
    Flag("watch", ("report",), None, "update the curves repeatedly until the run ends; default False", bare=True),
    Flag("num_images", ("export",), None, "number of images for the comparison; 0 means all; default 8"),
    Flag(
        "tolerance",
        ("export",),
        None,
        "largest accepted relative difference of the logits; default by precision",
    ),
    Flag(
        "multi_scale",
        ("eval", "predict", "submit"),
        "eval.scales",
        "average the predictions at scales 0.5 0.75 1 1.25 1.5 1.75; default False",
    ),
    Flag(
        "flip",
        ("eval", "predict", "submit"),
        "eval.flip",
        "average with the prediction of the mirrored image; default False",
    ),
    Flag(
        "visualize",
        ("eval",),
        None,
        "write overlays and ground truth to SAVE_DIR/visualize; default False",
    ),
    Flag("resume_ckpt", ("train",), None, "checkpoint to resume from, or auto for the newest valid one in save_dir"),
    Flag("batch_size", ("train",), "batch_size", "crops per rank; default 2"),
    Flag("seed", ("train",), "seed", "seed of the weights, the sample order and the augmentation; default 1234"),
    Flag("log_interval", ("train",), "log_interval", "steps between log lines; default 100"),
    Flag("run_eval", ("train",), "run_eval", "evaluate during training, True or False; default True"),
    Flag("lr_init", ("train",), "lr_init", "highest learning rate; default 0.01"),
    Flag(
        "enable_modelarts",
        RUN,
        "enable_modelarts",
        "ignore the flags that ModelArts adds to the command; default False",
    ),
    Flag("data_url", RUN, "data_url", "location of the dataset: obs://, s3://, file://, or a path"),
    Flag("train_url", RUN, "train_url", "where to upload the results: obs://, s3://, file://, or a path"),
    Flag("ckpt_url", RUN, "ckpt_url", "weights to start from or to evaluate: obs://, s3://, file://, or a path"),
    Flag("host", ("serve",), None, "address to listen on; default 127.0.0.1, which only this machine can reach"),
    Flag("port", ("serve",), None, "port to listen on; 0 means any free port; default 8000"),
    Flag("max_batch", ("serve",), None, "largest number of images in a batch; default 8, on a CPU 1"),
    Flag(
        "batch_wait",
        ("serve",),
        None,
        "seconds to wait for more images of the same size before a batch is predicted; default 0.005",
    ),
    Flag(
        "max_requests",
        ("serve",),
        None,
        "largest number of simultaneous requests; default 64",
    ),
    Flag("timeout", ("serve",), None, "seconds until a request times out; default 60"),
    Flag("max_megabytes", ("serve",), None, "largest image file, in MB; default 20"),
    Flag("max_megapixels", ("serve",), None, "largest image, in megapixels; default 16"),
    Flag(
        "token_file",
        ("serve",),
        None,
        "file with the token that requests must carry; default: the variable OCRNET_SERVE_TOKEN, else no token",
    ),
    Flag(
        "dry_run",
        ("train",),
        None,
        "check the data, print the plan of the run and its cost, then exit; default False",
        bare=True,
    ),
)


@dataclass(frozen=True)
class Args:
    """The parsed command line: config values by key, and the values of other flags by name."""

    given: dict[str, SourcedValue]
    options: dict[str, str]
    added: tuple[str, ...] = ()  # the flags of MODELARTS that are present
    inputs: tuple[str, ...] = ()  # the values of the positional argument in SEVERAL


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OcrnetError(message)


def parse(command: str, argv: Sequence[str]) -> Args:
    """Return the parsed arguments of a command; raise `OcrnetError` for an unknown flag or an empty value."""
    flags = [flag for flag in FLAGS if command in flag.commands]
    parser = _parser(command, flags)
    names = [action for flag in flags for action in (flag.name, flag.alias) if action] + ["set"]
    tokens = _expand_sets(argv)
    if command in SEVERAL:
        tokens = _complete_bare_flags(tokens, [f"--{flag.name}" for flag in flags if flag.bare])
        known, unknown = parser.parse_known_intermixed_args(tokens)
    else:
        known, unknown = parser.parse_known_args(tokens)
    if unknown:
        extra = unknown[0]
        hint = nearest(extra.split("=")[0].lstrip("-"), names).replace("'", "'--", 1) if extra.startswith("-") else ""
        if (name := extra.split("=")[0].lstrip("-")) in {*KEYS, *loader.OLD_KEYS} and extra.startswith("--"):
            hint = f"; {name} is a config key; use --set {loader.OLD_KEYS.get(name, name)}=VALUE"
        problem = "unknown flag" if extra.startswith("-") else "unexpected argument"
        if extra.endswith("]"):
            hint = "; a value with spaces needs quotes: --set 'data.crop_size=[512, 1024]'"
        elif command == "predict" and not extra.startswith("-"):
            hint = "; predict accepts one source; quote a pattern, as in ocrnet predict 'photos/*.jpg'"
        raise OcrnetError(f"{problem} '{extra}'{hint} (all flags: ocrnet {command} --help)")
    texts = {flag.name: _single_value(flag.name, values) for flag in flags if (values := getattr(known, flag.name))}
    for name, text in texts.items():
        if not text:
            raise OcrnetError(f"--{name} is empty; set a value or omit the flag")
    given = _parse_sets(known.set)
    for flag in flags:
        if flag.key and flag.name in texts:
            _set_once(given, flag.key, SourcedValue(_flag_value(flag, texts[flag.name]), f"--{flag.name}"))
    options = {flag.name: os.path.expanduser(texts[flag.name]) for flag in flags if not flag.key and flag.name in texts}
    for name in {"checkpoint_path", "resume_ckpt"} & options.keys():
        if "://" in options[name]:
            raise OcrnetError(
                f"--{name} {options[name]}: must be a path on this machine; train and eval accept a URL as --ckpt_url"
            )
    if command in POSITIONAL:
        name = POSITIONAL[command][0]
        options[name] = os.path.expanduser(getattr(known, name))
    added = [name for name in MODELARTS if getattr(known, name)] if command in RUN else []
    inputs = tuple(map(os.path.expanduser, getattr(known, SEVERAL[command][0]))) if command in SEVERAL else ()
    return Args(given, options, tuple(added), inputs)


def _parser(command: str, flags: Sequence[Flag]) -> _Parser:
    parser = _Parser(prog=f"ocrnet {command}", allow_abbrev=False, epilog="--debug shows the traceback of an error.")
    if command in POSITIONAL:
        name, text = POSITIONAL[command]
        parser.add_argument(name, help=text, metavar=name.upper())
    if command in SEVERAL:
        name, text = SEVERAL[command]
        parser.add_argument(name, help=text, metavar=name.upper(), nargs="+")
    for flag in flags:
        names = [f"--{name}" for name in (flag.name, flag.alias) if name]
        bare: dict[str, Any] = {"nargs": "?", "const": "True"} if flag.bare else {}
        parser.add_argument(*names, dest=flag.name, help=flag.help, action="append", metavar="VALUE", **bare)
    for name in MODELARTS if command in RUN else ():
        parser.add_argument(f"--{name}", action="append", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any config key; repeatable")
    return parser


def as_bool(args: Args, name: str) -> bool:
    """Return the value of a True/False flag that is not a config key; False if the flag is absent."""
    text = args.options.get(name, "False")
    return _bool(name, text)


def as_size(args: Args, name: str, default: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the value of a height-and-width flag that is not a config key.

    Args:
        args: The parsed command line.
        name: The flag's name; its value is [H, W] or H,W.
        default: The value if the flag is absent.

    Returns:
        Height and width, or the default.

    Raises:
        OcrnetError: The value is not two whole numbers of at least 32.
    """
    if name not in args.options:
        return default
    text = args.options[name]
    value = loader.parse_value(text if text.startswith("[") else f"[{text}]")
    if not isinstance(value, list) or len(value) != 2 or not all(type(side) is int and side >= 32 for side in value):
        raise OcrnetError(f"--{name} is {text!r}, but must be [height, width], each at least 32")
    return value[0], value[1]


def as_number(args: Args, name: str, default: Any) -> Any:
    """Return the value of a numeric flag that is not a config key.

    Args:
        args: The parsed command line.
        name: The flag's name.
        default: The value if the flag is absent. If it is an int, the flag must be a whole number.

    Returns:
        A number of at least 0, or the default.

    Raises:
        OcrnetError: The value is negative or not a number, or not a whole number where one is required.
    """
    if name not in args.options:
        return default
    value = loader.parse_value(args.options[name])
    kinds = (int,) if isinstance(default, int) else (int, float)
    if type(value) not in kinds or not value >= 0:
        kind = "a whole number" if kinds == (int,) else "a number"
        raise OcrnetError(f"--{name} is {args.options[name]!r}, but must be {kind} of at least 0")
    return value


def _bool(name: str, text: str) -> bool:
    value = loader.parse_value(text)
    if not isinstance(value, bool):
        raise OcrnetError(f"--{name} is {text!r}, but must be True or False")
    return value


def required(args: Args, name: str) -> str:
    """Return the value of a required flag; raise `OcrnetError` if the flag is absent."""
    if name not in args.options:
        flag_help = next(flag.help for flag in FLAGS if flag.name == name)
        raise OcrnetError(f"--{name} is required: {flag_help}")
    return args.options[name]


def load_config(args: Args) -> tuple[Config, list[str]]:
    """Return the config from the YAML file and the command line, and messages about adjusted values, to be logged.

    Raise `OcrnetError` if a value is invalid or if two values contradict each other.
    """
    given = loader.read_yaml(required(args, "config")) | args.given
    _warn_of_old_keys(given)
    cfg = loader.build(given)
    notes = []
    if "total_step" in args.given and "warmup_step" not in args.given and cfg.warmup_step > cfg.total_step // 10:
        shortened = cfg.total_step // 10
        notes.append(f"warmup_step: {shortened} instead of {cfg.warmup_step}, a tenth of total_step")
        cfg = loader.build(given | {"warmup_step": SourcedValue(shortened, "total_step")})
    config.check(cfg)
    notes += _modelarts_notes(cfg, args.added)
    for name in ("eval_interval", "save_interval", "log_interval"):
        if getattr(cfg, name) > cfg.total_step:
            notes.append(f"{name}: {getattr(cfg, name)} is greater than total_step; it takes effect at the last step")
    return cfg, notes


def _warn_of_old_keys(given: Mapping[str, SourcedValue]) -> None:
    """Print a warning on rank 0 for each key that is set by its old name."""
    with contextlib.suppress(OcrnetError):  # invalid launcher variables are reported by the code that uses them
        if read_world().rank:
            return
    for name, item in given.items():
        if item.old_key:
            print(
                f"warning: {item.source}: key '{item.old_key}' is renamed to '{name}'; the old name is an error in "
                "version 0.3 and later",
                file=sys.stderr,
            )


def _modelarts_notes(cfg: Config, added: Sequence[str]) -> list[str]:
    """Return messages about ignored ModelArts flags; raise `OcrnetError` if `enable_modelarts` does not allow them."""
    if added and not cfg.enable_modelarts:
        raise OcrnetError(f"unknown flag '--{added[0]}'; if ModelArts adds it, set enable_modelarts: True to ignore it")
    notes = [f"enable_modelarts: ignored: {', '.join(f'--{name}' for name in added)}"] if added else []
    if cfg.enable_modelarts and not (cfg.data_url or cfg.train_url):
        notes.append("enable_modelarts: no effect without data_url or train_url; results stay in save_dir")
    return notes


def _complete_bare_flags(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Append ``=True`` to a flag without a value: ``--watch run`` becomes ``--watch=True run``."""
    next_tokens = [*argv[1:], ""]
    return [
        f"{token}=True" if token in names and not isinstance(loader.parse_value(next_token), bool) else token
        for token, next_token in zip(argv, next_tokens, strict=False)
    ]


def _expand_sets(argv: Sequence[str]) -> list[str]:
    """Expand ``--set a=1 b=2`` to ``--set=a=1 --set=b=2``; a flag or a token without '=' ends the pairs."""
    expanded: list[str] = []
    in_set = False
    for token in argv:
        if token == "--set":
            in_set = True
            continue
        in_set = in_set and "=" in token and not token.startswith("--")
        expanded += [f"--set={token}"] if in_set else [token]
    if argv and argv[-1] == "--set":
        raise OcrnetError("--set needs KEY=VALUE")
    return expanded


def _parse_sets(pairs: list[str]) -> dict[str, SourcedValue]:
    given: dict[str, SourcedValue] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise OcrnetError(f"--set {pair}: must be KEY=VALUE")
        key, old_key = loader.current_key(name, "--set")
        _set_once(given, key, SourcedValue(_text_or_value(key, text), "--set", old_key))
    return given


def _text_or_value(name: str, text: str) -> Any:
    return text if KEYS[name].type is str else loader.parse_value(text)


def _flag_value(flag: Flag, text: str) -> Any:
    if flag.name == "multi_scale":
        return list(config.EVAL_SCALES) if _bool(flag.name, text) else [1.0]
    return _text_or_value(flag.key or "", text)


def _set_once(given: dict[str, SourcedValue], name: str, new: SourcedValue) -> None:
    old = given.get(name)
    if old is not None and old.value != new.value:
        raise OcrnetError(
            f"{name} is given twice: {old.value!r} by {old.source} and {new.value!r} by {new.source}; keep one"
        )
    given[name] = new


def _single_value(name: str, values: list[str]) -> str:
    if len(set(values)) > 1:
        raise OcrnetError(f"--{name} is given twice: {' and '.join(map(repr, values))}; keep one")
    return values[0]
