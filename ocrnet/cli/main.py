"""The console command `ocrnet`, which runs one of its subcommands."""

import logging
import select
import sys
import traceback
from collections.abc import Callable, Sequence

from ocrnet.cli import (
    bench,
    check,
    completion,
    convert,
    doctor,
    export,
    predict,
    report,
    serve,
    submit,
    synthetic,
    train,
)
from ocrnet.cli import eval as eval_command
from ocrnet.cli.common import Parser, rank_prefix
from ocrnet.utils import log, urls
from ocrnet.utils.errors import OcrnetError, nearest, printable
from ocrnet.utils.signals import Stopped
from ocrnet.utils.version import __version__

USAGE = """usage: ocrnet COMMAND [FLAGS]

commands:
  train      train a network             ocrnet train --config config/ocrnet/config_ocrnet_hrw48_16k.yml --mix True
  eval       evaluate a checkpoint       ocrnet eval --config CONFIG --checkpoint_path output
  predict    segment images and videos   ocrnet predict photo.jpg --checkpoint_path output
  submit     zip for Cityscapes' server  ocrnet submit --config CONFIG --checkpoint_path output --output test.zip
  serve      serve over HTTP             ocrnet serve --checkpoint_path output
  export     export for a runtime        ocrnet export --checkpoint_path output --output ocrnet.onnx
  convert    convert weights             ocrnet convert --input model.pdparams --output model.safetensors
  bench      time checkpoints and files  ocrnet bench --checkpoint_path output ocrnet.onnx
  report     write a report on a run     ocrnet report output
  check      validate a dataset          ocrnet check --config CONFIG --set data.dataset_dir=FOLDER
  doctor     check this machine          ocrnet doctor
  synthetic  write synthetic scenes      ocrnet synthetic scenes
  completion print shell completion      ocrnet completion bash

ocrnet COMMAND --help lists the flags of a command. Every command accepts --quiet (print only results, warnings and
errors), --verbose (print debug messages) and --debug (show the traceback of an error).
ocrnet --version prints the version."""


GLOBAL_FLAGS = ("--quiet", "--verbose", "--debug")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    The status is 0 for success; 1 if a check found a problem; 2 for a user error, which is printed to stderr; 143,
    130, 129 or 138 after SIGTERM, SIGINT, SIGHUP or SIGUSR1; 141 if the process that reads stdout closed the pipe.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    argv = [token for token in tokens if token not in GLOBAL_FLAGS]
    level = log.RESULT if "--quiet" in tokens else logging.DEBUG if "--verbose" in tokens else logging.INFO
    log.open_console(level, needs_reader=argv[:1] not in (["train"], ["eval"]))
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
        if "--debug" in tokens:
            traceback.print_exc()
        print(f"error: {rank_prefix()}{printable(urls.scrub(str(error)), lines=True)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        log.redirect_stdout_to_devnull()
        return 128 + 13
    except Stopped as stop:
        return stop.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _stdout_is_closed() -> bool:
    """Return whether the process that reads stdout has closed the pipe, as `head` does in `ocrnet check | head`."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in pipe.poll(0))


def run_completion(argv: Sequence[str]) -> int:
    """Print a script with which a shell completes commands, flags, values and files."""
    parser = Parser(prog="ocrnet completion", description=run_completion.__doc__, allow_abbrev=False)
    parser.add_argument("shell", choices=completion.SHELLS, help="shell to write the script for")
    print(completion.script(parser.parse_args(argv).shell, COMMANDS, USAGE), end="")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train.main,
    "eval": eval_command.main,
    "predict": predict.main,
    "submit": submit.main,
    "serve": serve.main,
    "export": export.main,
    "convert": convert.main,
    "bench": bench.main,
    "report": report.main,
    "check": check.main,
    "doctor": doctor.main,
    "synthetic": synthetic.main,
    "completion": run_completion,
}
