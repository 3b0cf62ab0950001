"""Set up a training run: validate the inputs, open the engine and the run folder, and start the training loop."""

import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil

from ocrnet import architecture, config, weights
from ocrnet.architecture import Arch
from ocrnet.cloud import resume as cloud_resume
from ocrnet.cloud.push import CHECKPOINTS, UploadContext, Uploader, check_writable
from ocrnet.cloud.retry import retry
from ocrnet.cloud.store import Store
from ocrnet.config import Config, loader
from ocrnet.data.datasets import Dataset, cache, open_dataset
from ocrnet.data.sampler import TrainStream
from ocrnet.distributed.launcher import World
from ocrnet.engines import collectives, lr_schedule
from ocrnet.engines.base import Engine
from ocrnet.engines.factory import open_engine
from ocrnet.tracking.run_dir import Run, core_versions
from ocrnet.tracking.services import client
from ocrnet.train.trainer import Loop, Progress
from ocrnet.utils import log
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import Stopped, StopRequest
from ocrnet.weights import checkpoint
from ocrnet.weights.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

TRAIN, VAL = "training images", "validation images"


def train(cfg: Config, *, resume: str | None, world: World, begin_from: Path | None = None) -> None:
    """Train a network from step 0 or from a checkpoint, up to ``cfg.total_step``.

    Args:
        cfg: The configuration.
        resume: The checkpoint or run folder to resume from. ``auto``: the newest valid checkpoint in ``cfg.save_dir``.
            None: start at step 0.
        world: This process's rank and the number of ranks.
        begin_from: The checkpoint to resume from if the run would start at step 0 otherwise.

    Raises:
        OcrnetError: The configuration, the dataset or the checkpoint is invalid, or the run failed.
        Stopped: A signal requested a stop; the run saved a checkpoint and ended.
    """
    try:
        _train(cfg, resume, world, begin_from)
    finally:
        log.close_file()


def _train(cfg: Config, resume: str | None, world: World, begin_from: Path | None) -> None:
    train_set = open_split(cfg, "train")
    val_set = open_split(cfg, "val") if cfg.run_eval else None
    cfg = with_dataset_classes(cfg, len(train_set.classes))
    arch = arch_from_config(cfg, len(train_set.classes))
    # mutation: resume-after-restart
    resume = _resume_after_restart(cfg, resume)
    store, resume = cloud_resume.open_train_url(cfg, resume)
    ckpt = find_resume(cfg, resume, begin_from)
    tensors = starting_state(cfg, arch, ckpt)
    datasets = cache.prepare(cfg.data.cache_dir, {TRAIN: train_set} | ({VAL: val_set} if val_set else {}))

    stream = make_stream(cfg, datasets[TRAIN], arch)
    with UploadContext(cfg.cloud) as pushing:
        engine = open_engine(cfg, arch, world=world, stream=stream)
        try:
            run_values = {"checkpoint": _checkpoint_identity(ckpt), **config.of_all_ranks(cfg)}
            collectives.check_same(engine, run_values | identities(datasets))  # before rank 0 changes the run folder
            versions = core_versions() | dict(engine.versions)
            if ckpt:
                _log_changed_versions(ckpt, versions)
                _log_changed_batch(cfg, ckpt, world)
            # mutation: restore-unlogged-losses
            progress = Progress(**ckpt.meta["progress"]) if ckpt else Progress()
            with collectives.propagate_errors(engine):
                engine.restore(tensors, progress.step)
            log_banner(cfg, arch, engine, len(train_set))
            run = _open_folder(cfg, engine, progress, versions)
            outcome = "failed"
            try:
                with collectives.propagate_errors(engine):
                    push = _start_uploads(cfg, run, store, pushing)
                with StopRequest(prints=run.writes) as stopped:
                    signal_number = Loop(cfg, engine, run, stream, datasets.get(VAL), progress, stopped, push).fit()
                outcome = "stopped" if signal_number else "finished"
            finally:
                run.close(outcome)
            if signal_number:
                logger.info(f"stopped after step {progress.step}; resume with --resume_ckpt auto")
                raise Stopped(signal_number)
            report_command = f"ocrnet report {shlex.quote(cfg.save_dir)}"
            logger.info(f"finished after step {progress.step}; to create a report: {report_command}")
        finally:
            engine.close()


def _start_uploads(cfg: Config, run: Run, store: Store | None, pushing: UploadContext) -> Uploader | None:
    """Start uploading to train_url on rank 0; return None on other ranks and if train_url is not set."""
    if store is None or not run.writes:
        return None
    check_writable(store, cfg.cloud)
    push = Uploader(store, run.folder, cfg.cloud, keep=cfg.keep_checkpoint)
    push.queue_missing(retry(lambda: store.list(CHECKPOINTS), f"train_url {cfg.train_url}", retries=cfg.cloud.retries))
    push.queue_files()
    return pushing.start(push)


def identities(datasets: Mapping[str, Dataset]) -> dict[str, str]:
    """Return the identity string of each dataset; the ranks compare these strings to verify that their images match."""
    # mutation: same-images-on-all-ranks
    return {name: dataset.identity for name, dataset in datasets.items()}


def _checkpoint_identity(ckpt: Checkpoint | None) -> str:
    return f"step {ckpt.meta['step']}, sha256 {ckpt.meta['sha256'][:12]}" if ckpt else "none"


def _open_folder(cfg: Config, engine: Engine, progress: Progress, versions: Mapping[str, str]) -> Run:
    """Lock the run folder, prepare it for ``progress.step``, and open its log file.

    Only rank 0 does this. All other ranks wait for it.
    """
    with collectives.propagate_errors(engine):
        if engine.world.rank == 0:
            client.check(cfg.trackers)
        run = Run(cfg.save_dir, rank=engine.world.rank)
        # mutation: lock-run-folder
        run.lock()
        run.open_log()
        checkpoint.clean(run.checkpoints)
        # mutation: cut-metrics-after-restored-step
        run.truncate_metrics(step=progress.step, evaluated_step=progress.evaluated_step)
        run.begin(cfg, versions)
        if cfg.tensorboard:
            run.open_tensorboard(progress.step)
        run.open_services(cfg.trackers, project=cfg.project, run_name=cfg.run_name, fresh=progress.step == 0)
    return run


def make_stream(cfg: Config, train_set: Dataset, arch: Arch) -> TrainStream:
    """Create the stream of training samples.

    Args:
        cfg: The configuration; its ``data``, ``seed`` and ``ocr_head.dropout`` are read.
        train_set: The training images.
        arch: The architecture of the network, which determines the length of the dropout masks.

    Returns:
        The stream of augmented samples.
    """
    channels, dropout = architecture.head_channels(arch), cfg.ocr_head.dropout
    return TrainStream(train_set, cfg.data, seed=cfg.seed, channels=channels, dropout=dropout)


def open_split(cfg: Config, split: str) -> Dataset:
    """Open a labeled split (train or val) of the configured dataset."""
    return open_dataset(cfg.data.name, cfg.data.dataset_dir, split, ignore_label=cfg.data.ignore_label)


def with_dataset_classes(cfg: Config, num_classes: int) -> Config:
    """Return the config with the number of classes of the dataset, which must not contradict the config."""
    return config.with_classes(cfg, num_classes, f"{cfg.data.name} at {cfg.data.dataset_dir}")


def arch_from_config(cfg: Config, num_classes: int) -> Arch:
    """Return the architecture that the config describes, with ``num_classes`` classes."""
    return Arch(
        width=cfg.backbone.width,
        blocks=cfg.backbone.blocks,
        modules=cfg.backbone.modules,
        num_classes=num_classes,
        channels=cfg.ocr_head.channels,
        key_channels=cfg.ocr_head.key_channels,
        dropout=cfg.ocr_head.dropout,
        variant=cfg.ocr_head.variant,
        align_corners=cfg.ocr_head.align_corners,
    )


def log_differences(cfg: Config, arch: Arch, path: Path) -> None:
    """Log the architecture keys that differ between the config and a checkpoint or exported file.

    Args:
        cfg: The configuration.
        arch: The architecture stored in the file, which takes precedence.
        path: The file.
    """
    configured = arch_from_config(cfg, arch.num_classes)
    for name in ("width", "blocks", "modules", "channels", "key_channels", "variant", "align_corners"):
        if (value := getattr(configured, name)) != (stored := getattr(arch, name)):
            logger.info(f"{name}: the config has {value}, {path.name} has {stored}; the file takes precedence")


def _resume_after_restart(cfg: Config, resume: str | None) -> str | None:
    """Return ``auto`` if torchrun restarted the ranks and this launch has saved a checkpoint, else ``resume``."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    saved = checkpoint.steps(Path(cfg.save_dir) / "checkpoint")
    if count == "0" or resume == "auto" or not saved:
        return resume
    if saved[-1].stat().st_mtime < psutil.Process(os.getppid()).create_time():  # saved by an earlier launch
        return resume
    logger.info(f"resume: torchrun restarted the ranks (restart {count}), so --resume_ckpt auto is implied")
    return "auto"


def find_resume(cfg: Config, resume: str | None, begin_from: Path | None = None) -> Checkpoint | None:
    """Select and load the checkpoint to resume from; log the choice.

    Args:
        cfg: The configuration.
        resume: None: start at step 0, which is an error if the run folder contains checkpoints. ``auto``: the newest
            valid checkpoint of the run folder; if the folder has no checkpoints, start at step 0 and log this. Any
            other value: a checkpoint file, or a folder whose newest valid checkpoint is used.
        begin_from: The checkpoint to resume from instead of starting at step 0; None: start at step 0.

    Returns:
        The checkpoint, or None if the run starts at step 0.

    Raises:
        OcrnetError: No checkpoint is valid, the run folder contains checkpoints of an earlier run but ``resume`` is
            None, or a run cannot resume from the checkpoint.
    """
    folder = Path(cfg.save_dir) / "checkpoint"
    if resume is None:
        if checkpoint.steps(folder):
            raise OcrnetError(
                f"save_dir '{cfg.save_dir}' holds checkpoints of an earlier run; "
                "resume from them with --resume_ckpt auto, or use another --save_dir"
            )
        if begin_from is None:
            return None
        resume = str(begin_from)
    elif resume == "auto" and not checkpoint.steps(folder):
        if begin_from is None:
            logger.info(f"resume: no checkpoint in {folder}{_or_train_url(cfg)}; starting from step 0")
            return None
        resume = str(begin_from)
    if resume == "auto":
        newest = checkpoint.newest_valid(folder)
        for _, reason in newest.skipped:
            logger.warning(f"resume: skipped: {reason}")
        if newest.checkpoint is None:
            raise OcrnetError(
                f"no checkpoint in {folder} is valid: {'; '.join(reason for _, reason in newest.skipped)}"
            )
        ckpt = newest.checkpoint
    else:
        ckpt = checkpoint.load(checkpoint.resolve_state(resume))
    if "source" in ckpt.meta:
        raise OcrnetError(
            f"{ckpt.path} has only converted weights, from which a run cannot resume; to start from its backbone: "
            f"--set backbone.pretrained=True backbone.backbone_ckpt={ckpt.path}"
        )
    step = ckpt.meta["step"]
    if step > cfg.total_step:
        raise OcrnetError(
            f"{ckpt.path} has {step} steps, but total_step is {cfg.total_step}; raise total_step to continue"
        )
    complete = ": the run is complete" if step == cfg.total_step else ""
    logger.info(f"resume: from {ckpt.path}, step {step}{complete}")
    _log_changed_keys(cfg, ckpt)
    return ckpt


def _or_train_url(cfg: Config) -> str:
    return f" or in {cfg.train_url}" if cfg.train_url else ""


def _log_changed_keys(cfg: Config, ckpt: Checkpoint) -> None:
    """Log each config key whose value differs from that of the run that wrote the checkpoint."""
    before = loader.with_current_keys(dict(config.flat(ckpt.meta["config"])))
    current = dict(config.flat(config.as_dict(cfg)))
    for name, old in before.items():
        if current.get(name, old) != old:
            logger.info(f"resume: {name} is {current[name]}, was {old}")


def _log_changed_versions(ckpt: Checkpoint, versions: Mapping[str, str]) -> None:
    """Log each library version that differs from the checkpoint's run, and the thread count if it differs."""
    before = ckpt.meta["versions"]
    for name, new in versions.items():
        if (old := before.get(name, new)) != new:
            logger.info(f"resume: {name} is {new}, was {old}; losses and scores may differ in their last digits")


def _log_changed_batch(cfg: Config, ckpt: Checkpoint, world: World) -> None:
    """Log the number of ranks and the global batch if they differ from the checkpoint's run."""
    old_cfg = ckpt.meta["config"]
    old_ranks = ckpt.meta.get("cards", 1)  # checkpoints without this key are from runs with one rank
    old_batch = old_ranks * old_cfg["batch_size"] * old_cfg["accumulate_steps"]
    new_batch = world.size * cfg.batch_size * cfg.accumulate_steps
    ranks = f"the number of ranks is {world.size}, was {old_ranks}: " if world.size != old_ranks else ""
    if new_batch != old_batch:
        logger.info(
            f"resume: {ranks}the global batch changes to {new_batch} crop{'s' if new_batch > 1 else ''} a step, was "
            f"{old_batch}; the run will see a different number of crops"
        )
    elif ranks:
        logger.info(f"resume: {ranks}the global batch is the same")


def starting_state(cfg: Config, arch: Arch, ckpt: Checkpoint | None) -> dict[str, np.ndarray]:
    """Return the state with which the run starts.

    This is the state of the checkpoint. Without a checkpoint, it is random weights, with the backbone replaced by
    pretrained ImageNet weights if these are configured.

    Args:
        cfg: The configuration.
        arch: The architecture of the network.
        ckpt: The checkpoint to resume from; None to start at step 0.

    Returns:
        The tensors by canonical name.

    Raises:
        OcrnetError: The tensors do not fit the architecture, or the backbone file cannot be read.
    """
    if ckpt is not None:
        shapes = {name: array.shape for name, array in ckpt.tensors.items() if "/" not in name}
        architecture.check(shapes, arch, str(ckpt.path))
        return ckpt.tensors
    state = architecture.init(arch, cfg.seed, cfg.backbone.initializer)
    if not cfg.backbone.pretrained:
        logger.info(
            "backbone: random initial weights; the published results require ImageNet weights "
            "(backbone.pretrained: True, backbone.backbone_ckpt: FILE)"
        )
        return state
    return state | weights.read_backbone(cfg.backbone.backbone_ckpt, arch)


def log_banner(cfg: Config, arch: Arch, engine: Engine, images: int) -> None:
    """Log versions, engine, network, data, batch and learning rate of a run.

    Args:
        cfg: The configuration.
        arch: The architecture of the network.
        engine: The engine of this rank.
        images: The number of training images.
    """
    global_batch = lr_schedule.global_batch(cfg, engine.world.size)
    lines = [
        f"ocrnet {core_versions()['ocrnet']}, run folder {cfg.save_dir}",
        f"network: OCRNet-HRNet-W{arch.width}, {architecture.num_parameters(arch) / 1e6:.2f} M parameters, "
        f"{arch.num_classes} classes, variant {arch.variant}",
        f"data: {images} training images of {cfg.data.name} at {cfg.data.dataset_dir}, "
        f"crops {cfg.data.crop_size[0]}x{cfg.data.crop_size[1]}",
        f"batch: {global_batch} crops a step (batch_size {cfg.batch_size} x accumulate_steps {cfg.accumulate_steps} x "
        f"{engine.world.size} ranks), {cfg.total_step} steps, {global_batch * cfg.total_step / images:.1f} epochs",
        *_batch_size_lines(cfg, global_batch),
    ]
    for line in lines:
        logger.info(line)


def _batch_size_lines(cfg: Config, global_batch: int) -> list[str]:
    """Return a log line about the effect on the learning rate if the global batch differs from base_batch_size."""
    base = cfg.base_batch_size
    if base in (None, global_batch):
        return []
    ratio = f"{global_batch / base:.4g} times base_batch_size ({base} crops a step), for which lr_init was chosen"
    scaled_lr = f"{cfg.lr_init * global_batch / base:.4g}"
    if cfg.lr_scale == "linear":
        return [f"learning rate: the global batch is {ratio}; lr_scale linear scales lr_init to {scaled_lr}"]
    return [
        f"learning rate: the global batch is {ratio}; "
        f"--set lr_scale=linear scales lr_init from {cfg.lr_init:g} to {scaled_lr}"
    ]
