"""Open a checkpoint or an exported file for prediction."""

from pathlib import Path

from ocrnet import weights
from ocrnet.config import Config
from ocrnet.distributed.launcher import World
from ocrnet.engines import factory
from ocrnet.engines.base import Engine
from ocrnet.export.formats import Exported, ExportMetadata, format_of
from ocrnet.export.runtimes import open_session
from ocrnet.export.runtimes.engine import RuntimeEngine
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import Weights


def read(path: Path, cfg: Config) -> Weights | Exported:
    """Return a checkpoint's weights, or an exported file opened with the settings in ``cfg``.

    Raise `OcrnetError` if the file is neither, or if it does not run on the configured device.
    """
    kind = format_of(path)
    if kind is None:
        return weights.read(path)
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
    return RuntimeEngine(cfg, source, world=world)
