"""The real command with `data.cache_dir`: the same numbers as without it, cold and warm."""

from commands import SMALL, assert_same_end, run

W48 = "config/ocrnet/config_ocrnet_hrw48_16k.yml"
WITH_WORKERS = [pair.replace("num_workers=0", "num_workers=2") for pair in SMALL]


def test_a_run_with_a_cache_is_the_run_without_one(w48_run, cityscapes, tmp_path):
    cache = tmp_path / "cache"
    command = ("train.py", "--config", W48, "--device_target", "CPU", "--mix", "True")
    data = ("--set", f"data.dataset_dir={cityscapes}", f"data.cache_dir={cache}", *WITH_WORKERS)
    for name, there in (("cold", f"cache: 0 of 9 pairs are decoded in {cache}; "), ("warm", "cache: 9 of 9 pairs ")):
        said = run(*command, "--save_dir", tmp_path / name, *data)
        assert there in said.stdout
        assert said.stderr == ""
        assert_same_end(tmp_path / name, w48_run)
    assert len(list(cache.glob("*.pair"))) == len(list(cache.iterdir())) == 9
