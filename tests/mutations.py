"""Take out each mechanism that keeps a run safe, and see its test fail; docs/reliability.md keeps what came out.

    python tests/mutations.py [NUMBER ...]

Works on a copy of the repository. `tests/core/test_mutations.py` checks that every text below still stands in its file.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "quickstart", "*.egg-info", ".mypy_cache")


class Mutation(NamedTuple):
    """What is taken out: in which file which text becomes which, and the test that must fail."""

    mechanism: str
    file: str
    old: str
    new: str
    test: str


ENGINE, LOOP, FILES = "ocrnet/engines/torch/engine.py", "ocrnet/loop.py", "ocrnet/checkpoint.py"
REAL = "tests/cli/test_interruptions.py"
DOOR = "tests/contract/test_training.py"

MUTATIONS = (
    Mutation(
        "momentum is restored",
        ENGINE,
        "buffer.copy_(torch.from_numpy(given)) if given is not None else buffer.zero_()",
        "buffer.zero_()",
        f"{REAL}::test_kill_9_at_random_moments",
    ),
    Mutation(
        "the place in the stream is restored",
        ENGINE,
        "        self.close()\n        self.step = step\n",
        "        self.close()\n        self.step = 0\n",
        f"{REAL}::test_kill_9_at_random_moments",
    ),
    Mutation(
        "losses between two log lines are in the checkpoint",
        "ocrnet/training.py",
        'progress = Progress(**found.meta["progress"]) if found else Progress()',
        'progress = Progress(**found.meta["progress"] | {"losses": []}) if found else Progress()',
        f"{REAL}::test_kill_9_at_random_moments",
    ),
    Mutation(
        "rows of metrics.jsonl after the restored step are cut",
        "ocrnet/training.py",
        "        run.cut_metrics(step=progress.step, evaluated_step=progress.evaluated_step)\n",
        "",
        "tests/cli/test_seed_commands.py::test_auto_resume_cuts_the_rows_after_the_restored_step",
    ),
    Mutation(
        "auto passes over a damaged checkpoint",
        FILES,
        "    for path in reversed(steps(folder)):\n        try:",
        "    for path in reversed(steps(folder)[-1:]):\n        try:",
        "tests/core/test_checkpoint_folder.py::test_newest_valid_passes_over_what_is_damaged",
    ),
    Mutation(
        "a checkpoint's digest is verified",
        FILES,
        'if _digest(tensors) != meta["sha256"]:',
        "if False:",
        "tests/core/test_checkpoint.py::test_every_flipped_bit_is_found",
    ),
    Mutation(
        "a checkpoint is written beside and renamed",
        FILES,
        "        os.replace(temporary, path)\n",
        "        path.write_bytes(temporary.read_bytes())\n",
        "tests/core/test_checkpoint_folder.py::test_kill_in_the_middle_of_saving_leaves_a_checkpoint_that_loads",
    ),
    Mutation(
        "SIGTERM and SIGINT are a request",
        "ocrnet/signals.py",
        "chosen = [number for number in SIGNALS if",
        "chosen = [number for number in () if",
        f"{REAL}::test_a_signal_to_every_process_ends_with_a_checkpoint",
    ),
    Mutation(
        "workers leave signals to the run",
        "ocrnet/workers.py",
        "        signal.signal(number, signal.SIG_IGN)\n",
        "        pass\n",
        "tests/torch/test_loader.py::test_workers_leave_the_signals_of_a_terminal_or_a_scheduler_to_the_run",
    ),
    Mutation(
        "a signal while workers start waits until they leave signals to the run",
        "ocrnet/workers.py",
        "signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, ())",
        "tests/torch/test_loader.py::test_workers_leave_the_signals_of_a_terminal_or_a_scheduler_to_the_run",
    ),
    Mutation(
        "a second signal exits at once",
        "ocrnet/signals.py",
        "            os._exit(128 + number)\n",
        "            return\n",
        f"{REAL}::test_a_second_signal_exits_at_once",
    ),
    Mutation(
        "a step that is not finite leaves BN statistics as they were",
        ENGINE,
        "        self.running.copy_(torch.where(finite, self.running, before))\n",
        "",
        f"{DOOR}::test_a_sample_that_is_not_finite_costs_its_step_and_nothing_else",
    ),
    Mutation(
        "a step that is not finite leaves weights and momentum as they were",
        ENGINE,
        "(~finite).float()",
        "torch.zeros(())",
        f"{DOOR}::test_a_sample_that_is_not_finite_costs_its_step_and_nothing_else",
    ),
    Mutation(
        "max_skipped steps in a row end the run",
        LOOP,
        "if progress.skipped_in_row >= cfg.max_skipped:",
        "if False:",
        f"{REAL}::test_weights_that_are_not_finite_end_the_run_naming_the_images",
    ),
    Mutation(
        "a state that is not finite is never saved",
        LOOP,
        'if array.dtype.kind == "f" and not np.isfinite(array).all():',
        "if False:",
        "tests/core/test_loop.py::test_a_state_that_is_not_finite_is_never_saved",
    ),
    Mutation(
        "a dead worker is told as such",
        "ocrnet/engines/torch/loader.py",
        "        if not told:\n",
        "        if True:\n",
        f"{REAL}::test_a_killed_worker_ends_the_run_with_a_message",
    ),
    Mutation(
        "a dead worker is told in order, not wherever the run happens to be",
        "ocrnet/engines/torch/loader.py",
        "        signal.signal(signal.SIGCHLD, before)\n",
        "        pass\n",
        "tests/torch/test_loader.py::test_a_dead_worker_is_told_where_its_batch_is_asked_for_and_nowhere_else",
    ),
    Mutation(
        "a worker that hangs is ended",
        "ocrnet/engines/torch/loader.py",
        "            process.kill()  # one that hangs in a read, or waits for what a dead one held\n",
        "",
        "tests/torch/test_loader.py::test_closing_ends_a_worker_that_hangs",
    ),
    Mutation(
        "the steps before an error are saved",
        LOOP,
        "                self._save_once()\n            except OcrnetError as second:",
        "                pass\n            except OcrnetError as second:",
        f"{REAL}::test_a_run_that_a_broken_image_ended_goes_on_once_it_is_mended",
    ),
    Mutation(
        "a run folder that was removed is made again",
        "ocrnet/run.py",
        "            path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it under the run\n",
        "",
        f"{REAL}::test_a_run_folder_removed_under_the_run_is_made_again",
    ),
    Mutation(
        "one run at a time has a run folder",
        "ocrnet/training.py",
        "        run.claim()\n",
        "",
        f"{REAL}::test_a_folder_in_use_is_refused",
    ),
    Mutation(
        "unreadable images are capped",
        LOOP,
        "if found > max(1, UNREADABLE_SHARE * images):",
        "if False:",
        f"{REAL}::test_a_broken_image_can_be_passed_over",
    ),
    Mutation(
        "golden losses: weight decay that is not applied would be seen",
        ENGINE,
        "how.weight_decay if decays else 0.0",
        "0.0",
        "tests/contract/test_golden.py::test_losses_are_the_stored_ones",
    ),
    Mutation(
        "golden losses: the other interpolation of labels would be seen",
        "ocrnet/augment.py",
        "interpolation=cv2.INTER_NEAREST_EXACT",
        "interpolation=cv2.INTER_NEAREST",
        "tests/contract/test_golden.py::test_losses_are_the_stored_ones",
    ),
)


def seen_to_fail(mutation: Mutation) -> bool:
    """Take the mechanism out of a copy and run its test there; True where the test fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "ocrnet"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        path = copy / mutation.file
        text = path.read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{mutation.file} does not hold once: {mutation.old}"
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", mutation.test]
        try:
            done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=400, check=False)
        except subprocess.TimeoutExpired:
            return True
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return done.returncode == 1


def main() -> None:
    """Try the mutations with the given numbers, or all."""
    chosen = [int(word) for word in sys.argv[1:]] or range(1, len(MUTATIONS) + 1)
    survived = []
    for number in chosen:
        mutation = MUTATIONS[number - 1]
        fails = seen_to_fail(mutation)
        survived += [] if fails else [number]
        print(f"{number:2} {'fails' if fails else 'STILL PASSES'}  {mutation.mechanism}: {mutation.test}", flush=True)
    sys.exit(f"survived: {survived}" if survived else 0)


if __name__ == "__main__":
    main()
