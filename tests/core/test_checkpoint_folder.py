"""Checkpoints in a folder: crashes and full disks while saving, file names, listing, and how a path is resolved."""

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint


def saved(folder, step, width=18):
    path = folder / checkpoint.file_name(width, step)
    checkpoint.save(path, {"x": np.arange(4.0)}, {"step": step})
    return path


def run_python(code, *args, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **kwargs)


SAVE_REPEATEDLY = """
    import sys
    import numpy as np
    from ocrnet.weights import checkpoint
    step = 0
    while True:
        checkpoint.save(sys.argv[1], {"x": np.full(1_000_000, step, np.float32)}, {"step": step})
        print(step, flush=True)
        step += 1
"""


LOAD_FOR_FIVE_SECONDS = """
    import sys, time
    from ocrnet.weights import checkpoint
    steps, end = set(), time.monotonic() + 5
    while time.monotonic() < end:
        read = checkpoint.load(sys.argv[1])
        assert (read.tensors["x"] == read.meta["step"]).all()
        steps.add(read.meta["step"])
    print(len(steps))
"""


def test_a_reader_finds_a_complete_checkpoint_at_any_moment_of_saving(tmp_path):
    path = tmp_path / checkpoint.file_name(18, "best")
    writer = run_python(SAVE_REPEATEDLY, path)
    writer.stdout.readline()
    # Read in a separate process, as a truncated memory map ends it with SIGBUS.
    reader = run_python(LOAD_FOR_FIVE_SECONDS, path)
    steps, _ = reader.communicate()
    writer.kill()
    writer.communicate()
    assert reader.returncode == 0
    assert int(steps) > 10, "too few saves happened for this test to be meaningful"


def test_a_kill_while_saving_leaves_a_checkpoint_that_loads(tmp_path):
    path = tmp_path / checkpoint.file_name(18, "best")
    moments, kills, leftovers = random.Random(5), 0, 0
    while kills < 10 or (leftovers == 0 and kills < 200):
        kills += 1
        process = run_python(SAVE_REPEATEDLY, path)
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=moments.uniform(0.0, 0.08))
        process.kill()
        last = [0, *map(int, process.communicate()[0].split())][-1]
        assert process.returncode == -signal.SIGKILL
        read = checkpoint.load(path)
        assert read.meta["step"] in (last, last + 1)
        assert (read.tensors["x"] == read.meta["step"]).all()
        leftovers += len(checkpoint.clean(tmp_path))
        assert os.listdir(tmp_path) == [path.name]
    assert leftovers > 0, "no kill interrupted a save, so this test is not meaningful"


SAVE_WITH_A_FILE_SIZE_LIMIT = """
    import resource, signal, sys
    import numpy as np
    from ocrnet.weights import checkpoint
    from ocrnet.utils.errors import OcrnetError
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    if sys.argv[2] == "die":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        checkpoint.save(sys.argv[1], {"x": np.zeros(100_000)}, {"step": 2})
    except OcrnetError as error:
        print(error)
"""


@pytest.mark.parametrize("name", ["new", "old"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, name):
    old = saved(tmp_path, 1)
    before = old.read_bytes()
    path = old if name == "old" else tmp_path / "new.safetensors"
    message, _ = run_python(SAVE_WITH_A_FILE_SIZE_LIMIT, path, "report").communicate()
    assert (
        message == f"cannot write checkpoint {path}: File too large; free some space there or choose another save_dir\n"
    )
    assert os.listdir(tmp_path) == [old.name]
    assert old.read_bytes() == before


def test_dying_while_writing_leaves_the_old_file_and_a_temporary_one_that_clean_removes(tmp_path):
    old = saved(tmp_path, 1)
    process = run_python(SAVE_WITH_A_FILE_SIZE_LIMIT, old, "die")
    process.communicate()
    assert process.returncode == -signal.SIGXFSZ
    assert checkpoint.load(old).meta["step"] == 1
    (leftover,) = set(tmp_path.iterdir()) - {old}
    assert 0 < leftover.stat().st_size <= 100_000
    assert checkpoint.steps(tmp_path) == [old]
    assert checkpoint.clean(tmp_path) == [leftover]
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left_on_device_is_reported(tmp_path):
    path = tmp_path / "a.safetensors"
    temporary = tmp_path / f".a.safetensors.{os.getpid()}.ocrnet-tmp"
    temporary.symlink_to("/dev/full")
    with pytest.raises(OcrnetError, match=r"a\.safetensors: No space left on device"):
        checkpoint.save(path, {"x": np.zeros(9)}, {})
    assert os.listdir(tmp_path) == []


def test_the_mode_of_the_file_follows_the_umask(tmp_path):
    reference = tmp_path / "reference"
    reference.touch()
    assert saved(tmp_path, 1).stat().st_mode == reference.stat().st_mode


def test_file_names_are_the_documented_ones():
    assert checkpoint.file_name(48, 160000) == "OCRNet_hrnet_seg_w48_160000_rank0.safetensors"
    assert checkpoint.file_name(18, "best") == "OCRNet_hrnet_seg_w18_best_rank0.safetensors"
    assert checkpoint.step_of(f"run/checkpoint/{checkpoint.file_name(32, 0)}") == 0
    assert checkpoint.step_of(Path(checkpoint.file_name(32, 123))) == 123
    for other in (
        checkpoint.file_name(48, "best"),
        "x.safetensors",
        checkpoint.file_name(48, 5) + ".tmp",
        "w48_5_rank0",
    ):
        assert checkpoint.step_of(other) is None


def test_steps_sort_as_numbers(tmp_path):
    assert checkpoint.steps(tmp_path / "missing") == []
    paths = [saved(tmp_path, step) for step in (1000, 20, 3)]
    saved(tmp_path, "best")
    assert checkpoint.steps(tmp_path) == paths[::-1]


def test_newest_valid_skips_damaged_checkpoints(tmp_path):
    assert checkpoint.newest_valid(tmp_path).checkpoint is None
    one, two, three = (saved(tmp_path, step) for step in (9, 10, 11))
    assert checkpoint.newest_valid(tmp_path).checkpoint.path == three
    three.write_bytes(three.read_bytes()[:-1])
    two.write_bytes(b"")
    newest = checkpoint.newest_valid(tmp_path)
    assert newest.checkpoint.meta["step"] == 9
    assert [path for path, _ in newest.skipped] == [three, two]
    assert all("truncated or altered" in reason for _, reason in newest.skipped)
    one.write_bytes(b"")
    newest = checkpoint.newest_valid(tmp_path)
    assert newest.checkpoint is None
    assert len(newest.skipped) == 3


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    paths = [saved(tmp_path, step) for step in (8, 9, 10, 11)]
    best = saved(tmp_path, "best")
    twin = paths[0].with_suffix(".ckpt")
    twin.touch()
    paths[3].with_suffix(".ckpt").touch()
    assert checkpoint.prune(tmp_path, 0) == []
    assert checkpoint.prune(tmp_path, 9) == []
    assert checkpoint.prune(tmp_path, 2) == [paths[0], twin, paths[1]]
    assert set(tmp_path.iterdir()) == {paths[2], paths[3], paths[3].with_suffix(".ckpt"), best}


def test_resolve_returns_a_file_unchanged(tmp_path, caplog):
    path = tmp_path / "weights.pth"
    path.touch()
    assert checkpoint.resolve(str(path)) == path
    assert caplog.messages == []


def test_resolve_returns_the_newest_valid_checkpoint_of_a_folder(tmp_path, caplog):
    folder = tmp_path / "run" / "checkpoint"
    old, new = saved(folder, 9), saved(folder, 10)
    for path in (folder, folder.parent):
        assert checkpoint.resolve(path) == new
        assert caplog.messages == [f"{path} is a folder; its newest valid checkpoint {new} is used"]
        caplog.clear()
    new.write_bytes(new.read_bytes()[:50])
    assert checkpoint.resolve(folder.parent) == old
    skipped, used = caplog.records
    assert skipped.levelname == "WARNING"
    assert skipped.getMessage().startswith(f"skipped: {new} is truncated or altered")
    assert used.getMessage() == f"{folder.parent} is a folder; its newest valid checkpoint {old} is used"


def test_resolve_lists_the_contents_of_a_folder_without_a_valid_checkpoint(tmp_path):
    with pytest.raises(OcrnetError, match="no valid numbered checkpoint; it contains nothing"):
        checkpoint.resolve(tmp_path)
    best = saved(tmp_path / "checkpoint", "best")
    bad = saved(tmp_path, 4)
    bad.write_bytes(b"")
    with pytest.raises(OcrnetError) as caught:
        checkpoint.resolve(tmp_path)
    for part in (str(tmp_path), f"{bad} is truncated or altered", f"checkpoint/{best.name}"):
        assert part in str(caught.value)


def test_resolve_replaces_a_missing_ckpt_by_the_safetensors_file_next_to_it(tmp_path, caplog):
    path = saved(tmp_path, 5, width=48)
    requested = path.with_suffix(".ckpt")
    assert checkpoint.resolve(requested) == path
    assert caplog.messages == [f"{requested} does not exist: {path.name} in the same folder is used instead"]
    caplog.clear()
    requested.touch()
    assert checkpoint.resolve(requested) == requested
    assert caplog.messages == []


def test_resuming_from_a_ckpt_uses_the_safetensors_file_next_to_it(tmp_path, caplog):
    path = saved(tmp_path, 5, width=48)
    requested = path.with_suffix(".ckpt")
    assert checkpoint.resolve_state(path) == path
    assert caplog.messages == []
    assert checkpoint.resolve_state(requested) == path
    caplog.clear()
    requested.touch()
    assert checkpoint.resolve_state(requested) == path
    assert caplog.messages == [f"{requested} holds only weights: {path.name} in the same folder is used instead"]
    path.unlink()
    with pytest.raises(
        OcrnetError, match=rf"{requested.name} holds only weights, and .* {path.name}, which is missing"
    ):
        checkpoint.resolve_state(requested)


def test_saving_a_checkpoint_removes_the_old_ckpt_next_to_it(tmp_path):
    path = saved(tmp_path, "best")
    twin = path.with_suffix(".ckpt")
    twin.touch()
    twin.chmod(0o400)  # MindSpore writes its files with this mode
    saved(tmp_path, "best")
    assert not twin.exists()
    twin.mkdir()
    with pytest.raises(OcrnetError, match=f"cannot write checkpoint {path}"):
        saved(tmp_path, "best")


def test_resolve_suggests_files_near_a_wrong_path(tmp_path):
    path = saved(tmp_path, 16000, width=48)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OcrnetError, match=f"does not exist; its folder contains {path.name}$"):
        checkpoint.resolve(tmp_path / "OCRNet_hrnet_seg_w48_1600_rank0.safetensors")
    with pytest.raises(OcrnetError, match=f"its folder contains {path.name}$"):
        checkpoint.resolve(tmp_path / "zzz")
    with pytest.raises(OcrnetError, match="does not exist, nor does its folder"):
        checkpoint.resolve(tmp_path / "no" / "such")
