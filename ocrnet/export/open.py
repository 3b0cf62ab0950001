"""Open a checkpoint or an exported file for prediction."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ocrnet import weights as weights_files
from ocrnet.config import Config
from ocrnet.distributed.launcher import World
from ocrnet.engines import collectives, factory
from ocrnet.engines.base import Engine
from ocrnet.export.formats import Exported, ExportMetadata, format_of
from ocrnet.export.runtimes import open_session
from ocrnet.export.runtimes.engine import RuntimeEngine
from ocrnet.train.setup import log_differences
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import Weights, checkpoint, convert
from ocrnet.weights.checkpoint import AnyPath

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A network that is ready to predict; ``cfg`` has the normalization of its images."""

    path: Path
    weights: Weights  # without tensors for an exported file
    engine: Engine
    cfg: Config
    metadata: ExportMetadata | None  # None for a checkpoint


def open_for_inference(
    path: AnyPath,
    cfg: Config,
    *,
    world: World | None = None,
    check: Callable[[Weights], None] = lambda weights: None,
    users_config: bool = False,
) -> Opened:
    """Open a checkpoint or an exported file for prediction.

    Args:
        path: The file, or a folder, which means its newest valid checkpoint.
        cfg: The configuration.
        world: The ranks of the run; None: a single process.
        check: Called with the weights before an engine is opened; it raises an exception to refuse them.
        users_config: Whether the user gave the configuration: it is then compared with the architecture of the file,
            and the normalization of a network that this project trained is taken from it instead of from the file.

    Returns:
        The network; the caller closes its engine.

    Raises:
        OcrnetError: The file is missing, damaged, or does not run on the configured device.
    """
    path = checkpoint.resolve(path)
    source = read(path, cfg)
    weights = source if isinstance(source, Weights) else source.weights
    check(weights)
    if users_config:
        log_differences(cfg, weights.arch, path)
        cfg = convert.with_normalization(cfg, weights)
    else:
        mean, std = convert.normalization_of(weights)
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, mean=mean, std=std))
    engine = open_engine(cfg, source, world=world or World())
    try:
        with collectives.propagate_errors(engine):
            engine.restore(weights.tensors, weights.meta.get("step", 0))
    except BaseException:
        engine.close()
        raise
    logger.info(f"checkpoint: {path}")
    return Opened(path, weights, engine, cfg, None if isinstance(source, Weights) else source.metadata)


def read(path: Path, cfg: Config) -> Weights | Exported:
    """Return a checkpoint's weights, or an exported file opened with the settings in ``cfg``.

    Raise `OcrnetError` if the file is neither, or if it does not run on the configured device.
    """
    kind = format_of(path)
    if kind is None:
        return weights_files.read(path)
    if cfg.device_target not in (None, "GPU" if kind == "tensorrt" else "CPU"):
        raise OcrnetError(f"{path}: exported {kind} files do not run on {cfg.device_target}; "
                          "omit --device_target")  # fmt: skip
    session = open_session(kind, path, mix=cfg.mix)
    if session.document is None:
        raise OcrnetError(f"{path} was not written by ocrnet export: its metadata is missing")
    try:
        metadata = ExportMetadata.from_dict(session.document)
    except (TypeError, KeyError, ValueError, AttributeError, OcrnetError) as error:
        raise OcrnetError(
            f"{path}: its metadata is invalid ({type(error).__name__}: {error}); export it again"
        ) from None
    return Exported(path, metadata, session)


def as_weights(source: Weights | Exported) -> Weights:
    """Return the result of `read` as `Weights`; those of an exported file have no tensors."""
    return source if isinstance(source, Weights) else source.weights


def open_engine(cfg: Config, source: Weights | Exported, *, world: World) -> Engine:
    """Return the engine for a checkpoint or an exported file.

    Args:
        cfg: The configuration.
        source: The result of `read`.
        world: The ranks of the run.

    Returns:
        The engine. For a checkpoint, the caller must restore its tensors.
    """
    if isinstance(source, Weights):
        return factory.open_engine(cfg, source.arch, world=world)
    engine = RuntimeEngine(cfg, source, world=world)
    factory.log_startup(engine)
    return engine
