"""The console command `ocrnet`: its commands, and how they end."""

import argparse
import contextlib
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ocrnet import (
    __version__,
    bench,
    check,
    checkpoint,
    completion,
    config,
    convert,
    doctor,
    exported,
    flags,
    ranks,
    serve,
    submit,
    weights,
)
from ocrnet.cloud import pull, urls
from ocrnet.cloud import resume as cloud_resume
from ocrnet.cloud.cache import Speaker
from ocrnet.cloud.push import RESULTS, Push, Pushing, check_writable
from ocrnet.cloud.store import open_store
from ocrnet.config import Config
from ocrnet.datasets import Dataset, decoded, synthetic
from ocrnet.errors import OcrnetError, nearest, printable
from ocrnet.evaluate import evaluate
from ocrnet.export import Wish, export, triton
from ocrnet.images import write_png
from ocrnet.metrics import Scores, as_dict, constant_answer, table
from ocrnet.predict import command as predict_command
from ocrnet.report import command as report
from ocrnet.run import Run, core_versions, silence
from ocrnet.signals import Stopped, sent_when_parent_dies
from ocrnet.training import VAL, differences, identities, open_split, rehearse, train
from ocrnet.visual import side_by_side
from ocrnet.world import World, read_world

PUSHED_BY_EVAL = (*RESULTS, "visualize/*")

USAGE = """usage: ocrnet COMMAND [FLAGS]

commands:
  train      train a network             ocrnet train --config config/ocrnet/config_ocrnet_hrw48_16k.yml --mix True
  eval       score a checkpoint          ocrnet eval --config CONFIG --checkpoint_path output
  predict    segment images and videos   ocrnet predict photo.jpg --checkpoint_path output
  submit     zip for Cityscapes' server  ocrnet submit --config CONFIG --checkpoint_path output --output test.zip
  serve      a web page and an HTTP API  ocrnet serve --checkpoint_path output
  export     write it for a runtime      ocrnet export --checkpoint_path output --output ocrnet.onnx
  convert    weights from or to others   ocrnet convert --input model.pdparams --output model.safetensors
  bench      time checkpoints and files  ocrnet bench --checkpoint_path output ocrnet.onnx
  report     a run as a page             ocrnet report output
  check      look through a dataset      ocrnet check --config CONFIG --set data.dataset_dir=FOLDER
  doctor     look at this machine        ocrnet doctor
  synthetic  write a made-up Cityscapes  ocrnet synthetic scenes
  completion flags by TAB in your shell  ocrnet completion bash

ocrnet COMMAND --help lists the flags of a command. --debug shows the traceback of an error.
ocrnet --version says which one this is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status.

    0; 1 where something that was looked at is not as it should be; 2 after a mistake, which is said on stderr; 143,
    130, 129 or 138 after SIGTERM, SIGINT, SIGHUP or SIGUSR1; 141 where nobody read on.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    argv = [token for token in given if token != "--debug"]
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE)
            return 0 if argv else 2
        if argv[0] == "--version":
            print(f"ocrnet {__version__}")
            return 0
        if argv[0] not in COMMANDS:
            raise OcrnetError(f"unknown command '{argv[0]}'{nearest(argv[0], COMMANDS)} ({', '.join(COMMANDS)})")
        return COMMANDS[argv[0]](argv[1:])
    except OcrnetError as error:
        if "--debug" in given:
            traceback.print_exc()
        print(f"error: {_rank()}{printable(urls.scrub(str(error)), lines=True)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        silence()
        return 128 + 13
    except Stopped as stop:
        return stop.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Says a mistake as the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise OcrnetError(f"{message} ({self.prog} --help)")


def _world() -> World:
    """Return where this process stands among the ranks; one that outlives its launcher is to stop, and save."""
    world = read_world()
    if world.size > 1 and world.launcher in ("mpirun", "msrun", "torchrun"):
        # mutation: end-with-launcher
        sent_when_parent_dies(signal.SIGTERM)
    return world


def _rank() -> str:
    """Return who speaks, where a launcher started several processes."""
    with contextlib.suppress(OcrnetError):  # the launcher's variables themselves may be what is wrong
        world = read_world()
        if world.size > 1:
            return f"rank {world.rank}: "
    return ""


def _nobody_reads() -> bool:
    """Say whether the reader of stdout is gone, as in `ocrnet check | head`."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in pipe.poll(0))


def run_train(argv: Sequence[str]) -> int:
    """Train as the command line says."""
    args = flags.parse("train", argv)
    cfg, notes = flags.load_config(args)
    world = _world()
    resume = args.options.get("resume_ckpt")
    cfg, pulled = pull.dataset(cfg, Speaker(world))
    cfg, begin_from, taken = pull.begin_from(cfg, resume, Speaker(world))
    notes += [*pulled, *taken]
    if flags.as_bool(args, "dry_run"):
        return int(bool(rehearse(cfg, notes=notes, world=world)))
    train(cfg, notes=notes, resume=resume, world=world, begin_from=begin_from)
    return 0


def run_eval(argv: Sequence[str]) -> int:
    """Score a checkpoint on the validation split; the architecture comes from the file."""
    args = flags.parse("eval", argv)
    cfg, notes = flags.load_config(args)
    show = flags.as_bool(args, "visualize")
    world = _world()
    path, meaning = checkpoint.resolve(_checkpoint_to_score(args, cfg, world))
    cfg, pulled = pull.dataset(cfg, Speaker(world))
    given = exported.read(path, cfg)
    found = exported.as_weights(given)
    dataset = open_split(cfg, "val")
    notes += [*pulled, meaning] if meaning else pulled
    notes += [*found.notes, *differences(cfg, found.arch, path)]
    cfg, said = convert.normalised(cfg, found)
    notes += said
    if found.arch.num_classes != len(dataset.classes):
        raise OcrnetError(
            f"{path} answers {found.arch.num_classes} classes, but {cfg.data.name} at {cfg.data.dataset_dir} has "
            f"{len(dataset.classes)}; give the dataset it was trained for"
        )
    sets, room = decoded.prepare(cfg.data.cache_dir, {VAL: dataset})
    store = open_store(urls.parse("train_url", cfg.train_url), cfg.cloud) if cfg.train_url else None
    with Pushing(cfg.cloud) as pushing:
        engine = exported.open_engine(cfg, given, world=world)
        try:
            if world.size > 1:
                seen = {"checkpoint": weights.identity(found), **config.of_all_ranks(cfg)}
                ranks.check_same(engine, seen | identities(sets))
            with ranks.together(engine):
                engine.restore(found.tensors, found.meta.get("step", 0))
                run = Run(cfg.save_dir, rank=world.rank, name="eval")
                if store is not None and run.writes:
                    check_writable(store, cfg.cloud, run.say)
                    cloud_resume.bring_results(cfg, store, run.say)
                    pushing.begin(Push(store, run.folder, cfg.cloud, keep=0, patterns=PUSHED_BY_EVAL), run.say)
                for line in [*engine.decisions, *notes, *_what(cfg, path, dataset), *room]:
                    run.say(line)
                shower = _shower(dataset, run.folder / "visualize") if show else None
            scores = evaluate(engine, sets[VAL], cfg, how=cfg.eval, show=shower, say=run.say)
        finally:
            engine.close()
        how = {"scales": list(cfg.eval.scales), "flip": cfg.eval.flip, "slide": cfg.eval.slide}
        row = {"kind": "eval", "step": found.meta.get("step", 0), "checkpoint": str(path), **how, **as_dict(scores)}
        run.record(row | {"versions": core_versions() | dict(engine.versions)})
        return _verdict(cfg, scores, dataset, run)


def _checkpoint_to_score(args: flags.Args, cfg: Config, world: World) -> str | Path:
    given = args.options.get("checkpoint_path")
    if given is not None and cfg.ckpt_url:
        raise OcrnetError(f"--checkpoint_path {given} and ckpt_url {cfg.ckpt_url} both name a checkpoint; keep one")
    return pull.weights_file(cfg, Speaker(world)) or flags.required(args, "checkpoint_path")


def _verdict(cfg: Config, scores: Scores, dataset: Dataset, run: Run) -> int:
    """Say the scores, and return the exit status: 1 where they are not what the config expects."""
    run.say(table(scores))
    answer, mean_iou = constant_answer(scores)
    run.say(f"for comparison: always answering '{dataset.classes.names[answer]}' has mIoU {100 * mean_iou:.2f}")
    if cfg.expect is None:
        return 0
    verdict = "reached" if scores.mean_iou >= cfg.expect else "NOT reached"
    run.say(f"expect: mIoU of at least {100 * cfg.expect:.2f}: {verdict}")
    return int(not scores.mean_iou >= cfg.expect)


def _what(cfg: Config, path: Path, dataset: Dataset) -> list[str]:
    windows = "whole image" if cfg.eval.slide is None else "windows of {}x{}".format(*cfg.eval.slide)
    return [
        f"checkpoint: {path}",
        f"images: {len(dataset)} of {cfg.data.name} val at {cfg.data.dataset_dir}",
        f"scales: {list(cfg.eval.scales)}, flip: {cfg.eval.flip}, {windows}",
    ]


def _shower(dataset: Dataset, folder: Path) -> Callable:
    folder.mkdir(parents=True, exist_ok=True)

    def show(index: int, image, prediction, truth) -> None:  # type: ignore[no-untyped-def]
        classes = dataset.classes
        picture = side_by_side(image, prediction, truth, palette=classes.palette, names=classes.names)
        write_png(folder / f"{dataset.name(index).replace('/', '_')}.png", picture)

    return show


def run_export(argv: Sequence[str]) -> int:
    """Write a checkpoint for another runtime, run it there, and compare its answers with the checkpoint's."""
    args = flags.parse("export", argv)
    options = args.options
    path, meaning = checkpoint.resolve(flags.required(args, "checkpoint_path"))
    wish = Wish(
        checkpoint=path,
        output=Path(flags.required(args, "output")),
        size=flags.as_size(args, "size", None),
        dynamic=flags.as_bool(args, "dynamic"),
        num_images=flags.as_number(args, "num_images", Wish.num_images),
        tolerance=flags.as_number(args, "tolerance", None),
        **{name: options.get(name) for name in ("format", "precision", "input", "outputs", "calibration", "images")},
    )
    if "config" not in options and args.given:
        raise OcrnetError(f"--set {next(iter(args.given))}: no effect on export without --config")
    labelled = open_split(flags.load_config(args)[0], "val") if "config" in options else None
    for line in ([meaning] if meaning else []) + [f"checkpoint: {path}"]:
        print(line, flush=True)
    write = triton.export_repository if wish.format == triton.FORMAT else export
    figures = write(wish, labelled, lambda line: print(line, flush=True))
    print(f"wrote {wish.output} and its card: {figures.text()}")
    return 0


def run_convert(argv: Sequence[str]) -> int:
    """Turn weights of other implementations into a checkpoint, or a checkpoint into theirs."""
    args = flags.parse("convert", argv)
    for name in args.given:
        raise OcrnetError(f"--set {name}: no effect on convert; the network comes from the weights")
    source, meaning = checkpoint.resolve(flags.required(args, "input"))
    output = Path(flags.required(args, "output"))
    partial = flags.as_bool(args, "allow_partial")
    lines = convert.convert(source, output, to=args.options.get("to"), allow_partial=partial)
    print("\n".join([meaning, *lines] if meaning else lines))
    return 0


def _say(line: str) -> None:
    print(printable(line, lines=True), flush=True)


def run_report(argv: Sequence[str]) -> int:
    """Write what runs reached as one HTML file, and of a single run a model card; or follow runs under way."""
    args = flags.parse("report", argv)
    path = args.options.get("checkpoint_path")
    output = args.options.get("output")
    order = report.Order(
        runs=[Path(run) for run in args.inputs],
        output=Path(output) if output else None,
        wish=report.Wish(args.given, checkpoint.resolve(path)[0] if path else None, flags.as_number(args, "images", 0)),
        curves_only=flags.as_bool(args, "curves_only"),
    )
    if flags.as_bool(args, "watch"):
        print(f"wrote {printable(str(report.watch(order, _say)))}")
        return 0
    written = report.make(order, _say)
    print(f"wrote {printable(' and '.join(map(str, written)))}")
    return 0


def run_check(argv: Sequence[str]) -> int:
    """Read every image and label of the training and validation split, and say what they hold."""
    cfg, _ = flags.load_config(flags.parse("check", argv))
    cfg, pulled = pull.dataset(cfg, Speaker(World()))
    for line in pulled:
        print(line, flush=True)
    wrong, told = 0, set[str]()
    for split in ("train", "val"):
        print(f"{split}: {cfg.data.name} at {cfg.data.dataset_dir}", flush=True)
        try:
            dataset = open_split(cfg, split)
        except OcrnetError as error:
            if split == "train" and "data.dataset_dir" in str(error):
                raise
            again = str(error) in told
            print("the same problem\n" if again else f"problem: {error}\n")
            told.add(str(error))
            wrong += not again
            continue
        report = check.inspect(
            dataset, range(len(dataset)), workers=cfg.num_workers, say=lambda line: print(line, flush=True)
        )
        print(f"{report.read} of {len(dataset)} images are sound\n{check.text(report, dataset.classes)}\n")
        wrong += len(report.problems)
    print(f"{wrong} problem{'s' if wrong > 1 else ''}" if wrong else "no problems")
    return int(wrong > 0)


def run_doctor(argv: Sequence[str]) -> int:
    """Look at this machine: versions, memory, devices, and one real step on each."""
    parser = _Parser(prog="ocrnet doctor", description=run_doctor.__doc__, allow_abbrev=False)
    parser.parse_args(argv)
    ill = False
    for finding in doctor.examine():
        print(doctor.text(finding), flush=True)
        ill = ill or finding.ok is False
    print("something needs mending: see !! above" if ill else "all is well")
    return int(ill)


def run_synthetic(argv: Sequence[str]) -> int:
    """Write procedural street scenes in the layout of Cityscapes."""
    parser = _Parser(prog="ocrnet synthetic", description=run_synthetic.__doc__, allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="where to write; must be empty or new")
    for split, count in (("train", 16), ("val", 4), ("test", 2)):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"scenes in {split} (default {count})")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    synthetic.write(args.folder, train=args.train, val=args.val, test=args.test, size=tuple(args.size), seed=args.seed)
    print(f"wrote {args.train} train, {args.val} val and {args.test} test scenes to {args.folder}")
    return 0


def run_completion(argv: Sequence[str]) -> int:
    """Print what makes a shell complete commands, flags, values and files."""
    parser = _Parser(prog="ocrnet completion", description=run_completion.__doc__, allow_abbrev=False)
    parser.add_argument("shell", choices=completion.SHELLS)
    print(completion.script(parser.parse_args(argv).shell, COMMANDS, USAGE), end="")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": run_train,
    "eval": run_eval,
    "predict": predict_command.main,
    "submit": submit.main,
    "serve": serve.main,
    "export": run_export,
    "convert": run_convert,
    "bench": bench.main,
    "report": run_report,
    "check": run_check,
    "doctor": run_doctor,
    "synthetic": run_synthetic,
    "completion": run_completion,
}
