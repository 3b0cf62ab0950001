"""Set up a training run: validate the inputs, open the engine and the run folder, and start the training loop."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil

from ocrnet import architecture, config, weights
from ocrnet.architecture import Arch
from ocrnet.cloud import resume as cloud_resume
from ocrnet.cloud.cache import Speaker
from ocrnet.cloud.push import CHECKPOINTS, Push, Pushing, check_writable
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
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import Stopped, StopRequest
from ocrnet.weights import checkpoint
from ocrnet.weights.checkpoint import Checkpoint

TRAIN, VAL = "training images", "validation images"


def train(cfg: Config, *, notes: list[str], resume: str | None, world: World, begin_from: Path | None = None) -> None:
    """Train a network, from the beginning or from a checkpoint.

    Args:
        cfg: The configuration.
        notes: Further lines for the log.
        resume: A checkpoint or run folder to resume from; ``auto``: the newest valid checkpoint of the run; None: start
            at step 0.
        world: The ranks of the run.
        begin_from: The checkpoint to resume from if the run would start at step 0 otherwise.

    Raises:
        OcrnetError: The inputs are invalid, or the run failed.
        Stopped: A signal stopped the run after it saved a checkpoint.
    """
    train_set = open_split(cfg, "train")
    val_set = open_split(cfg, "val") if cfg.run_eval else None
    cfg = with_dataset_classes(cfg, len(train_set.classes))
    arch = arch_from_config(cfg, len(train_set.classes))
    # mutation: resume-after-restart
    resume, restart_notes = _resume_after_restart(cfg, resume)
    store, resume, download_notes = cloud_resume.begin(cfg, resume, Speaker(world))
    ckpt, resume_notes = find_resume(cfg, resume, begin_from)
    tensors, weight_notes = starting_state(cfg, arch, ckpt)
    datasets, cache_notes = cache.prepare(cfg.data.cache_dir, {TRAIN: train_set} | ({VAL: val_set} if val_set else {}))
    notes = [*notes, *restart_notes, *download_notes, *resume_notes, *weight_notes, *cache_notes]

    stream = make_stream(cfg, datasets[TRAIN], arch)
    with Pushing(cfg.cloud) as pushing:
        engine = open_engine(cfg, arch, world=world, stream=stream)
        try:
            run_values = {"checkpoint": _checkpoint_identity(ckpt), **config.of_all_ranks(cfg)}
            collectives.check_same(
                engine, run_values | identities(datasets)
            )  # before rank 0 changes anything in the folder
            versions = core_versions() | dict(engine.versions)
            notes += [*_changed_versions(ckpt, versions), *_changed_batch(cfg, ckpt, world)] if ckpt else []
            # mutation: restore-unlogged-losses
            progress = Progress(**ckpt.meta["progress"]) if ckpt else Progress()
            with collectives.propagate_errors(engine):
                engine.restore(tensors, progress.step)
            run = _open_folder(cfg, engine, progress, versions, [*banner(cfg, arch, engine, len(train_set)), *notes])
            outcome = "failed"
            try:
                with collectives.propagate_errors(engine):
                    push = _start_uploads(cfg, run, store, pushing)
                with StopRequest(speaks=run.writes) as stopped:
                    signal_number = Loop(cfg, engine, run, stream, datasets.get(VAL), progress, stopped, push).fit()
                outcome = "stopped" if signal_number else "finished"
            finally:
                run.close(outcome)
            if signal_number:
                run.say(f"stopped after step {progress.step}; resume with --resume_ckpt auto")
                raise Stopped(signal_number)
            run.say(
                f"finished after step {progress.step}; to create a report: ocrnet report {shlex.quote(cfg.save_dir)}"
            )
        finally:
            engine.close()


def _start_uploads(cfg: Config, run: Run, store: Store | None, pushing: Pushing) -> Push | None:
    """Start the upload to train_url on rank 0; return None on other ranks or without train_url."""
    if store is None or not run.writes:
        return None
    check_writable(store, cfg.cloud, run.say)
    push = Push(store, run.folder, cfg.cloud, keep=cfg.keep_checkpoint)
    push.compare(
        retry(lambda: store.list(CHECKPOINTS), f"train_url {cfg.train_url}", retries=cfg.cloud.retries, say=run.say)
    )
    push.files()
    return pushing.begin(push, run.say)


def identities(datasets: Mapping[str, Dataset]) -> dict[str, str]:
    """Return the identity of each dataset, by which the ranks verify that they have the same images."""
    # mutation: same-images-on-all-ranks
    return {name: dataset.identity for name, dataset in datasets.items()}


def _checkpoint_identity(ckpt: Checkpoint | None) -> str:
    return f"step {ckpt.meta['step']}, sha256 {ckpt.meta['sha256'][:12]}" if ckpt else "none"


def _open_folder(
    cfg: Config, engine: Engine, progress: Progress, versions: Mapping[str, str], lines: Sequence[str]
) -> Run:
    """Lock the run folder and begin its record with ``lines`` on rank 0, while all other ranks wait."""
    with collectives.propagate_errors(engine):
        if engine.world.rank == 0:
            client.check(cfg.trackers)
        run = Run(cfg.save_dir, rank=engine.world.rank)
        # mutation: lock-run-folder
        run.claim()
        checkpoint.clean(run.checkpoints)
        # mutation: cut-metrics-after-restored-step
        run.cut_metrics(step=progress.step, evaluated_step=progress.evaluated_step)
        run.begin(cfg, versions)
        if cfg.tensorboard:
            run.open_board(progress.step)
        for line in lines:
            run.say(line)
        run.open_services(cfg.trackers, project=cfg.project, run_name=cfg.run_name, fresh=progress.step == 0)
    return run


def make_stream(cfg: Config, train_set: Dataset, arch: Arch) -> TrainStream:
    """Return the stream of training samples.

    Args:
        cfg: The configuration, including the augmentation.
        train_set: The training images.
        arch: The architecture of the network.

    Returns:
        The stream of augmented samples.
    """
    channels, dropout = architecture.head_channels(arch), cfg.ocr_head.dropout
    return TrainStream(train_set, cfg.data, seed=cfg.seed, channels=channels, dropout=dropout)


def open_split(cfg: Config, split: str) -> Dataset:
    """Open a labeled split of the config's dataset."""
    return open_dataset(cfg.data.name, cfg.data.dataset_dir, split, ignore_label=cfg.data.ignore_label)


def with_dataset_classes(cfg: Config, num_classes: int) -> Config:
    """Return the config with the dataset's number of classes."""
    return config.with_classes(cfg, num_classes, f"{cfg.data.name} at {cfg.data.dataset_dir}")


def arch_from_config(cfg: Config, num_classes: int) -> Arch:
    """Return the architecture that a config describes."""
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


def differences(cfg: Config, arch: Arch, path: Path) -> list[str]:
    """Compare the architecture in the config with that of a file; the file takes precedence.

    Args:
        cfg: The configuration.
        arch: The architecture in the file.
        path: The file.

    Returns:
        One line for each key that differs.
    """
    configured = arch_from_config(cfg, arch.num_classes)
    return [
        f"{name}: the config has {getattr(configured, name)}, {path.name} has {getattr(arch, name)}; "
        "the file takes precedence"
        for name in ("width", "blocks", "modules", "channels", "key_channels", "variant", "align_corners")
        if getattr(configured, name) != getattr(arch, name)
    ]


def _resume_after_restart(cfg: Config, resume: str | None) -> tuple[str | None, list[str]]:
    """Return ``auto`` and a log line if torchrun restarted the ranks after they saved checkpoints, else ``resume``."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    saved = checkpoint.steps(Path(cfg.save_dir) / "checkpoint")
    if count == "0" or resume == "auto" or not saved:
        return resume, []
    if saved[-1].stat().st_mtime < psutil.Process(os.getppid()).create_time():  # from an earlier launch
        return resume, []
    return "auto", [f"resume: torchrun restarted the ranks (restart {count}), so --resume_ckpt auto is implied"]


def find_resume(cfg: Config, resume: str | None, begin_from: Path | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Select the checkpoint to resume from; a fresh start after ``auto`` is never silent.

    Args:
        cfg: The configuration.
        resume: None means a fresh start, which is an error if the run folder contains checkpoints. ``auto`` means the
            newest valid checkpoint of the run folder, or a logged fresh start if the folder has no checkpoints. Any
            other value is a checkpoint, or a folder whose newest valid checkpoint is used.
        begin_from: The checkpoint that replaces a fresh start, if any.

    Returns:
        The checkpoint, or None for a fresh start, and the lines to log about the choice.

    Raises:
        OcrnetError: There is no valid checkpoint, a fresh start would mix with an earlier run, or a run cannot resume
            from the checkpoint.
    """
    folder = Path(cfg.save_dir) / "checkpoint"
    if resume is None:
        if checkpoint.steps(folder):
            raise OcrnetError(
                f"save_dir '{cfg.save_dir}' holds checkpoints of an earlier run; "
                "resume from them with --resume_ckpt auto, or give another --save_dir"
            )
        if begin_from is None:
            return None, []
        resume = str(begin_from)
    elif resume == "auto" and not checkpoint.steps(folder):
        if begin_from is None:
            return None, [f"resume: no checkpoint in {folder}{_or_train_url(cfg)}; starting from step 0"]
        resume = str(begin_from)
    if resume == "auto":
        newest = checkpoint.newest_valid(folder)
        notes = [f"resume: skipped: {reason}" for _, reason in newest.passed_over]
        if newest.checkpoint is None:
            raise OcrnetError(
                f"no checkpoint in {folder} is valid: {'; '.join(reason for _, reason in newest.passed_over)}"
            )
        ckpt = newest.checkpoint
    else:
        path, meaning = checkpoint.resolve_state(resume)
        notes = [f"resume: {meaning}"] if meaning else []
        ckpt = checkpoint.load(path)
    if "source" in ckpt.meta:
        raise OcrnetError(
            f"{ckpt.path} has only converted weights, from which a run cannot resume; begin from its backbone: "
            f"--set backbone.pretrained=True backbone.backbone_ckpt={ckpt.path}"
        )
    step = ckpt.meta["step"]
    if step > cfg.total_step:
        raise OcrnetError(
            f"{ckpt.path} has {step} steps, but total_step is {cfg.total_step}; raise total_step to continue"
        )
    complete = ": the run is complete" if step == cfg.total_step else ""
    return ckpt, [*notes, f"resume: from {ckpt.path}, step {step}{complete}", *_changed_keys(cfg, ckpt)]


def _or_train_url(cfg: Config) -> str:
    return f" or in {cfg.train_url}" if cfg.train_url else ""


def _changed_keys(cfg: Config, ckpt: Checkpoint) -> list[str]:
    """Return a line for each config key that differs from the run that wrote the checkpoint."""
    before = loader.with_current_keys(dict(config.flat(ckpt.meta["config"])))
    current = dict(config.flat(config.as_dict(cfg)))
    return [
        f"resume: {name} is {current[name]}, was {old}" for name, old in before.items() if current.get(name, old) != old
    ]


def _changed_versions(ckpt: Checkpoint, versions: Mapping[str, str]) -> list[str]:
    """Return a line for each version, and for the number of threads, that differs from the checkpoint's run."""
    before = ckpt.meta["versions"]
    return [
        f"resume: {name} is {new}, was {before[name]}; numbers may differ in their last digits"
        for name, new in versions.items()
        if before.get(name, new) != new
    ]


def _changed_batch(cfg: Config, ckpt: Checkpoint, world: World) -> list[str]:
    """Return the line to log if the number of ranks or of crops per step differs from the checkpoint's run."""
    old_cfg = ckpt.meta["config"]
    old_ranks = ckpt.meta.get("cards", 1)  # checkpoints without this key are from runs with one rank
    old_batch = old_ranks * old_cfg["batch_size"] * old_cfg["accumulate_steps"]
    new_batch = world.size * cfg.batch_size * cfg.accumulate_steps
    prefix = (
        f"resume: the number of ranks is {world.size}, was {old_ranks}: " if world.size != old_ranks else "resume: "
    )
    if new_batch != old_batch:
        return [
            f"{prefix}the global batch changes to {new_batch} crop{'s' if new_batch > 1 else ''} a step, was {old_batch}; "
            "the run will see a different number of crops"
        ]
    return [f"{prefix}the global batch is the same"] if world.size != old_ranks else []


def starting_state(cfg: Config, arch: Arch, ckpt: Checkpoint | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the initial state of the run: from the checkpoint, with an ImageNet backbone, or with fresh weights.

    Args:
        cfg: The configuration.
        arch: The architecture of the network.
        found: The checkpoint to resume from; None for a fresh start.

    Returns:
        The state by canonical name, and the lines to log about it.

    Raises:
        OcrnetError: The tensors do not fit the architecture, or the file of the backbone cannot be read.
    """
    if ckpt is not None:
        shapes = {name: array.shape for name, array in ckpt.tensors.items() if "/" not in name}
        architecture.check(shapes, arch, str(ckpt.path))
        return ckpt.tensors, []
    state = architecture.init(arch, cfg.seed, cfg.backbone.initializer)
    if not cfg.backbone.pretrained:
        return state, [
            "backbone: random weights; the published results need ImageNet weights "
            "(backbone.pretrained: True, backbone.backbone_ckpt: FILE)"
        ]
    loaded, report = weights.read_backbone(cfg.backbone.backbone_ckpt, arch)
    return state | loaded, [report]


def banner(cfg: Config, arch: Arch, engine: Engine, images: int) -> list[str]:
    """Return the lines that describe the run at its start.

    Args:
        cfg: The configuration.
        arch: The architecture of the network.
        engine: The engine of this rank.
        images: The number of training images.

    Returns:
        Lines about versions, engine, network, data, batch and learning rate.
    """
    global_batch = lr_schedule.global_batch(cfg, engine.world.size)
    return [
        f"ocrnet {core_versions()['ocrnet']}, run folder {cfg.save_dir}",
        *engine.startup_messages,
        f"network: OCRNet-HRNet-W{arch.width}, {architecture.num_parameters(arch) / 1e6:.2f} M parameters, "
        f"{arch.num_classes} classes, variant {arch.variant}",
        f"data: {images} training images of {cfg.data.name} at {cfg.data.dataset_dir}, "
        f"crops {cfg.data.crop_size[0]}x{cfg.data.crop_size[1]}",
        f"batch: {global_batch} crops a step (batch_size {cfg.batch_size} x accumulate_steps {cfg.accumulate_steps} x "
        f"{engine.world.size} ranks), {cfg.total_step} steps, {global_batch * cfg.total_step / images:.1f} epochs",
        *_batch_size_lines(cfg, global_batch),
    ]


def _batch_size_lines(cfg: Config, global_batch: int) -> list[str]:
    """Return a line if the global batch differs from base_batch_size, with the effect on the learning rate."""
    base = cfg.base_batch_size
    if base in (None, global_batch):
        return []
    ratio = f"{global_batch / base:.4g} times base_batch_size ({base} crops a step), for which lr_init is set"
    scaled_lr = f"{cfg.lr_init * global_batch / base:.4g}"
    if cfg.lr_scale == "linear":
        return [f"learning rate: the global batch is {ratio}; its maximum is {scaled_lr} (lr_scale linear)"]
    return [f"learning rate: the global batch is {ratio}; --set lr_scale=linear changes {cfg.lr_init:g} to {scaled_lr}"]
