"""Reading of the folder of a training run or an evaluation: config, metrics, starts, checkpoints."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ocrnet import config
from ocrnet.config import Config, loader
from ocrnet.config.loader import SourcedValue
from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint

Row = Mapping[str, Any]

# A config key that contains one of these words is redacted; keys of the current version do not.
_SECRET = ("secret", "token", "password", "api_key", "access_key")


@dataclass(frozen=True)
class Source:
    """One run as read from its folder; a field is empty if the folder lacks its file.

    ``config`` maps flat keys, such as ``data.crop_size``, to values. ``train`` and ``evals`` are rows of metrics.jsonl,
    ``scored`` the rows of eval.jsonl, ``starts`` those of starts.jsonl, each newest last.
    """

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    train: Sequence[Row] = ()
    evals: Sequence[Row] = ()
    scored: Sequence[Row] = ()
    starts: Sequence[Row] = ()

    @property
    def total_step(self) -> int | None:
        """The total number of steps of the run; None if the folder does not record it."""
        total = self.config.get("total_step")
        return total if self.train and isinstance(total, int) else None

    @property
    def step(self) -> int:
        """The last recorded step."""
        return max((row["step"] for row in (*self.train, *self.evals)), default=0)

    @property
    def finished(self) -> bool:
        """Whether the last step is recorded, with its evaluation unless run_eval is False."""
        last = self.total_step
        if last is None or not any(row["step"] >= last for row in self.train):
            return False
        return self.config.get("run_eval") is False or any(row["step"] >= last for row in self.evals)

    @property
    def versions(self) -> dict[str, str]:
        """The versions recorded by the newest start, or else by the newest evaluation."""
        for row in (*reversed(self.starts), *reversed(self.scored)):
            if isinstance(row.get("versions"), dict):
                return row["versions"]
        return {}


def read(folder: str | Path) -> Source:
    """Read a folder of `ocrnet train` or `ocrnet eval`; raise `OcrnetError` if it is neither.

    An incomplete line, such as the last one of an unfinished run, is skipped.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OcrnetError(f"'{folder}' is not a folder; use the save_dir of ocrnet train or ocrnet eval")
    rows = _rows(folder / "metrics.jsonl")
    run = Source(
        folder=folder,
        name=folder.resolve().name or "run",
        config=_config(folder / "config.yml"),
        train=[row for row in rows if _has(row, "train")],
        evals=[row for row in rows if _has(row, "eval")],
        scored=[row for row in _rows(folder / "eval.jsonl") if _has(row, "eval")],
        starts=_rows(folder / "starts.jsonl"),
    )
    if not (run.config or rows or run.scored or _checkpoints(folder)):
        raise OcrnetError(
            f"'{folder}' is not a run folder: it has no config.yml, metrics.jsonl, eval.jsonl or checkpoint/; "
            "use the save_dir of ocrnet train or ocrnet eval"
        )
    return run


def best_checkpoint(source: Source) -> Path | None:
    """Return the best checkpoint of a run, else its newest valid one, else the last evaluated one, else None."""
    for path in _checkpoints(source.folder):
        if "_best_" in path.name:
            try:
                checkpoint.read_meta(path)
            except OcrnetError:
                continue
            return path
    for folder_ in (source.folder / "checkpoint", source.folder):
        newest = checkpoint.newest_valid(folder_).checkpoint
        if newest:
            return newest.path
    scored = [Path(row["checkpoint"]) for row in source.scored if isinstance(row.get("checkpoint"), str)]
    return next((path for path in reversed(scored) if path.is_file()), None)


def config_for(flat: Mapping[str, Any], given: Mapping[str, SourcedValue], where: str) -> Config:
    """Return the config for the evaluation of a run's network on this machine.

    The recorded device_target, engine and min_miou are ignored.

    Args:
        flat: The config that the run recorded, flat.
        given: The values of the command line, which take precedence.
        where: The file that ``flat`` comes from, for error messages.

    Returns:
        The validated config.

    Raises:
        OcrnetError: A key is unknown or a value is invalid.
    """
    recorded = {
        name: SourcedValue(value, where)
        for name, value in flat.items()
        if name not in ("device_target", "engine", "min_miou")
    }
    for name in recorded:
        loader.current_key(name, where)
    cfg = loader.build(recorded | dict(given))
    config.check(cfg)
    return cfg


def shown(value: Any, name: str = "") -> str:
    """Return a config value or a command argument as text that is safe to publish.

    Access keys from the environment and credentials of URLs are removed, and absolute paths are cut to their last part.
    ``name`` is the config key, whose value is redacted if the key names a secret.
    """
    if any(word in name.lower() for word in _SECRET):
        return "***"
    if isinstance(value, bool) or value is None:
        return {True: "True", False: "False", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(shown(part) for part in value) + "]"
    # mutation: scrub-report
    text = urls.scrub(str(value)).replace(str(Path.home()), "~")
    key, equals, rest = text.partition("=")
    if equals and os.path.isabs(rest):
        return f"{key}={shown(rest)}"
    if "?" in text and "://" in text:  # the query of a presigned URL holds its signature
        text = text.split("?")[0] + "?…"
    if os.path.isabs(text) or text.startswith("~/"):
        return f"…/{Path(text).name}"
    return text


def _has(row: Row, kind: str) -> bool:
    return row.get("kind") == kind and isinstance(row.get("step"), int)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OcrnetError(f"'{path}' cannot be read: {error.strerror}") from None
    rows = []
    for line in lines:
        # mutation: skip-unfinished-rows
        try:
            row = json.loads(line, parse_int=_parse_int)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _parse_int(text: str) -> int:
    """Return an integer of a JSON line; raise ValueError if it is too large for a float."""
    if not math.isfinite(float(text)):
        raise ValueError(text)
    return int(text)


def _config(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}  # the file is being written, or does not exist
    return loader.with_current_keys(dict(config.flat(tree))) if isinstance(tree, dict) else {}


def _checkpoints(folder: Path) -> list[Path]:
    return [path for folder_ in (folder / "checkpoint", folder) for path in sorted(folder_.glob("*.safetensors"))]
