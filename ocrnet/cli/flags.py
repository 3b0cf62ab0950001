"""The table of all public flags, and the parser that converts them to config values."""

import argparse
import logging
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ocrnet import config
from ocrnet.cli.common import Parser
from ocrnet.config import Config, loader
from ocrnet.config.loader import KEYS, SourcedValue
from ocrnet.export.formats import Format, Input, Outputs, Precision
from ocrnet.predict.writers import KINDS
from ocrnet.utils.errors import OcrnetError, nearest
from ocrnet.weights.to_foreign import TARGETS

logger = logging.getLogger(__name__)

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
    """One flag: the commands that accept it, its help, and the config key that it sets.

    A flag with a ``key`` takes the choices, the default and the form of its value from the schema of the config. A flag
    without one is interpreted by its command. A ``bare`` flag may be given without a value, which means True.
    """

    name: str
    commands: tuple[str, ...]
    key: str | None
    help: str
    metavar: str = "VALUE"
    default: str | None = None
    choices: tuple[str, ...] = ()
    alias: str | None = None
    bare: bool = False

    @property
    def form(self) -> str:
        """The form of the value in the help text: its choices, or a word such as FILE or N."""
        choices = self.values
        return f"{{{','.join(choices)}}}" if choices else self.metavar

    @property
    def values(self) -> tuple[str, ...]:
        """The values that the flag accepts; empty if they cannot be listed."""
        return self.choices or (BOOL if self.bare else key_values(self.key) if self.key else ())

    @property
    def description(self) -> str:
        """The help text with the default value."""
        default = self.default
        if default is None and self.key and KEYS[self.key].default not in (None, ""):
            default = str(KEYS[self.key].default)
        if default is None and self.bare:
            default = "False"
        return f"{self.help} (default: {default})" if default else self.help


BOOL = ("True", "False")


def key_values(key: str) -> tuple[str, ...]:
    """Return the values of a config key; empty if they cannot be listed."""
    kind = KEYS[key].type
    kinds = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    if bool in kinds:
        return BOOL
    return next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is typing.Literal), ())


FLAGS = (
    Flag("config", (*RUN, "check", "submit"), None, "YAML file with the configuration", "FILE"),
    Flag("config", ("export",), None, "YAML file that names the validation images for the comparison", "FILE"),
    Flag(
        "device_target", ENGINE, "device_target", "device to compute on", default="Ascend or GPU if available, else CPU"
    ),
    Flag("engine", ENGINE, "engine", "framework that runs the network", default="auto, the one that is installed"),
    Flag("mix", ENGINE, "mix", "use mixed precision"),
    Flag("amp_level", RUN, "amp_level", "level of mixed precision in the mindspore engine; only with --mix True"),
    Flag("ms_mode", RUN, "ms_mode", "execution mode of the mindspore engine: compiled, or op by op"),
    Flag("save_dir", RUN, "save_dir", "folder of the run", "DIR"),
    Flag(
        "checkpoint_path",
        ("eval", "predict", "submit", "serve"),
        None,
        "checkpoint, exported file, or folder, which means its newest valid checkpoint",
        "PATH",
        alias="ckpt_path",
    ),
    Flag(
        "checkpoint_path",
        ("export",),
        None,
        "checkpoint, or folder, which means its newest valid checkpoint",
        "PATH",
        alias="ckpt_path",
    ),
    Flag(
        "checkpoint_path",
        ("report",),
        None,
        "checkpoint to evaluate, or folder, which means its newest valid checkpoint",
        "PATH",
        default="the best checkpoint of the run",
        alias="ckpt_path",
    ),
    Flag("input", ("convert",), None, "weights of another implementation, or an ocrnet checkpoint", "FILE"),
    Flag("output", ("predict",), None, "folder for the results", "DIR", default="predictions"),
    Flag("output", ("submit",), None, "zip file to write", "FILE.zip"),
    Flag("output", ("export",), None, "exported file to write; with --format triton, a folder", "PATH"),
    Flag("output", ("convert",), None, "file to write", "FILE"),
    Flag("output", ("report",), None, "HTML file to write", "FILE.html", default="RUN/report.html"),
    Flag(
        "save",
        ("predict",),
        None,
        f"results to write, separated by commas: {', '.join(KINDS)}",
        "KIND[,KIND...]",
        default="overlay,indices,color,json; for videos overlay,json",
    ),
    Flag("offline", ("predict",), None, "download nothing and reject a URL", bare=True),
    Flag("split", ("submit",), None, "split to submit", default="test", choices=("test", "val")),
    Flag("verify", ("submit",), None, "zip file to validate; nothing is written", "FILE.zip"),
    Flag("to", ("convert",), None, "format to write", default="an ocrnet checkpoint", choices=tuple(TARGETS)),
    Flag("allow_partial", ("convert",), None, "convert what fits and initialize what is missing", bare=True),
    Flag("size", ("export",), None, "height and width of the input", "[H,W]", default="[512, 1024]"),
    Flag(
        "format",
        ("export",),
        None,
        "format to write; triton: a model repository",
        default="by the suffix of --output",
        choices=(*get_args(Format), "triton"),
    ),
    Flag("dynamic", ("export",), None, "accept any batch size, height and width", bare=True),
    Flag(
        "input",
        ("export",),
        None,
        "input of the exported network: unprocessed uint8 images, or normalized float32 N,3,H,W",
        default="by format",
        choices=get_args(Input),
    ),
    Flag(
        "outputs",
        ("export",),
        None,
        "output of the exported network; logits have a quarter of the input's height and width",
        default="by format",
        choices=get_args(Outputs),
    ),
    Flag(
        "precision",
        ("export",),
        None,
        "number format of the weights: float16 for openvino, int8 for onnx and openvino",
        default="float32",
        choices=get_args(Precision),
    ),
    Flag("calibration", ("export",), None, "folder of representative images, required for --precision int8", "DIR"),
    Flag("images", ("export",), None, "folder of images for the comparison", "DIR", default="synthetic street scenes"),
    Flag(
        "images", ("report",), None, "number of validation images to evaluate, evenly spaced; 0: all", "N", default="0"
    ),
    Flag("curves_only", ("report",), None, "do not evaluate the validation images", bare=True),
    Flag("watch", ("report",), None, "update the curves until the run ends", bare=True),
    Flag("num_images", ("export",), None, "number of images for the comparison; 0: all", "N", default="8"),
    Flag("tolerance", ("export",), None, "maximum relative difference of the logits", "X", default="by precision"),
    Flag(
        "multi_scale",
        ("eval", "predict", "submit"),
        "eval.scales",
        f"average the probabilities over the scales {' '.join(map(str, config.EVAL_SCALES))}",
        default="False",
        choices=BOOL,
    ),
    Flag("flip", ("eval", "predict", "submit"), "eval.flip", "average with the mirrored image"),
    Flag(
        "visualize",
        ("eval",),
        None,
        "write predictions and ground truth as overlays to SAVE_DIR/visualize",
        default="False",
        choices=BOOL,
    ),
    Flag(
        "resume_ckpt",
        ("train",),
        None,
        "checkpoint to resume from; auto: the newest valid one in save_dir",
        "FILE|auto",
    ),
    Flag("batch_size", ("train",), "batch_size", "crops per rank and step", "N"),
    Flag("seed", ("train",), "seed", "seed of initial weights, sample order and augmentation", "N"),
    Flag("log_interval", ("train",), "log_interval", "steps between log lines", "N"),
    Flag("run_eval", ("train",), "run_eval", "evaluate during training"),
    Flag("lr_init", ("train",), "lr_init", "highest learning rate", "X"),
    Flag("enable_modelarts", RUN, "enable_modelarts", "ignore the flags that ModelArts adds, and resume automatically"),
    Flag("data_url", RUN, "data_url", "location of the dataset: obs://, s3:// or file:// URL, or path", "URL"),
    Flag("train_url", RUN, "train_url", "upload target of the results: obs://, s3:// or file:// URL, or path", "URL"),
    Flag(
        "ckpt_url",
        ("train",),
        "ckpt_url",
        "ImageNet weights of the backbone, or checkpoint to start from: obs://, s3:// or file:// URL, or path",
        "URL",
    ),
    Flag("ckpt_url", ("eval",), "ckpt_url", "checkpoint to evaluate: obs://, s3:// or file:// URL, or path", "URL"),
    Flag(
        "host",
        ("serve",),
        None,
        "address to listen on",
        "ADDRESS",
        default="127.0.0.1, which only this machine can reach",
    ),
    Flag("port", ("serve",), None, "port to listen on; 0: any free port", "N", default="8000"),
    Flag("max_batch", ("serve",), None, "maximum number of images in a batch", "N", default="8, on a CPU 1"),
    Flag("batch_wait", ("serve",), None, "time that an image waits for others of the same size", "SECONDS", "0.005"),
    Flag("max_requests", ("serve",), None, "maximum number of simultaneous requests", "N", default="64"),
    Flag("timeout", ("serve",), None, "time after which a request fails", "SECONDS", default="60"),
    Flag("max_megabytes", ("serve",), None, "maximum size of an image file", "MB", default="20"),
    Flag("max_megapixels", ("serve",), None, "maximum size of an image", "MEGAPIXELS", default="16"),
    Flag(
        "token_file",
        ("serve",),
        None,
        "file with the token that requests must send",
        "FILE",
        default="OCRNET_SERVE_TOKEN, else none",
    ),
    Flag("dry_run", ("train",), None, "check the data, print the plan and its cost, and stop", bare=True),
)


@dataclass(frozen=True)
class Args:
    """The parsed command line: config values by key, and the values of other flags by name."""

    command: str
    given: dict[str, SourcedValue]
    options: dict[str, str]
    added: tuple[str, ...] = ()  # the flags of MODELARTS that are present
    inputs: tuple[str, ...] = ()  # the values of the positional argument in SEVERAL


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
    return Args(command, given, options, tuple(added), inputs)


def _positionals(command: str) -> list[str]:
    """Return the positional arguments of a command as its usage line shows them."""
    several = f"{SEVERAL[command][0].upper()} ..." if command in SEVERAL else None
    return [text for text in (POSITIONAL.get(command, ("",))[0].upper(), several) if text]


def _parser(command: str, flags: Sequence[Flag]) -> Parser:
    parser = Parser(
        prog=f"ocrnet {command}",
        usage=f"ocrnet {command} {' '.join([*_positionals(command), '[FLAGS] [--set KEY=VALUE ...]'])}",
        allow_abbrev=False,
        epilog="--quiet prints only results, warnings and errors; --verbose also prints debug messages; --debug shows "
        "the traceback of an error.",
    )
    if command in POSITIONAL:
        name, text = POSITIONAL[command]
        parser.add_argument(name, help=text, metavar=name.upper())
    if command in SEVERAL:
        name, text = SEVERAL[command]
        parser.add_argument(name, help=text, metavar=name.upper(), nargs="+")
    for flag in flags:
        names = [f"--{name}" for name in (flag.name, flag.alias) if name]
        bare: dict[str, Any] = {"nargs": "?", "const": "True"} if flag.bare else {}
        parser.add_argument(*names, dest=flag.name, help=flag.description, action="append", metavar=flag.form, **bare)
    for name in MODELARTS if command in RUN else ():
        parser.add_argument(f"--{name}", action="append", help=argparse.SUPPRESS)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="config key and its value; repeatable"
    )
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
        what = next(flag.help for flag in FLAGS if flag.name == name and args.command in flag.commands)
        raise OcrnetError(f"--{name} is required: {what}")
    return args.options[name]


def load_config(args: Args) -> Config:
    """Return the config from the YAML file and the command line; log adjusted values.

    Raise `OcrnetError` if a value is invalid or if two values contradict each other.
    """
    given = loader.read_yaml(required(args, "config")) | args.given
    _warn_of_old_keys(given)
    cfg = loader.build(given)
    if "total_step" in args.given and "warmup_step" not in args.given and cfg.warmup_step > cfg.total_step // 10:
        shortened = cfg.total_step // 10
        logger.info(f"warmup_step: {shortened} instead of {cfg.warmup_step}, a tenth of total_step")
        cfg = loader.build(given | {"warmup_step": SourcedValue(shortened, "total_step")})
    config.check(cfg)
    _check_modelarts(cfg, args.added)
    for name in ("eval_interval", "save_interval", "log_interval"):
        if getattr(cfg, name) > cfg.total_step:
            logger.info(f"{name}: {getattr(cfg, name)} is greater than total_step; it takes effect at the last step")
    return cfg


def _warn_of_old_keys(given: Mapping[str, SourcedValue]) -> None:
    """Log a warning for each key that is set by its old name."""
    for name, item in given.items():
        if item.old_key:
            logger.warning(
                f"{item.source}: key '{item.old_key}' is renamed to '{name}'; the old name is an error in version 0.3 "
                "and later"
            )


def _check_modelarts(cfg: Config, added: Sequence[str]) -> None:
    """Log ignored ModelArts flags; raise `OcrnetError` if `enable_modelarts` does not allow them."""
    if added and not cfg.enable_modelarts:
        raise OcrnetError(f"unknown flag '--{added[0]}'; if ModelArts adds it, set enable_modelarts: True to ignore it")
    if added:
        logger.info(f"enable_modelarts: ignored: {', '.join(f'--{name}' for name in added)}")
    if cfg.enable_modelarts and not (cfg.data_url or cfg.train_url):
        logger.info("enable_modelarts: no effect without data_url or train_url; results stay in save_dir")


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
