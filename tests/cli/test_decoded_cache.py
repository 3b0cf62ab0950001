"""Training with `data.cache_dir` gives the same result as without it, whether a pair was cached before or not."""

from commands import SMALL, assert_identical_runs, run

from ocrnet.data.datasets import open_dataset
from ocrnet.data.datasets.cache import prepare

W48 = "config/ocrnet/config_ocrnet_hrw48_16k.yml"
WITH_WORKERS = [pair.replace("num_workers=0", "num_workers=2") for pair in SMALL]


def test_a_run_with_a_cache_matches_a_run_without_one(w48_run, cityscapes, tmp_path):
    cache = tmp_path / "cache"
    splits = {split: open_dataset("cityscapes", cityscapes, split) for split in ("train", "val")}
    sets = prepare(str(cache), splits)
    for split, i in (("train", 0), ("train", 3), ("train", 4), ("val", 1)):
        sets[split].read(i)
    result = run("train.py", "--config", W48, "--device_target", "CPU", "--mix", "True", "--save_dir", tmp_path / "run",
                 "--set", f"data.dataset_dir={cityscapes}", f"data.cache_dir={cache}", *WITH_WORKERS)  # fmt: skip
    assert f"cache: 4 of 9 pairs are cached in {cache}; the others need about " in result.stdout
    assert result.stderr == ""
    assert_identical_runs(tmp_path / "run", w48_run)
    assert {path.name for path in cache.iterdir()} == {
        sets[s].cache_file(i).name for s in sets for i in range(len(sets[s]))
    }
