"""`ocrnet export`: write a checkpoint in the format of another runtime, after comparing their predictions."""

import dataclasses
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from ocrnet import weights
from ocrnet.architecture import flops
from ocrnet.config import Config, Data
from ocrnet.data.datasets import Dataset
from ocrnet.distributed.launcher import World
from ocrnet.engines import base
from ocrnet.engines.factory import open_engine
from ocrnet.export import compare
from ocrnet.export.build import Exporter, ExportSpec
from ocrnet.export.card import card, card_path
from ocrnet.export.compare import Comparison, Sample
from ocrnet.export.formats import (
    FORMATS,
    SIDECAR_SUFFIX,
    SUFFIXES,
    WRITERS,
    ExportMetadata,
    Format,
    Input,
    Outputs,
    Precision,
    format_of,
)
from ocrnet.export.runtimes import open_session
from ocrnet.export.runtimes.engine import as_input
from ocrnet.utils.errors import OcrnetError, nearest
from ocrnet.utils.installed import check_installed
from ocrnet.utils.version import __version__
from ocrnet.weights import Weights, checkpoint
from ocrnet.weights.classes import classes_of

logger = logging.getLogger(__name__)

PRECISIONS: dict[Format, tuple[Precision, ...]] = {
    "onnx": ("float32", "int8"),
    "openvino": ("float32", "float16", "int8"),
    "torchscript": ("float32",),
    "torch_export": ("float32",),
    "mindir": ("float32",),
    "tensorrt": ("float32", "float16"),
}
ANY_SIZE: tuple[Format, ...] = ("onnx", "openvino", "torchscript")
SMALLEST = 32
CALIBRATION_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Command-line options; None selects the default of the format."""

    checkpoint: Path
    output: Path
    format: str | None = None
    precision: str | None = None
    input: str | None = None
    outputs: str | None = None
    size: tuple[int, int] | None = None
    dynamic: bool = False
    calibration: str | None = None
    images: str | None = None
    num_images: int = 8
    tolerance: float | None = None


def export(options: ExportOptions, labeled: Dataset | None) -> Comparison:
    """Write an exported file with its metadata and model card, if its predictions match those of the checkpoint.

    Args:
        options: The command-line options.
        labeled: The labeled dataset for the comparison; None uses ``options.images``, or else synthetic scenes.

    Returns:
        The comparison of the exported file with the checkpoint.

    Raises:
        OcrnetError: An option is invalid or not supported, or the predictions differ too much; nothing is written.
    """
    kind = _format(options)
    _check_choices(options, kind)
    check_writable(options.output)
    weights_file = options.output.with_suffix(".bin")
    if kind == "openvino" and weights_file.exists() and not options.output.exists():
        raise OcrnetError(
            f"--output {options.output}: {weights_file} exists, but its .xml file does not; choose another --output"
        )
    for library in WRITERS[kind]:
        check_installed(library, f"--format {kind}")
    if format_of(options.checkpoint):
        raise OcrnetError(f"{options.checkpoint} is an exported file; export the checkpoint instead")
    loaded = weights.read(options.checkpoint)
    spec = _make_spec(options, kind, loaded)
    _check_memory(loaded, spec.size or options.size or Data.crop_size)
    _check_labels(loaded, labeled)
    calibration = compare.files(options.calibration, "--calibration", CALIBRATION_IMAGES) if options.calibration else []
    samples, description = _samples(options, spec, labeled)
    with tempfile.TemporaryDirectory() as name:
        inputs = (as_input(compare.read(p, spec.size), spec.input, spec.mean, spec.std) for p in calibration)
        exporter = Exporter(spec, loaded, Path(name), inputs)
        if calibration:
            logger.info(f"calibrating on {len(calibration)} images of {options.calibration}")
        output, logits = exporter.draft()
        session = open_session(kind, output)
        logits_session = session if logits == output else open_session(kind, logits)
        logger.info(f"comparing in {session.runtime} on {description}")
        comparison = compare.compare(_reference(spec, loaded), loaded.arch, spec, session, logits_session, samples)
        compare.check(comparison, spec.precision, options.tolerance, options.output)
        metadata = _make_metadata(spec, loaded, {**comparison.as_dict(), "runtime": session.runtime, "on": description})
        files = exporter.final(output, metadata.as_dict())
        _check_same(kind, files[-1], session, spec)
        _publish(files, options.output, card(metadata, comparison, options.output.name))
    return comparison


def _format(options: ExportOptions) -> Format:
    implied = format_of(options.output)
    if options.format is None:
        if implied is None:
            endings = ", ".join(f"{suffix} ({name})" for name, suffix in SUFFIXES.items())
            raise OcrnetError(f"--output {options.output}: unknown suffix; use {endings}, or set --format")
        return implied
    for name in FORMATS:
        if options.format == name:
            if implied != name:
                raise OcrnetError(f"--output {options.output}: --format {name} needs the suffix {SUFFIXES[name]}")
            return name
    raise OcrnetError(f"--format is '{options.format}', but must be one of {', '.join(FORMATS)}, triton"
                      f"{nearest(options.format, FORMATS)}")  # fmt: skip


def _check_choices(options: ExportOptions, kind: Format) -> None:
    allowed = {
        "precision": PRECISIONS[kind],
        "input": ("normalized",) if kind == "mindir" else ("uint8", "normalized"),
        "outputs": ("logits",) if kind == "mindir" else ("labels", "probabilities", "logits"),
    }
    for name, choices in allowed.items():
        value = getattr(options, name)
        if value is not None and value not in choices:
            raise OcrnetError(
                f"--{name} is '{value}', but {kind} supports {', '.join(choices)}{nearest(str(value), choices)}"
            )
    if options.dynamic and kind not in ANY_SIZE:
        raise OcrnetError(f"--dynamic True: {kind} files have a fixed size; {', '.join(ANY_SIZE)} support any size")
    if options.precision == "int8" and options.calibration is None:
        raise OcrnetError("--precision int8 needs --calibration: a folder of representative images")
    if options.calibration is not None and options.precision != "int8":
        raise OcrnetError("--calibration has no effect without --precision int8")


def check_writable(output: Path) -> None:
    """Raise `OcrnetError` if a file cannot be written; called before the export, which takes minutes."""
    folder = output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        if output.is_dir():
            raise IsADirectoryError(0, "it is a folder; use a file name")
        if not folder.is_dir():
            raise NotADirectoryError(0, f"{folder} is not a folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OcrnetError(f"--output {output} cannot be written: {error.strerror}; choose another --output") from None


def _make_spec(options: ExportOptions, kind: Format, loaded: Weights) -> ExportSpec:
    data = loaded.meta.get("config", {}).get("data", {})
    is_mindir = kind == "mindir"
    input_format: Input = options.input or ("normalized" if is_mindir else "uint8")  # type: ignore[assignment]
    outputs: Outputs = options.outputs or ("logits" if is_mindir else "labels")  # type: ignore[assignment]
    precision: Precision = options.precision or "float32"  # type: ignore[assignment]
    return ExportSpec(
        format=kind,
        precision=precision,
        input=input_format,
        outputs=outputs,
        size=None if options.dynamic else options.size or Data.crop_size,
        mean=tuple(data.get("mean", Data.mean)),
        std=tuple(data.get("std", Data.std)),
    )


def _check_memory(loaded: Weights, size: tuple[int, int]) -> None:
    """Raise `OcrnetError` if one forward pass at ``size`` needs more than the memory of this machine.

    Without this check, the system would kill the process without a message.
    """
    needed, available = flops.predict_bytes(loaded.arch, size), psutil.virtual_memory().total
    if needed > available:
        raise OcrnetError(
            f"out of memory: --size {size[0]}x{size[1]} needs about {needed / 2**30:,.0f} GiB, but this machine has "
            f"{available / 2**30:,.0f}; reduce --size, and predict large images in windows (eval.slide)"
        )


def _check_labels(loaded: Weights, labeled: Dataset | None) -> None:
    if labeled is not None and len(labeled.classes) != loaded.arch.num_classes:
        raise OcrnetError(
            f"{loaded.path} predicts {loaded.arch.num_classes} classes, but the dataset at {labeled.root} has "
            f"{len(labeled.classes)}; use the dataset on which it was trained"
        )


def _samples(options: ExportOptions, spec: ExportSpec, labeled: Dataset | None) -> tuple[Iterator[Sample], str]:
    """Return the samples for the comparison and their description.

    If the exported file accepts any size, each unlabeled image is followed by a copy cropped to an odd size.
    """
    size = spec.size
    if labeled is not None:
        chosen = compare.spread(range(len(labeled)), options.num_images)
        pairs = (labeled.read(index) for index in chosen)
        samples = ((compare.resize_to(image, size), compare.resize_label_to(label, size)) for image, label in pairs)
        return samples, f"{len(chosen)} validation images of {labeled.root}"
    if options.images is not None:
        paths = compare.files(options.images, "--images", options.num_images)
        images, description = (compare.read(path, size) for path in paths), f"{len(paths)} images of {options.images}"
    else:
        number = min(options.num_images or 2, 2)
        shape = size or options.size or Data.crop_size
        images, description = (
            (compare.draw(shape, index) for index in range(number)),
            f"{number} synthetic street scenes",
        )
    return _add_odd_sizes(images, enabled=size is None), description + ("" if size else ", each also at an odd size")


def _add_odd_sizes(images: Iterator[np.ndarray], *, enabled: bool) -> Iterator[Sample]:
    for image in images:
        yield image, None
        if enabled:
            yield compare.crop_to_odd(image), None


def _reference(spec: ExportSpec, loaded: Weights) -> base.Engine:
    cfg = Config(engine="auto", device_target="CPU", data=Data(mean=spec.mean, std=spec.std))
    engine = open_engine(cfg, loaded.arch, world=World())
    engine.restore(loaded.tensors, 0)
    return engine


def _make_metadata(spec: ExportSpec, loaded: Weights, comparison: dict) -> ExportMetadata:
    names, palette = classes_of(loaded)
    source = {
        "file": loaded.path.name,
        "sha256": hashlib.sha256(loaded.path.read_bytes()).hexdigest(),
        "step": loaded.meta.get("step", 0),
    }
    return ExportMetadata(
        **{name: getattr(spec, name) for name in ("format", "precision", "input", "outputs", "size", "mean", "std")},
        arch=dataclasses.replace(loaded.arch, align_corners=loaded.arch.rule.align_corners),
        names=names,
        palette=palette,
        align_corners=loaded.arch.rule.align_corners,
        source=source,
        versions={"ocrnet": __version__} | {name: version(name) for name in WRITERS[spec.format]},
        comparison=comparison,
    )


def _check_same(kind: Format, path: Path, compared: compare.Session, spec: ExportSpec) -> None:
    """Raise `OcrnetError` unless the final file has metadata and its outputs are bit-identical to the draft's."""
    image = compare.draw(spec.size or (65, 129), 0)
    x = as_input(image, spec.input, spec.mean, spec.std)
    final = open_session(kind, path)
    if final.document is None or not np.array_equal(final.run(x), compared.run(x)):
        raise OcrnetError(f"adding metadata changed the predictions of the {kind} file, so it was not written")


def _publish(files: list[Path], output: Path, text: str) -> None:
    """Write the model card and the files under their final names, with the main file last.

    Delete the main file of an earlier export first, so that files of two exports are never mixed.
    """
    try:
        output.unlink(missing_ok=True)
    except OSError as error:
        raise OcrnetError(f"--output {output} cannot be written: {error.strerror}; choose another --output") from None
    card_file = card_path(output)
    checkpoint.replace(card_file, [text.encode()], flag="--output")
    for path in files:
        name = output.name + SIDECAR_SUFFIX if path.suffix == SIDECAR_SUFFIX else output.with_suffix(path.suffix).name
        checkpoint.replace(output.with_name(name), [path.read_bytes()], flag="--output")
