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
    """Read a checkpoint, or open an exported file with the settings in ``cfg``; raise `OcrnetError` for other files."""
    kind = format_of(path)
    if kind is None:
        return weights.read(path)
    if cfg.device_target not in (None, "GPU" if kind == "tensorrt" else "CPU"):
        raise OcrnetError(f"{path}: exported {kind} files do not run on {cfg.device_target}; "
                          "leave --device_target out")  # fmt: skip
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


def as_weights(found: Weights | Exported) -> Weights:
    """Return the architecture and metadata of a checkpoint or an exported file."""
    return found if isinstance(found, Weights) else found.weights


def open_engine(cfg: Config, found: Weights | Exported, *, world: World) -> Engine:
    """Return the engine for a checkpoint or an exported file.

    Args:
        cfg: The configuration.
        found: The result of `read`.
        world: The ranks of the run.

    Returns:
        The engine. For a checkpoint, the caller must restore its tensors.
    """
    if isinstance(found, Weights):
        return factory.open_engine(cfg, found.arch, world=world)
    return RuntimeEngine(cfg, found, world=world)
