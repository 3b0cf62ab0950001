"""Create the engine that the config selects, and import only its framework."""

import logging
from pathlib import Path
from typing import Literal

from ocrnet.architecture import Arch
from ocrnet.config import Config
from ocrnet.data.sampler import TrainStream
from ocrnet.distributed.launcher import World
from ocrnet.engines.base import Engine
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.installed import installed

logger = logging.getLogger(__name__)

Framework = Literal["torch", "mindspore"]
NOT_INSTALLED: dict[Framework, str] = {
    "torch": "PyTorch is not installed: pip install -r requirements.txt",
    "mindspore": "MindSpore is not installed: from a clone, pip install -e '.[mindspore]'",
}


def open_engine(cfg: Config, arch: Arch, *, world: World, stream: TrainStream | None = None) -> Engine:
    """Create the engine that the config selects, and log its choices.

    Args:
        cfg: The configuration.
        arch: The architecture of the network.
        world: This process's rank and the number of ranks.
        stream: The training stream; None for an engine that only predicts.

    Returns:
        The engine of the chosen framework.

    Raises:
        OcrnetError: The framework is not installed or does not support the device, or the ranks cannot connect.
    """
    if choose_engine(cfg) == "torch":
        from ocrnet.engines.torch.engine import TorchEngine

        engine: Engine = TorchEngine(cfg, arch, world=world, stream=stream)
        log_startup(engine)
        return engine
    from ocrnet.engines.mindspore import distributed

    distributed.prepare(world, cfg.device_target, cfg.rank_timeout)
    from ocrnet.engines.mindspore.engine import MindSporeEngine

    engine = MindSporeEngine(cfg, arch, world=world, stream=stream)
    log_startup(engine)
    return engine


def log_startup(engine: Engine) -> None:
    """Log the device, the precision and the other choices of an engine."""
    for message in engine.startup_messages:
        logger.info(message)


def choose_engine(cfg: Config) -> Framework:
    """Return the framework for ``engine`` and ``device_target`` of the config.

    With ``engine: auto``, the framework is MindSpore if ``device_target`` is Ascend, or if it is not set and the
    machine has an Ascend NPU. Otherwise it is PyTorch, or MindSpore if only that is installed. Raise `OcrnetError` if
    the framework is not installed or does not support the device.
    """
    if cfg.engine == "torch" and cfg.device_target == "Ascend":
        raise OcrnetError(
            "--engine torch does not run on Ascend; use --device_target CPU or GPU, or --engine mindspore"
        )
    frameworks: tuple[Framework, ...] = ("torch", "mindspore")
    available = [name for name in frameworks if installed(name)]
    if cfg.engine != "auto" or cfg.device_target == "Ascend":
        required: Framework = "mindspore" if cfg.engine == "mindspore" or cfg.device_target == "Ascend" else "torch"
        if required not in available:
            raise OcrnetError(f"{NOT_INSTALLED[required]}, or remove --engine and --device_target")
        return required
    if not available:
        raise OcrnetError(NOT_INSTALLED["torch"])
    prefer_ascend = cfg.device_target is None and Path("/dev/davinci_manager").exists()
    return "mindspore" if available == ["mindspore"] or (prefer_ascend and "mindspore" in available) else "torch"
