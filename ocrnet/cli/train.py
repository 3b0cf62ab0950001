"""`ocrnet train`: train a network."""

from collections.abc import Sequence

from ocrnet.cli import flags
from ocrnet.cli.common import world_of_launcher
from ocrnet.cloud import pull
from ocrnet.cloud.cache import Speaker
from ocrnet.train.dry_run import dry_run
from ocrnet.train.setup import train


def main(argv: Sequence[str]) -> int:
    """Train a network with the settings from the config file and the command line."""
    args = flags.parse("train", argv)
    cfg, notes = flags.load_config(args)
    world = world_of_launcher()
    resume = args.options.get("resume_ckpt")
    cfg, dataset_notes = pull.download_dataset(cfg, Speaker(world))
    cfg, begin_from, weights_notes = pull.apply_ckpt_url(cfg, resume, Speaker(world))
    notes += [*dataset_notes, *weights_notes]
    if flags.as_bool(args, "dry_run"):
        return int(bool(dry_run(cfg, notes=notes, world=world)))
    train(cfg, notes=notes, resume=resume, world=world, begin_from=begin_from)
    return 0
