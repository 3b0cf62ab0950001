"""Build a `Config` from YAML files and command-line values.

Flags override YAML files, which override defaults. Every value is typed and keeps its source.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ocrnet import config
from ocrnet.config import Config
from ocrnet.utils.errors import OcrnetError, nearest

BASE = "__BASE__"

# Keys of the MindSpore implementation and their equivalents in this project.
RENAMED = {
    "img_ratios": "eval.scales",
    "map_label": "data.class_weights",
    "num_parallel_workers": "num_workers",
    "train_transforms": "data.crop_size, data.scale_range, data.flip and data.color",
    "eval_transforms": "eval.scales and eval.flip",
    "item_transforms": "data.crop_size, data.scale_range, data.flip and data.color",
    "filter_bias_and_bn": "optimizer.decay: weights_only",
    "loss_weight": "loss.aux and loss.ocr",
    "fcn_head": "ocr_head.variant",
    "in_channels": "backbone.width",
    "ocr_channels": "ocr_head.key_channels",
    "net": "none, there is only one network",
    "ckpt_dir": "save_dir",
    "data_dir": "cloud.cache_dir",
    "force_update": "none, a step with a non-finite loss or gradient is always skipped and counted",
    "ms_loss_scaler": "none, the loss scale depends on the precision",
}

# Renamed keys: the old name is accepted with a warning up to version 0.2 and is an error from version 0.3.
OLD_KEYS = {
    "expect": "min_miou",
    "sinks": "trackers",
    "save_ckpt": "save_mindspore_ckpt",
    "cloud.drain": "cloud.push_timeout",
}

KEYS = dict(config.schema())
# A leading ~ in these values is expanded to the home folder.
PATHS = ("save_dir", "data.dataset_dir", "data.cache_dir", "backbone.backbone_ckpt", "cloud.cache_dir", *config.URLS)
GROUPS = {name.split(".")[0] for name in KEYS if "." in name}


@dataclasses.dataclass(frozen=True)
class SourcedValue:
    """A value, its source (a file or a flag), and the old name of its key if the source uses that name."""

    value: Any
    source: str
    old_key: str | None = None


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that parses 1e-3 as a number and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            name, position = self.construct_object(key_node, deep=True), key_node.start_mark
            if isinstance(name, (list, dict)):
                raise OcrnetError(f"{position.name}, line {position.line + 1}: a key must be a word, not {name}")
            if name in names:
                raise OcrnetError(f"{position.name}, line {position.line + 1}: '{name}' is given twice; keep one")
            names.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """Parse one command-line value as YAML: 1e-3 is a number, True a bool, [1, 2] a list.

    Return the text unchanged if it is not valid YAML.
    """
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except (yaml.YAMLError, RecursionError):
        return text


def read_yaml(path: str | Path) -> dict[str, SourcedValue]:
    """Read a YAML file and the files that it lists under ``__BASE__``; return {key: value with source}.

    The values of the file override those of the listed files. A later listed file overrides an earlier one.
    """
    return _read(Path(path), ())


def _read(path: Path, parents: tuple[Path, ...]) -> dict[str, SourcedValue]:
    if path.resolve() in parents:
        raise OcrnetError(
            f"{path}: circular {BASE}: the file includes itself, directly or through other files; remove that entry"
        )
    tree = load_yaml(path, like=".yml")
    bases = tree.pop(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise OcrnetError(f"{path}: {BASE} must be a file name or a list of file names, not {bases!r}")
    values: dict[str, SourcedValue] = {}
    for base in bases:
        values |= _read(path.parent / base, (*parents, path.resolve()))
    return values | _flatten(tree, str(path))


def load_yaml(path: Path, *, like: str = "", kinds: tuple[type, ...] = (dict,)) -> Any:
    """Read one YAML file.

    Args:
        path: File to read.
        like: Suffix of the files among which a similar name is suggested if ``path`` does not exist.
        kinds: Accepted types of the content.

    Returns:
        The content; an empty dict for an empty file.

    Raises:
        OcrnetError: The file does not exist (the message suggests the closest file name), is unreadable, is not valid
            YAML, or does not hold one of ``kinds``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = [p.name for p in path.parent.glob(f"*{like}")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean '{path.parent / close[0]}'?" if close else ""
        raise OcrnetError(f"'{path}' does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OcrnetError(f"'{path}' cannot be read: {error}") from None
    loader = _Loader(text)
    loader.name = str(path)
    try:
        tree = loader.get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error) else ""
        raise OcrnetError(f"'{path}' is not valid YAML: {error}{hint}") from None
    finally:
        loader.dispose()
    if tree is None:
        return {}
    if not isinstance(tree, kinds):
        wanted = "a list or 'key: value' lines" if list in kinds else "'key: value' lines"
        raise OcrnetError(f"'{path}' must hold {wanted}, not {type(tree).__name__}")
    return tree


def _flatten(tree: dict[str, Any], source: str) -> dict[str, SourcedValue]:
    flat: dict[str, SourcedValue] = {}
    for name, node in tree.items():
        if name in GROUPS and isinstance(node, dict):
            flat |= {f"{name}.{inner}": SourcedValue(v, source) for inner, v in node.items()}
        elif name in GROUPS:
            raise OcrnetError(
                f"{source}: '{name}' is a group of keys and needs an indented block below it, not {node!r}"
            )
        else:
            flat[str(name)] = SourcedValue(node, source)
    current: dict[str, SourcedValue] = {}
    for name, item in flat.items():
        key, old_key = current_key(name, source)
        if key in current:
            raise OcrnetError(f"{source}: '{name}' and '{current[key].old_key or key}' are the same key; keep '{key}'")
        current[key] = dataclasses.replace(item, old_key=old_key)
    return current


def current_key(name: str, source: str) -> tuple[str, str | None]:
    """Return a key's current name, and its old name if ``name`` is that, else None.

    Args:
        name: A current or old key name.
        source: The file or flag that contains it, for error messages.

    Raises:
        OcrnetError: The schema has no such key. For a key of the MindSpore implementation, the message names the
            equivalent key; otherwise it suggests the most similar key.
    """
    if name in KEYS:
        return name, None
    if name in OLD_KEYS:
        return OLD_KEYS[name], name
    last = name.split(".")[-1]
    if last in RENAMED:
        raise OcrnetError(f"{source}: key '{name}' is not supported; equivalent: {RENAMED[last]}")
    known = [*KEYS, *OLD_KEYS, *GROUPS]
    close = [full for full in (*KEYS, *OLD_KEYS) if full.split(".")[-1] == last]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean '{OLD_KEYS.get(close[0], close[0])}'?" if close else ""
    raise OcrnetError(f"{source}: unknown key '{name}'{hint}")


def with_current_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that an earlier version wrote, {key: value}, with old key names replaced by current ones."""
    return {OLD_KEYS.get(name, name): value for name, value in flat.items()}


def build(sourced_values: dict[str, SourcedValue]) -> Config:
    """Build the `Config` from values by key; a key without a value keeps its default.

    Raise `OcrnetError` as `convert` does.
    """
    values = {name: convert(name, item) for name, item in sourced_values.items()}
    values |= {name: os.path.expanduser(values[name]) for name in PATHS if values.get(name)}

    def make(node: type, prefix: str) -> Any:
        chosen = {}
        for item in dataclasses.fields(node):
            if dataclasses.is_dataclass(item.type):
                chosen[item.name] = make(item.type, f"{prefix}{item.name}.")  # type: ignore[arg-type]
            elif prefix + item.name in values:
                chosen[item.name] = values[prefix + item.name]
        return node(**chosen)

    return make(Config, "")


def convert(name: str, sourced: SourcedValue) -> Any:
    """Convert a value to the type of its key.

    Raise `OcrnetError`, which names key, value and source, if the type, the choices or the bounds do not allow it.
    """
    item = KEYS[name]
    try:
        return _fit(sourced.value, item.type, item)
    except ValueError as error:
        raise OcrnetError(f"{sourced.source}: {name} is {sourced.value!r}, but {error}") from None


def _fit(value: Any, kind: Any, item: dataclasses.Field) -> Any:
    """Return a value converted to the type ``kind``; raise ValueError that continues "KEY is VALUE, but"."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = next(arg for arg in args if arg is not type(None))
        return None if value is None or value == "none" else _fit(value, inner, item)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"must be one of {', '.join(args)}{nearest(str(value), args)}")
        return value
    if origin is tuple:
        return _fit_tuple(value, args, item)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"must be {_NAMES[kind]}")
    if kind in (int, float) and not config.in_bounds(value, item):
        raise ValueError(f"must be {_bounds(item)}")
    return value


def _fit_tuple(value: Any, args: tuple, item: dataclasses.Field) -> tuple:
    if not isinstance(value, (list, tuple)):
        if typing.get_origin(args[0]) is typing.Literal:
            raise ValueError(f"must be a list like [{', '.join(typing.get_args(args[0]))}]")
        raise ValueError(f"must be a list of numbers like [{'1, 2' if args[-1] is not Ellipsis else '1.0, 1.0'}]")
    if args[-1] is Ellipsis:
        return tuple(_fit(element, args[0], item) for element in value)
    if len(value) != len(args):
        raise ValueError(f"must have {len(args)} values")
    return tuple(_fit(element, arg, item) for element, arg in zip(value, args, strict=True))


_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def _bounds(item: dataclasses.Field) -> str:
    low, high = item.metadata["low"], item.metadata["high"]
    if low is not None and high is not None:
        return f"from {low} to {high}"
    return f"at least {low}" if low is not None else f"at most {high}" if high is not None else "a finite number"
