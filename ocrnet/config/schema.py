"""The config schema: every key with its type, default, bounds and help, and the checks that involve several keys.

`ocrnet.config.loader` builds a `Config` from YAML files and flags. A `Config` does not change after startup.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError

# Keys whose value is a local path, each with the key to set to a url instead.
LOCAL_PATHS = {
    "save_dir": "train_url",
    "data.dataset_dir": "data_url",
    "backbone.backbone_ckpt": "ckpt_url",
    "data.cache_dir": "data_url",
    "cloud.cache_dir": "data_url",
}

# Keys that may differ between the ranks of a run, because they depend on the machine: locations and resource limits.
PER_MACHINE = (*LOCAL_PATHS, "data_url", "ckpt_url", "num_workers", "prefetch_size", "max_rowsize")

URLS = ("data_url", "train_url", "ckpt_url")

EVAL_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def key(default: Any, text: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Declare a key of the config.

    Args:
        default: Default value.
        text: Help text.
        low: Inclusive lower bound of the value, or of each of its elements.
        high: Inclusive upper bound of the value, or of each of its elements.

    Returns:
        The dataclass field.
    """
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Data:
    """The dataset, and the augmentation of training crops."""

    name: Literal["cityscapes", "camvid", "folder"] = key("cityscapes", "layout of the dataset")
    dataset_dir: str = key("your cityscapes", "folder of the dataset")
    cache_dir: str | None = key(
        None, "local folder for a cache of decoded images and labels, which are faster to read; none: no cache"
    )
    crop_size: tuple[int, int] = key((512, 1024), "height and width of a training crop", low=32)
    base_size: tuple[int, int] | None = key(
        None,
        "height and width to which every image is resized before training and evaluation; none: no resizing",
        low=32,
    )
    scale_range: tuple[float, float] = key((0.5, 2.0), "range of the random scale factor", low=0.05, high=20)
    flip: bool = key(True, "flip each crop left to right with probability 0.5")
    color: bool = key(True, "randomly change brightness, contrast, saturation and hue")
    ignore_label: int = key(
        255, "id in label files to ignore, in addition to those that the layout ignores", low=0, high=255
    )
    class_weights: tuple[float, ...] | None = key(None, "weight of each class in the loss; none: equal weights", low=0)
    on_error: Literal["fail", "skip"] = key(
        "fail",
        "on an unreadable training file; fail: end the run; skip: use another image, for at most 1 in 100 images",
    )
    mean: tuple[float, float, float] = key((0.485, 0.456, 0.406), "mean of R, G, B, for pixel values from 0 to 1")
    std: tuple[float, float, float] = key(
        (0.229, 0.224, 0.225), "standard deviation of R, G, B, for pixel values from 0 to 1", low=1e-6
    )


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The HRNet backbone: its size and its initial weights."""

    width: int = key(48, "channels of the highest-resolution branch; the authors use 18, 32 and 48", low=1)
    blocks: int = key(4, "residual blocks in each branch of each module", low=1)
    modules: tuple[int, int, int] = key((1, 4, 3), "number of modules in stages 2, 3, 4", low=1)
    initializer: Literal["kaiming", "normal"] = key(
        "kaiming", "distribution of initial weights; normal: N(0, 0.001), as the authors use"
    )
    pretrained: bool = key(False, "start from the ImageNet weights in backbone_ckpt")
    backbone_ckpt: str = key("", "file with HRNet weights for ImageNet; see docs/weights.md")


@dataclass(frozen=True, kw_only=True)
class OcrHead:
    """The object-contextual representation (OCR) head."""

    channels: int = key(512, "channels of the pixel representation", low=1)
    key_channels: int = key(256, "channels of query, key and value", low=1)
    dropout: float = key(
        0.05, "probability with which dropout sets a channel before the classifier to 0", low=0, high=0.95
    )
    variant: Literal["hrnet", "openseg", "openseg_inplace", "nvidia", "mmseg", "paddleseg", "mindspore"] = key(
        "hrnet", "implementation whose resizing, padding and head layers the network follows; see docs/weights.md"
    )
    align_corners: bool | None = key(
        None, "align_corners of bilinear resizing in the network; none: the value of the variant"
    )


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss: how much each head's cross-entropy counts, and online hard example mining (OHEM)."""

    aux: float = key(0.4, "weight of the auxiliary head's loss", low=0)
    ocr: float = key(1.0, "weight of the OCR head's loss", low=0)
    ohem: bool = key(False, "online hard example mining in the OCR head, on each rank separately")
    ohem_threshold: float = key(
        0.9, "with ohem, pixels whose correct class has at least this probability are left out", low=0, high=1
    )
    ohem_min_kept: int = key(131072, "with ohem, minimum number of pixels in the loss", low=1)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Stochastic gradient descent."""

    type: Literal["sgd"] = key("sgd", "optimizer")
    momentum: float = key(0.9, "momentum", low=0, high=1)
    weight_decay: float = key(4e-4, "weight decay", low=0)
    nesterov: bool = key(False, "Nesterov momentum")
    decay: Literal["all", "no_norm", "weights_only"] = key("all", "parameters with weight decay")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Scales, flipping and windows of the forward passes that are combined to one prediction."""

    scales: tuple[float, ...] = key(
        (1.0,), "scales at which the image is predicted; the probabilities are averaged", low=0.05, high=10
    )
    flip: bool = key(False, "also predict the mirrored image and average the probabilities")
    slide: tuple[int, int] | None = key(
        None, "height and width of sliding windows, which overlap by a third; none: the whole image", low=32
    )
    max_memory: float = key(
        4.0, "GiB that `ocrnet predict` may use for one image; a larger image is split into overlapping tiles", low=0.1
    )


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Access to object stores; access keys come from the environment and are never part of the config."""

    endpoint: str = key("", "url of the obs:// or s3:// server; empty: OBS_ENDPOINT, or the AWS tools' setting")
    cache_dir: str = key(
        "", "local folder for downloads from data_url and ckpt_url; empty: /cache/ocrnet, or ~/.cache/ocrnet"
    )
    timeout: int = key(60, "seconds to wait for a response before a request fails", low=1)
    retries: int = key(8, "maximum number of retries of a failed download request", low=0)
    push_timeout: int = key(600, "maximum seconds to wait for uploads at the end of a run", low=0)
    checksum: bool = key(True, "compare MD5 and ETag of files; set to False if the bucket's encryption changes ETags")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The complete config of a run; it is stored in the run's `config.yml` and in the metadata of checkpoints."""

    device_target: Literal["CPU", "GPU", "Ascend"] | None = key(None, "device to compute on; none: the available one")
    engine: Literal["auto", "torch", "mindspore"] = key("auto", "framework that runs the network")
    mix: bool = key(False, "mixed precision")
    amp_level: Literal["auto", "O0", "O1", "O2", "O3"] = key(
        "auto", "layers that mix runs in float16 (mindspore engine); O1: convolutions, O2 and O3: all but batch norms"
    )
    ms_mode: Literal["graph", "pynative"] = key(
        "graph", "execution of the mindspore engine: compiled (graph), or operator by operator"
    )
    loss_scale: float | None = key(
        None, "fixed loss scale, if mix uses float16; none: dynamic loss scale", low=1, high=2**31
    )
    norm: Literal["sync", "local"] = key(
        "sync", "batch norm statistics; sync: over all ranks; local: of each rank separately"
    )
    fused_norm: bool = key(
        False, "in training, run batch norm, sum and ReLU as one Triton kernel on NVIDIA GPUs; not yet run on a GPU"
    )
    cuda_graph: bool = key(
        False, "run each training step as one CUDA graph, on a single NVIDIA GPU; not yet run on a GPU"
    )
    rank_timeout: float = key(600.0, "maximum seconds that a rank waits for the other ranks", low=1)
    deterministic: bool = key(False, "bit-identical results of repeated runs on a GPU, at lower speed")
    save_dir: str = key("output", "folder of the run")
    seed: int = key(1234, "seed of initial weights, sample order and augmentation", low=0)
    num_classes: int | None = key(None, "number of classes; none: that of the dataset", low=2, high=255)
    batch_size: int = key(2, "crops per rank in a micro-batch", low=1)
    accumulate_steps: int = key(1, "micro-batches per optimizer step", low=1)
    total_step: int = key(160_000, "optimizer steps of the run", low=1)
    lr_init: float = key(0.01, "highest learning rate, reached after warmup", low=0)
    end_lr: float = key(1e-6, "learning rate at the end of the run, and at the start of warmup", low=0)
    warmup_step: int = key(500, "steps of linear warmup at the start", low=0)
    schedule: Literal["linear", "poly"] = key("linear", "learning rate schedule after warmup")
    power: float = key(0.9, "exponent of the poly schedule", low=0)
    base_batch_size: int | None = key(
        None, "global batch size (crops per step over all ranks) for which lr_init is tuned", low=1
    )
    lr_scale: Literal["none", "linear"] = key(
        "none", "linear: multiply the learning rate by global batch size / base_batch_size"
    )
    clip_grad: float | None = key(None, "maximum norm of the gradient; none: no clipping", low=0)
    max_skipped: int = key(20, "stop after this many consecutive steps with a non-finite loss or gradient", low=1)
    log_interval: int = key(100, "steps between log lines", low=1)
    run_eval: bool = key(True, "evaluate during training")
    eval_interval: int = key(4000, "steps between evaluations", low=1)
    eval_samples: int = key(
        3, "validation images whose predictions are written to samples/ at each evaluation; 0: none", low=0
    )
    save_interval: int = key(2000, "steps between checkpoints", low=1)
    keep_checkpoint: int = key(5, "number of newest checkpoints to keep; 0: all", low=0)
    save_mindspore_ckpt: bool | None = key(
        None, "also write the weights of each checkpoint as a MindSpore .ckpt file; none: if the engine is mindspore"
    )
    tensorboard: bool = key(True, "write TensorBoard files to SAVE_DIR/tensorboard")
    trackers: tuple[Literal["wandb", "mlflow"], ...] = key((), "services to which the metrics are sent")
    project: str = key("ocrnet", "project (W&B) or experiment (MLflow) of the trackers")
    run_name: str = key("", "name of the run in the trackers; empty: the name of the folder save_dir")
    min_miou: float | None = key(
        None, "mIoU (0 to 1) below which `eval` exits with status 1; none: no minimum", low=0, high=1
    )
    num_workers: int = key(
        4, "worker processes per rank that read and augment samples; 0: the rank does it itself", low=0
    )
    prefetch_size: int = key(2, "batches that each worker prefetches", low=1)
    max_rowsize: int = key(16, "shared memory per sample in MB (mindspore engine only)", low=1)
    enable_modelarts: bool = key(
        False, "set on ModelArts: flags that ModelArts adds are ignored; with train_url, runs resume automatically"
    )
    data_url: str = key(
        "",
        "dataset folder or .tar; an obs://, s3:// or file:// url is downloaded, a path without scheme is used in place",
    )
    train_url: str = key(
        "", "folder to which results are uploaded, and where --resume_ckpt auto searches: obs://, s3://, or a path"
    )
    ckpt_url: str = key(
        "", "train: ImageNet weights of the backbone, or a checkpoint to start from; eval: a checkpoint or its folder"
    )
    loss: Loss = Loss()
    data: Data = Data()
    backbone: Backbone = Backbone()
    ocr_head: OcrHead = OcrHead()
    optimizer: Optimizer = Optimizer()
    eval: Eval = Eval()
    cloud: Cloud = Cloud()


def schema(node: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield every key of the schema as (dotted name, dataclass field), in the order of declaration."""
    for item in dataclasses.fields(node):
        if dataclasses.is_dataclass(item.type):
            yield from schema(item.type, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + item.name, item


def value(cfg: Config, name: str) -> Any:
    """Return the value of a dotted key name."""
    node: Any = cfg
    for part in name.split("."):
        node = getattr(node, part)
    return node


def check(cfg: Config) -> None:
    """Raise `OcrnetError` if values of keys contradict each other."""
    for problem in _contradictions(cfg):
        raise OcrnetError(problem)


def _contradictions(cfg: Config) -> Iterator[str]:
    if cfg.warmup_step > cfg.total_step:
        yield f"warmup_step {cfg.warmup_step} is more than total_step {cfg.total_step}; lower one or raise the other"
    if cfg.amp_level not in ("auto", "O0") and not cfg.mix:
        yield f"amp_level {cfg.amp_level} has no effect without mixed precision; add --mix True, or remove amp_level"
    if cfg.end_lr > cfg.lr_init:
        yield f"end_lr {cfg.end_lr} is above lr_init {cfg.lr_init}; lower end_lr or raise lr_init"
    if cfg.lr_scale == "linear" and cfg.base_batch_size is None:
        yield "lr_scale linear needs base_batch_size; set it to the crops per step for which lr_init is tuned"
    if cfg.data.scale_range[0] > cfg.data.scale_range[1]:
        yield f"data.scale_range {list(cfg.data.scale_range)} must be [low, high] with low <= high"
    if cfg.loss.aux == cfg.loss.ocr == 0:
        yield "loss.aux and loss.ocr are both 0, so nothing is trained; raise one of them"
    if not cfg.eval.scales:
        yield "eval.scales is empty; use [1.0] for the original size"
    if cfg.optimizer.nesterov and cfg.optimizer.momentum == 0:
        yield "optimizer.nesterov needs optimizer.momentum above 0; raise it"
    if cfg.clip_grad == 0:
        yield "clip_grad 0 sets every gradient to 0; use none for no clipping"
    if cfg.backbone.pretrained and not cfg.backbone.backbone_ckpt:
        yield (
            "backbone.pretrained is True but backbone.backbone_ckpt is empty; download HRNet ImageNet weights of this "
            "width from the authors' HRNet-Image-Classification page and set backbone.backbone_ckpt to the file"
        )
    height, width = cfg.data.crop_size
    if cfg.batch_size * math.ceil(height / 32) * math.ceil(width / 32) == 1:
        yield (
            f"data.crop_size [{height}, {width}] with batch_size 1: batch norm would get only one value per channel in "
            "the branch at 1/32 of the resolution; raise one of them"
        )
    yield from _class_weight_problems(cfg)
    urls_by_key = {name: text for name in URLS if (text := getattr(cfg, name))}
    yield from urls.problems(urls_by_key, cfg.cloud.endpoint)
    if cfg.train_url and "://" not in cfg.train_url.removeprefix("file://"):
        upload_path = Path(cfg.train_url.removeprefix("file://")).resolve()
        if upload_path.is_relative_to(Path(cfg.save_dir).resolve()):
            yield (
                f"train_url {cfg.train_url} is inside save_dir {cfg.save_dir}, which is uploaded to it; set train_url "
                "to another folder"
            )
    for name, instead in LOCAL_PATHS.items():
        if "://" in (value(cfg, name) or ""):
            yield f"{name} must be a local path, not a url; set {instead} to the url"


def _class_weight_problems(cfg: Config) -> Iterator[str]:
    weights = cfg.data.class_weights
    if weights is None or cfg.num_classes is None:
        return
    if len(weights) != cfg.num_classes:
        yield (
            f"data.class_weights has {len(weights)} values but num_classes is {cfg.num_classes}; "
            "give one weight per class, or none for equal weights"
        )
    if not any(weights):
        yield "data.class_weights are all 0, so nothing is trained; raise at least one"


def with_classes(cfg: Config, num_classes: int, source: str) -> Config:
    """Set ``num_classes`` to the dataset's number of classes, and check the config.

    Args:
        cfg: The config.
        num_classes: Number of classes of the dataset.
        source: Name of the dataset in error messages.

    Returns:
        The config with ``num_classes``.

    Raises:
        OcrnetError: ``cfg.num_classes`` is set to another number, or keys contradict each other.
    """
    if cfg.num_classes not in (None, num_classes):
        raise OcrnetError(
            f"num_classes is {cfg.num_classes} but {source} has {num_classes} classes; set num_classes: {num_classes}"
        )
    cfg = dataclasses.replace(cfg, num_classes=num_classes)
    check(cfg)
    return cfg


def as_dict(cfg: Config) -> dict[str, Any]:
    """Return the config as nested dicts and lists, which YAML and JSON can represent."""

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: plain(v) for k, v in node.items()}
        return list(node) if isinstance(node, tuple) else node

    return plain(dataclasses.asdict(cfg))


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dicts as pairs of dotted name and value, for example ``("data.flip", True)``."""
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from flat(node, f"{prefix}{name}.")
        else:
            yield prefix + name, node


def of_all_ranks(cfg: Config) -> dict[str, str]:
    """Return the keys whose values must be equal on all ranks of a run, each with its value as text."""
    # mutation: same-config-on-all-ranks
    return {name: str(value) for name, value in flat(as_dict(cfg)) if name not in PER_MACHINE}


def table() -> str:
    """Return the schema as a Markdown table: key, default, help."""
    rows = [
        f"| `{name}` | `{_format_default(item.default)}` | {item.metadata['help']}{_format_choices(item)} |"
        for name, item in schema()
    ]
    return "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *rows])


def _format_choices(item: dataclasses.Field) -> str:
    kinds = (item.type, *typing.get_args(item.type))
    names = [name for kind in kinds if typing.get_origin(kind) is Literal for name in typing.get_args(kind)]
    return f" ({', '.join(names)})" if names else ""


def _format_default(default: Any) -> str:
    if isinstance(default, tuple):
        return f"[{', '.join(map(str, default))}]"
    return "none" if default is None else str(default) or '""'


def in_bounds(number: float, item: dataclasses.Field) -> bool:
    """Return whether a number is finite and within the bounds of its key."""
    low, high = item.metadata["low"], item.metadata["high"]
    return math.isfinite(number) and (low is None or number >= low) and (high is None or number <= high)
