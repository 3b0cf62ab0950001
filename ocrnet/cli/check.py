"""`ocrnet check`: validate every file of a dataset, and report its contents and problems."""

from collections.abc import Sequence

from ocrnet.cli import flags
from ocrnet.cloud import pull
from ocrnet.data import statistics
from ocrnet.train.setup import open_split
from ocrnet.utils.errors import OcrnetError


def main(argv: Sequence[str]) -> int:
    """Read every image and label of the training and validation splits, and report their contents and problems."""
    cfg = pull.download_dataset(flags.load_config(flags.parse("check", argv)))
    num_problems, messages = 0, set[str]()
    for split in ("train", "val"):
        print(f"{split}: {cfg.data.name} at {cfg.data.dataset_dir}", flush=True)
        try:
            dataset = open_split(cfg, split)
        except OcrnetError as error:
            if split == "train" and "data.dataset_dir" in str(error):
                raise
            repeated = str(error) in messages
            print("same problem as above\n" if repeated else f"problem: {error}\n")
            messages.add(str(error))
            num_problems += not repeated
            continue
        report = statistics.inspect(dataset, range(len(dataset)), workers=cfg.num_workers)
        print(f"{report.read} of {len(dataset)} images are valid\n{statistics.text(report, dataset.classes)}\n")
        num_problems += len(report.problems)
    print(f"{num_problems} problem{'s' if num_problems > 1 else ''}" if num_problems else "no problems")
    return int(num_problems > 0)
