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
    cfg = resolved(cfg, len(train_set.classes))
    arch = arch_of(cfg, len(train_set.classes))
    # mutation: resume-after-restart
    resume, implied = _after_restart(cfg, resume)
    store, resume, brought = cloud_resume.open_train_url(cfg, resume, Speaker(world))
    found, note = find_resume(cfg, resume, begin_from)
    tensors, report = starting_state(cfg, arch, found)
    sets, room = cache.prepare(cfg.data.cache_dir, {TRAIN: train_set} | ({VAL: val_set} if val_set else {}))
    notes = [*notes, *implied, *brought, *note, *report, *room]

    stream = make_stream(cfg, sets[TRAIN], arch)
    with UploadContext(cfg.cloud) as pushing:
        engine = open_engine(cfg, arch, world=world, stream=stream)
        try:
            seen = {"checkpoint": _identity(found), **config.of_all_ranks(cfg)}
            collectives.check_same(engine, seen | identities(sets))  # before rank 0 changes anything in the folder
            versions = core_versions() | dict(engine.versions)
            notes += [*_changed_versions(found, versions), *_changed_batch(cfg, found, world)] if found else []
            # mutation: restore-unlogged-losses
            progress = Progress(**found.meta["progress"]) if found else Progress()
            with collectives.propagate_errors(engine):
                engine.restore(tensors, progress.step)
            run = _open_folder(cfg, engine, progress, versions, [*banner(cfg, arch, engine, len(train_set)), *notes])
            ending = "failed"
            try:
                with collectives.propagate_errors(engine):
                    push = _begin_push(cfg, run, store, pushing)
                with StopRequest(prints=run.writes) as stopped:
                    number = Loop(cfg, engine, run, stream, sets.get(VAL), progress, stopped, push).fit()
                ending = "stopped" if number else "finished"
            finally:
                run.close(ending)
            if number:
                run.say(f"stopped after step {progress.step}; resume with --resume_ckpt auto")
                raise Stopped(number)
            run.say(
                f"finished after step {progress.step}; to create a report: ocrnet report {shlex.quote(cfg.save_dir)}"
            )
        finally:
            engine.close()


def _begin_push(cfg: Config, run: Run, store: Store | None, pushing: UploadContext) -> Uploader | None:
    """Start the upload to train_url on rank 0; return None on other ranks or without train_url."""
    if store is None or not run.writes:
        return None
    check_writable(store, cfg.cloud, run.say)
    push = Uploader(store, run.folder, cfg.cloud, keep=cfg.keep_checkpoint)
    push.queue_missing(
        retry(lambda: store.list(CHECKPOINTS), f"train_url {cfg.train_url}", retries=cfg.cloud.retries, say=run.say)
    )
    push.queue_files()
    return pushing.start(push, run.say)


def identities(datasets: Mapping[str, Dataset]) -> dict[str, str]:
    """Return the identity of each dataset, by which the ranks verify that they have the same images."""
    # mutation: same-images-on-all-ranks
    return {what: dataset.identity for what, dataset in datasets.items()}


def _identity(found: Checkpoint | None) -> str:
    return f"step {found.meta['step']}, sha256 {found.meta['sha256'][:12]}" if found else "none"


def _open_folder(
    cfg: Config, engine: Engine, progress: Progress, versions: Mapping[str, str], lines: Sequence[str]
) -> Run:
    """Lock the run folder and begin its record with ``lines`` on rank 0, while all other ranks wait."""
    with collectives.propagate_errors(engine):
        if engine.world.rank == 0:
            client.check(cfg.trackers)
        run = Run(cfg.save_dir, rank=engine.world.rank)
        # mutation: lock-run-folder
        run.lock()
        checkpoint.clean(run.checkpoints)
        # mutation: cut-metrics-after-restored-step
        run.truncate_metrics(step=progress.step, evaluated_step=progress.evaluated_step)
        run.begin(cfg, versions)
        if cfg.tensorboard:
            run.open_tensorboard(progress.step)
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


def resolved(cfg: Config, num_classes: int) -> Config:
    """Return the config with the dataset's number of classes."""
    return config.with_classes(cfg, num_classes, f"{cfg.data.name} at {cfg.data.dataset_dir}")


def arch_of(cfg: Config, num_classes: int) -> Arch:
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
    configured = arch_of(cfg, arch.num_classes)
    return [
        f"{name}: the config has {getattr(configured, name)}, {path.name} has {getattr(arch, name)}; "
        "the file takes precedence"
        for name in ("width", "blocks", "modules", "channels", "key_channels", "variant", "align_corners")
        if getattr(configured, name) != getattr(arch, name)
    ]


def _after_restart(cfg: Config, resume: str | None) -> tuple[str | None, list[str]]:
    """Return ``auto`` and a log line if torchrun restarted the ranks after they saved checkpoints, else ``resume``."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    made = checkpoint.steps(Path(cfg.save_dir) / "checkpoint")
    if count == "0" or resume == "auto" or not made:
        return resume, []
    if made[-1].stat().st_mtime < psutil.Process(os.getppid()).create_time():  # from an earlier launch
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
            return None, [f"resume: no checkpoint in {folder}{_nor_in(cfg)}; starting from step 0"]
        resume = str(begin_from)
    if resume == "auto":
        newest = checkpoint.newest_valid(folder)
        notes = [f"resume: skipped: {why}" for _, why in newest.skipped]
        if newest.checkpoint is None:
            raise OcrnetError(f"no checkpoint in {folder} is valid: {'; '.join(why for _, why in newest.skipped)}")
        found = newest.checkpoint
    else:
        path, meaning = checkpoint.resolve_state(resume)
        notes = [f"resume: {meaning}"] if meaning else []
        found = checkpoint.load(path)
    if "source" in found.meta:
        raise OcrnetError(
            f"{found.path} has only converted weights, from which a run cannot resume; begin from its backbone: "
            f"--set backbone.pretrained=True backbone.backbone_ckpt={found.path}"
        )
    step = found.meta["step"]
    if step > cfg.total_step:
        raise OcrnetError(
            f"{found.path} has {step} steps, but total_step is {cfg.total_step}; raise total_step to continue"
        )
    done = ": the run is complete" if step == cfg.total_step else ""
    return found, [*notes, f"resume: from {found.path}, step {step}{done}", *_changed_keys(cfg, found)]


def _nor_in(cfg: Config) -> str:
    return f" or in {cfg.train_url}" if cfg.train_url else ""


def _changed_keys(cfg: Config, found: Checkpoint) -> list[str]:
    """Return a line for each config key that differs from the run that wrote the checkpoint."""
    before = loader.with_current_keys(dict(config.flat(found.meta["config"])))
    now = dict(config.flat(config.as_dict(cfg)))
    return [f"resume: {name} is {now[name]}, was {old}" for name, old in before.items() if now.get(name, old) != old]


def _changed_versions(found: Checkpoint, versions: Mapping[str, str]) -> list[str]:
    """Return a line for each version, and for the number of threads, that differs from the checkpoint's run."""
    before = found.meta["versions"]
    return [
        f"resume: {name} is {new}, was {before[name]}; numbers may differ in their last digits"
        for name, new in versions.items()
        if before.get(name, new) != new
    ]


def _changed_batch(cfg: Config, found: Checkpoint, world: World) -> list[str]:
    """Return the line to log if the number of ranks or of crops per step differs from the checkpoint's run."""
    old = found.meta["config"]
    cards = found.meta.get("cards", 1)  # checkpoints without this key are from runs with one rank
    was = cards * old["batch_size"] * old["accumulate_steps"]
    now = world.size * cfg.batch_size * cfg.accumulate_steps
    lead = f"resume: the number of ranks is {world.size}, was {cards}: " if world.size != cards else "resume: "
    if now != was:
        return [
            f"{lead}the global batch changes to {now} crop{'s' if now > 1 else ''} a step, was {was}; "
            "the run will see a different number of crops"
        ]
    return [f"{lead}the global batch is the same"] if world.size != cards else []


def starting_state(cfg: Config, arch: Arch, found: Checkpoint | None) -> tuple[dict[str, np.ndarray], list[str]]:
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
    if found is not None:
        shapes = {name: array.shape for name, array in found.tensors.items() if "/" not in name}
        architecture.check(shapes, arch, str(found.path))
        return found.tensors, []
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
        *_unlike_recipe(cfg, global_batch),
    ]


def _unlike_recipe(cfg: Config, global_batch: int) -> list[str]:
    """Return a line if the global batch differs from base_batch_size, with the effect on the learning rate."""
    base = cfg.base_batch_size
    if base in (None, global_batch):
        return []
    times = f"{global_batch / base:.4g} times base_batch_size ({base} crops a step), for which lr_init is set"
    scaled = f"{cfg.lr_init * global_batch / base:.4g}"
    if cfg.lr_scale == "linear":
        return [f"learning rate: the global batch is {times}; its maximum is {scaled} (lr_scale linear)"]
    return [f"learning rate: the global batch is {times}; --set lr_scale=linear changes {cfg.lr_init:g} to {scaled}"]
