"""`ocrnet train`: train a network."""

from collections.abc import Sequence

from ocrnet.cli import flags
from ocrnet.cli.common import world_of_launcher
from ocrnet.cloud import pull
from ocrnet.train.dry_run import dry_run
from ocrnet.train.setup import train


def main(argv: Sequence[str]) -> int:
    """Train a network with the settings from the config file and the command line."""
    args = flags.parse("train", argv)
    world = world_of_launcher()
    cfg = flags.load_config(args)
    resume = args.options.get("resume_ckpt")
    cfg = pull.download_dataset(cfg)
    cfg, begin_from = pull.apply_ckpt_url(cfg, resume)
    if flags.as_bool(args, "dry_run"):
        return int(bool(dry_run(cfg, world=world)))
    train(cfg, resume=resume, world=world, begin_from=begin_from)
    return 0
