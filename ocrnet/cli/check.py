"""`ocrnet check`: read a whole dataset and report its contents and problems."""

from collections.abc import Sequence

from ocrnet.cli import flags
from ocrnet.cloud import pull
from ocrnet.cloud.cache import Speaker
from ocrnet.data import statistics
from ocrnet.distributed.launcher import World
from ocrnet.train.setup import open_split
from ocrnet.utils.errors import OcrnetError


def main(argv: Sequence[str]) -> int:
    """Read every image and label of the training and validation splits, and report their contents and problems."""
    cfg, _ = flags.load_config(flags.parse("check", argv))
    cfg, pulled = pull.download_dataset(cfg, Speaker(World()))
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
            print("same problem as above\n" if again else f"problem: {error}\n")
            told.add(str(error))
            wrong += not again
            continue
        report = statistics.inspect(
            dataset, range(len(dataset)), workers=cfg.num_workers, say=lambda line: print(line, flush=True)
        )
        print(f"{report.read} of {len(dataset)} images are valid\n{statistics.text(report, dataset.classes)}\n")
        wrong += len(report.problems)
    print(f"{wrong} problem{'s' if wrong > 1 else ''}" if wrong else "no problems")
    return int(wrong > 0)
