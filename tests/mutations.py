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
REAL, MANY = "tests/cli/test_interruptions.py", "tests/cli/test_many_ranks.py"
DOOR = "tests/contract/test_training.py"
CACHE, PUSH, RESUME = "ocrnet/cloud/cache.py", "ocrnet/cloud/push.py", "ocrnet/cloud/resume.py"
PULLED, PUSHED = "tests/cloud/test_pull.py", "tests/cloud/test_push.py"
REPORT, SHOWN = "ocrnet/report", "tests/core/test_report_page.py"
MEASURED = "tests/core/test_report_figures.py"
SINK, SERVE_SINK, TOLD = "ocrnet/sinks/__init__.py", "ocrnet/sinks/__main__.py", "tests/core/test_sinks.py"
DECODED, KEPT = "ocrnet/datasets/decoded.py", "tests/core/test_datasets_cache.py"
ABUSE = "tests/serve/test_serve_abuse.py"
SERVER, REFUSES, SERVES = "ocrnet/serve", "tests/serve/test_serve_limits.py", "tests/serve/test_serve.py"
URLS, FILMS, ZIP = "tests/core/test_predict_urls.py", "tests/core/test_predict_files.py", "tests/cli/test_submit.py"
DOWNLOAD, VIDEO = "ocrnet/predict/download.py", "ocrnet/predict/video.py"

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
        "        self.close_loader()\n        self.step = step\n",
        "        self.close_loader()\n        self.step = 0\n",
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
        "ocrnet/signals.py",
        "signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, ())",
        "tests/torch/test_loader.py::test_workers_leave_the_signals_of_a_terminal_or_a_scheduler_to_the_run",
    ),
    Mutation(
        "a second signal exits at once",
        "ocrnet/signals.py",
        "            os._exit(128 + number)\n",
        "            return\n",
        "tests/core/test_signals.py::test_a_second_signal_exits_at_once",
    ),
    Mutation(
        "signals within a second are one request to stop",
        "ocrnet/signals.py",
        "< ONE_REQUEST_S",
        "< 0",
        "tests/core/test_signals.py::test_signals_right_behind_the_first_are_of_the_same_request",
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
        "ocrnet/engines/torch/optimizer.py",
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
        "ocrnet/engines/torch/optimizer.py",
        "(how.weight_decay, True)",
        "(0.0, True)",
        "tests/contract/test_golden.py::test_losses_are_the_stored_ones",
    ),
    Mutation(
        "golden losses: the other interpolation of labels would be seen",
        "ocrnet/augment.py",
        "interpolation=cv2.INTER_NEAREST_EXACT",
        "interpolation=cv2.INTER_NEAREST",
        "tests/contract/test_golden.py::test_losses_are_the_stored_ones",
    ),
    Mutation(
        "what is pulled is compared by its digest",
        CACHE,
        "if digest and found[kind] != digest:",
        "if False:",
        f"{PULLED}::test_what_never_comes_whole_is_no_file",
    ),
    Mutation(
        "what is pulled has its name when it is whole",
        CACHE,
        'part = target.with_name(f".{target.name}.{version}.part")',
        "part = target",
        f"{PULLED}::test_what_never_comes_whole_is_no_file",
    ),
    Mutation(
        "a killed pull goes on within a file",
        CACHE,
        "if part.exists() and part.stat().st_size > size:",
        "if part.exists():",
        f"{PULLED}::test_a_killed_pull_is_taken_up_within_a_file",
    ),
    Mutation(
        "what is here from before is not pulled again",
        CACHE,
        "known.get(item.name) != item or not self.has_file(item)",
        "True",
        f"{PULLED}::test_a_folder_is_pulled_once_and_what_changed_again",
    ),
    Mutation(
        "what changed in the store is pulled again",
        CACHE,
        "known.get(item.name) != item or not self.has_file(item)",
        "not self.has_file(item)",
        f"{PULLED}::test_a_folder_is_pulled_once_and_what_changed_again",
    ),
    Mutation(
        "one process of a machine pulls",
        CACHE,
        "                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n                break",
        "                break",
        f"{PULLED}::test_one_process_of_a_machine_pulls_and_the_others_wait",
    ),
    Mutation(
        "without an MD5 the size is asked twice",
        CACHE,
        "            _ask_again(store, item)",
        "            pass",
        f"{PULLED}::test_without_an_md5_the_size_is_asked_twice_and_said",
    ),
    Mutation(
        "the room on the disk is looked at before pulling",
        CACHE,
        "        if total > free:",
        "        if False:",
        f"{PULLED}::test_a_full_disk_is_told_and_costs_nothing_that_is_there",
    ),
    Mutation(
        "a failed request is made again",
        "ocrnet/cloud/store.py",
        "if error.final or tries > retries:",
        "if True:",
        f"{PULLED}::test_a_server_that_fails_every_third_request",
    ),
    Mutation(
        "a stalled request is given up",
        "ocrnet/cloud/obs.py",
        "            timeout=cloud.timeout,\n",
        "",
        "tests/cloud/test_stores.py::test_a_stalled_request_is_given_up",
    ),
    Mutation(
        "a tar cannot write outside its folder",
        "ocrnet/cloud/pull.py",
        'tar.extractall(folder, filter="data")',
        'tar.extractall(folder, filter="fully_trusted")',
        f"{PULLED}::test_a_tar_that_cannot_be_trusted_is_no_dataset",
    ),
    Mutation(
        "a local checkpoint stays until the store has it or a newer one",
        LOOP,
        "spared = self.push.unconfirmed() if self.push else ()",
        "spared = ()",
        "tests/cloud/test_cloud_runs.py::test_a_run_that_cannot_push_says_so_and_the_next_start_makes_up_for_it",
    ),
    Mutation(
        "a push is confirmed by the store",
        PUSH,
        "if found is None or found.size != size:",
        "if False:",
        f"{PUSHED}::test_a_store_that_lies_about_what_it_has_is_not_believed",
    ),
    Mutation(
        "the record goes before its checkpoint",
        PUSH,
        "        return 0, tries, 0, name",
        "        return 3, tries, 0, name",
        f"{PUSHED}::test_the_record_goes_before_the_checkpoint_of_its_moment",
    ),
    Mutation(
        "a refused file holds nothing up",
        PUSH,
        "_urgency(name, self._tries.get(name, 0))",
        "_urgency(name, 0)",
        f"{PUSHED}::test_a_file_that_the_store_refuses_holds_nothing_up",
    ),
    Mutation(
        "a later run in the store is not pruned",
        PUSH,
        " is not None and step <= newest",
        " is not None",
        f"{PUSHED}::test_a_later_run_in_the_store_is_not_pruned_by_one_begun_from_an_older_checkpoint",
    ),
    Mutation(
        "the end waits for what is not pushed",
        PUSH,
        "left = self._push.drain(self.seconds, self._say)",
        "left = []",
        f"{PUSHED}::test_whatever_ends_a_run_what_it_saved_is_pushed",
    ),
    Mutation(
        "the end waits only so long",
        PUSH,
        "while self._thread.is_alive() and time.monotonic() < end:",
        "while self._thread.is_alive() and time.monotonic() < end + 60:",
        f"{PUSHED}::test_the_end_waits_so_long_and_names_what_is_left",
    ),
    Mutation(
        "the record comes with a checkpoint",
        RESUME,
        "        _bring_record(store, folder, cloud, say)\n",
        "",
        f"{PUSHED}::test_the_newest_checkpoint_comes_with_its_record",
    ),
    Mutation(
        "a damaged checkpoint in the store is passed over",
        RESUME,
        "            checkpoint.load(draft)",
        "            pass",
        f"{PUSHED}::test_a_damaged_checkpoint_in_the_store_is_passed_over",
    ),
    Mutation(
        "what was altered on its way is fetched again",
        RESUME,
        "TRIES = 2",
        "TRIES = 1",
        f"{PUSHED}::test_what_was_altered_on_its_way_is_fetched_again",
    ),
    Mutation(
        "a start looks in the store",
        RESUME,
        "brought = bring(cfg, store, say)",
        "brought: list[str] = []",
        "tests/cloud/test_cloud_runs.py::test_a_killed_run_goes_on_in_an_empty_machine",
    ),
    Mutation(
        "keys in a url are refused",
        "ocrnet/cloud/urls.py",
        "return bool(_CREDENTIALS.search(text))",
        "return False",
        "tests/core/test_cloud_urls.py::test_keys_in_a_url_are_refused_and_not_repeated",
    ),
    Mutation(
        "keys are scrubbed from messages",
        "ocrnet/cloud/store.py",
        "super().__init__(urls.scrub(message))",
        "super().__init__(message)",
        "tests/core/test_cloud_urls.py::test_keys_of_the_environment_are_scrubbed",
    ),
    Mutation(
        "the loss of many ranks has one denominator",
        ENGINE,
        "            dist.all_reduce(denominator)\n",
        "",
        f"{MANY}::test_two_ranks_of_batch_1_are_one_of_batch_2[torch-torchrun]",
    ),
    Mutation(
        "batch norm is over all ranks",
        ENGINE,
        'module.sync = cfg.norm == "sync" and self.world.size > 1',
        "module.sync = False",
        f"{MANY}::test_two_ranks_of_batch_1_are_one_of_batch_2[torch-torchrun]",
    ),
    Mutation(
        "a new start does not meet the dead of the old one",
        "ocrnet/engines/torch/ranks.py",
        "dist.PrefixStore(_this_start(store, world, patience), store)",
        "store",
        f"{MANY}::test_a_killed_rank_comes_back_and_ends_bit_for_bit",
    ),
    Mutation(
        "a rank that hangs is given up",
        "ocrnet/engines/torch/ranks.py",
        "world_size=world.size, timeout=timeout\n",
        "world_size=world.size\n",
        f"{MANY}::test_a_rank_that_hangs_ends_the_run_within_rank_timeout",
    ),
    Mutation(
        "a restart of torchrun's goes on from the last checkpoint",
        "ocrnet/training.py",
        "    resume, implied = _after_restart(cfg, resume)\n",
        "    implied: list[str] = []\n",
        f"{MANY}::test_a_killed_rank_comes_back_and_ends_bit_for_bit",
    ),
    Mutation(
        "a rank does not outlive its launcher",
        "ocrnet/cli.py",
        "        sent_when_parent_dies(signal.SIGTERM)\n",
        "        pass\n",
        f"{MANY}::test_ranks_whose_launcher_was_killed_stop_with_a_checkpoint",
    ),
    Mutation(
        "Ctrl-C is kept from MindSpore",
        "ocrnet/engines/mindspore/__init__.py",
        "    keep_interrupts()\n",
        "",
        "tests/mindspore/test_interrupts.py::test_while_a_graph_runs",
    ),
    Mutation(
        "Ctrl-C waits for MindSpore's compiler",
        "ocrnet/engines/mindspore/interrupts.py",
        "is signal.default_int_handler and _put_off and",
        "is signal.default_int_handler and False and",
        "tests/mindspore/test_interrupts.py::test_while_a_graph_is_compiled",
    ),
    Mutation(
        "ranks that were not given the same settings are refused",
        "ocrnet/config.py",
        "for name, value in flat(as_dict(cfg)) if name not in OF_A_MACHINE}",
        "for name, value in flat({}) if name not in OF_A_MACHINE}",
        f"{MANY}::test_ranks_that_were_not_given_the_same_are_refused[batch_size]",
    ),
    Mutation(
        "ranks that see other images are refused",
        "ocrnet/training.py",
        "{what: dataset.identity for what, dataset in datasets.items()}",
        "{}",
        f"{MANY}::test_ranks_that_were_not_given_the_same_are_refused[validation images]",
    ),
    Mutation(
        "whether a store takes files is tried at the start",
        "ocrnet/cloud/push.py",
        '    tried(lambda: store.upload(b"ocrnet", PROBE), f"train_url {store.url}", retries=cloud.retries, say=say)\n',
        "",
        "tests/cloud/test_push.py::test_whether_a_store_takes_files_is_tried_at_the_start",
    ),
    Mutation(
        "the names of classes are text on a page, never its code",
        f"{REPORT}/pieces.py",
        'return f"{swatch(colour)}{escape(name)}"',
        'return f"{swatch(colour)}{name}"',
        f"{SHOWN}::test_hostile_names_stay_text_and_nothing_is_fetched",
    ),
    Mutation(
        "no key of the environment lands in a report",
        f"{REPORT}/source.py",
        "urls.scrub(str(value))",
        "str(value)",
        f"{SHOWN}::test_nothing_of_the_machine_and_no_key_lands_on_the_page",
    ),
    Mutation(
        "a line that a run is still writing is passed over",
        f"{REPORT}/source.py",
        "except (ValueError, RecursionError):",
        "except RecursionError:",
        f"{SHOWN}::test_half_written_and_foreign_lines_are_passed_over",
    ),
    Mutation(
        "a model card that somebody has edited stays",
        f"{REPORT}/card.py",
        "if path.exists() and not _is_ours(path):",
        "if False:",
        f"{SHOWN}::test_the_card_says_what_the_page_says_and_an_edited_one_is_kept",
    ),
    Mutation(
        "what is left out makes no boundary",
        f"{REPORT}/figures.py",
        "& valid[before] & valid[behind]",
        "",
        f"{MEASURED}::test_what_is_left_out_makes_no_boundary_and_neither_does_the_border",
    ),
    Mutation(
        "a decoded pair's checksum is compared",
        DECODED,
        "if zlib.crc32(memoryview(mapped)[_SEAL.size :]) != crc:",
        "if False:",
        f"{KEPT}::test_a_damaged_file_is_said_and_made_anew",
    ),
    Mutation(
        "a decoded pair has its name when it is whole",
        DECODED,
        'draft = place.with_name(f"{place.stem}.{secrets.token_hex(8)}{DRAFT_END}")',
        "draft = place",
        f"{KEPT}::test_a_process_killed_in_the_middle_of_writing_leaves_no_pair",
    ),
    Mutation(
        "a source that changed is decoded anew",
        DECODED,
        "if Source(*written) != source:",
        "if False:",
        f"{KEPT}::test_a_changed_source_is_decoded_anew_in_its_place",
    ),
    Mutation(
        "a source that changes while it is read is not kept",
        DECODED,
        "if _source(pair) == source:",
        "if True:",
        f"{KEPT}::test_what_changes_while_it_is_read_is_not_kept",
    ),
    Mutation(
        "other classes have decoded pairs of their own",
        DECODED,
        "classes.ids, sorted(classes.ignored), ",
        "",
        f"{KEPT}::test_other_classes_or_another_decoder_have_files_of_their_own",
    ),
    Mutation(
        "the room for decoded pairs is looked at",
        DECODED,
        "if needed > free:",
        "if False:",
        f"{KEPT}::test_the_room_is_looked_at_at_the_start",
    ),
    Mutation(
        "a cache that cannot be written is no unreadable image",
        "ocrnet/stream.py",
        " and not isinstance(error, CacheError)",
        "",
        f"{KEPT}::test_a_full_disk_is_an_error_that_no_setting_passes_over",
    ),
    Mutation(
        "a checksum is compared by one of the forked processes",
        DECODED,
        "            self._compared[i] = 1\n",
        "",
        f"{KEPT}::test_a_checksum_is_compared_once_by_all_forked_processes",
    ),
    Mutation(
        "W&B and MLflow are not told a row twice",
        SERVE_SINK,
        'if step > known.get("eval" if kind == "picture" else kind, -1):',
        "if True:",
        f"{TOLD}::test_a_resumed_run_goes_on_there_and_nothing_is_told_twice",
    ),
    Mutation(
        "a silent service is given up",
        SINK,
        "elif now - self._waits_since > SILENT_SECONDS:",
        "elif False:",
        f"{TOLD}::test_one_that_stalls_is_told_of_once_and_never_waited_for",
    ),
    Mutation(
        "a pipe to a service is never waited for",
        SINK,
        "os.set_blocking(self._to, False)",
        "os.set_blocking(self._to, True)",
        f"{TOLD}::test_a_full_pipe_is_a_stall_too",
    ),
    Mutation(
        "a service hears of a killed run",
        SERVE_SINK,
        "with contextlib.suppress(BrokenPipeError):",
        "with contextlib.nullcontext():",
        f"{TOLD}::test_a_killed_run_leaves_what_it_told",
    ),
    Mutation(
        "keys do not come into a message about a service",
        SINK,
        'text = text.replace(secret, "***")',
        "pass",
        f"{TOLD}::test_one_that_fails_is_told_of_once_and_left_alone",
    ),
    Mutation(
        "a download ends after its seconds",
        DOWNLOAD,
        "    thread.join(MOST_SECONDS)",
        "    thread.join()",
        f"{URLS}::test_a_server_that_keeps_one_waiting_is_left",
    ),
    Mutation(
        "a download that says too much is not begun",
        DOWNLOAD,
        "        if promised > MOST_BYTES:",
        "        if False:",
        f"{URLS}::test_what_is_no_image_or_breaks_its_word_is_named",
    ),
    Mutation(
        "a download is as long as the server promised",
        DOWNLOAD,
        "    if promised > len(data):",
        "    if False:",
        f"{URLS}::test_what_is_no_image_or_breaks_its_word_is_named",
    ),
    Mutation(
        "a downloaded image has few enough pixels",
        DOWNLOAD,
        "    if width * height > MOST_PIXELS:",
        "    if False:",
        f"{URLS}::test_what_is_no_image_or_breaks_its_word_is_named",
    ),
    Mutation(
        "redirects lead to http and https alone",
        DOWNLOAD,
        "        if _parts(newurl).scheme not in SCHEMES:",
        "        if False:",
        f"{URLS}::test_what_is_no_image_or_breaks_its_word_is_named",
    ),
    Mutation(
        "a video shorter than it says is truncated",
        VIDEO,
        "        if lacking <= 1 + TOLERANCE * self.promised:",
        "        if True:",
        f"{FILMS}::test_a_truncated_video_is_named_and_its_frames_are_kept",
    ),
    Mutation(
        "half a film is removed",
        VIDEO,
        "        self._draft.unlink(missing_ok=True)",
        "        pass",
        f"{FILMS}::test_a_stopped_video_leaves_no_half_file",
    ),
    Mutation(
        "a film is counted before it has its name",
        VIDEO,
        "        if there != self._frames:",
        "        if False:",
        f"{FILMS}::test_a_video_that_the_disk_does_not_take_is_an_error",
    ),
    Mutation(
        "a zip is read back before it has its name",
        "ocrnet/submit.py",
        "        if checked.problems:\n            raise",
        "        if False:\n            raise",
        f"{ZIP}::test_what_was_written_is_read_back_before_it_has_its_name",
    ),
    Mutation(
        "a submission holds labelIds",
        "ocrnet/submit.py",
        "dataset.classes.to_ids(labels)",
        "labels",
        f"{ZIP}::test_the_zip_holds_what_eval_scores",
    ),
    Mutation(
        "images of other sizes and wishes stay out of a batch",
        f"{SERVER}/worker.py",
        "job.kind == first.kind][:",
        "True][:",
        f"{REFUSES}::test_waiting_images_of_one_size_and_wish_are_looked_at_together",
    ),
    Mutation(
        "an image that fails spoils none of its batch",
        f"{SERVER}/worker.py",
        "self._look([job])[0] if len(jobs) > 1 else _raise(error)",
        "_raise(error)",
        f"{REFUSES}::test_an_image_that_fails_spoils_none_of_its_batch",
    ),
    Mutation(
        "a full server reads no body",
        f"{SERVER}/app.py",
        "        self.worker.check_room()",
        "        pass",
        f"{REFUSES}::test_a_full_server_says_when_to_come_again_and_reads_no_body",
    ),
    Mutation(
        "the images in work fit into memory",
        f"{SERVER}/worker.py",
        "if self._bytes and self._bytes",
        "if False and self._bytes",
        f"{REFUSES}::test_the_images_in_work_fit_into_memory",
    ),
    Mutation(
        "a token is compared",
        f"{SERVER}/app.py",
        "hmac.compare_digest(given.encode(), self.settings.token.encode())",
        "True",
        f"{REFUSES}::test_a_token_is_asked_for",
    ),
    Mutation(
        "who went away is not looked at",
        f"{SERVER}/app.py",
        "job.future.cancel()  # where it still waits, the worker passes over it\n            future.cancel()",
        "pass",
        f"{REFUSES}::test_who_went_away_is_not_answered",
    ),
    Mutation(
        "what takes too long is given up",
        f"{SERVER}/app.py",
        "timeout=seconds, ",
        "",
        f"{REFUSES}::test_what_takes_too_long_is_given_up_and_never_looked_at",
    ),
    Mutation(
        "a connection that asks nothing is closed",
        f"{SERVER}/server.py",
        "self.transport.abort()",
        "pass",
        f"{REFUSES}::test_slow_clients_hold_nothing",
    ),
    Mutation(
        "a body that comes too slowly is given up",
        f"{SERVER}/body.py",
        "timeout=left, ",
        "",
        f"{REFUSES}::test_slow_clients_hold_nothing",
    ),
    Mutation(
        "bodies that are read share a bounded memory",
        f"{SERVER}/body.py",
        "while self._held > BODIES",
        "while False and self._held > BODIES",
        f"{REFUSES}::test_bodies_that_are_being_read_share_a_bounded_memory",
    ),
    Mutation(
        "a body that came fast may not be silent for long",
        f"{SERVER}/body.py",
        "min(coming.until + len(chunk) / BYTES_PER_SECOND, now + FIRST_SECONDS)",
        "coming.until + len(chunk) / BYTES_PER_SECOND",
        f"{ABUSE}::test_who_sent_fast_may_not_be_silent_for_long",
    ),
    Mutation(
        "silent bodies make room",
        f"{SERVER}/body.py",
        "if last is asking:",
        "if True:",
        f"{ABUSE}::test_silent_bodies_make_room_for_others",
    ),
    Mutation(
        "a body is not kept while the network works",
        f"{SERVER}/app.py",
        "            del data",
        "            pass",
        f"{ABUSE}::test_a_body_is_counted_until_it_is_decoded_and_not_kept_after_it",
    ),
    Mutation(
        "a connection whose client takes its answer is not idle",
        f"{SERVER}/server.py",
        " if left else idle",
        " or idle",
        f"{ABUSE}::test_a_large_answer_is_sent_to_a_slow_client_and_not_kept_for_a_silent_one",
    ),
    Mutation(
        "a connection whose client takes nothing is closed",
        f"{SERVER}/server.py",
        "left > self._left - IDLE_SECONDS * BYTES_PER_SECOND if left",
        "False if left",
        f"{ABUSE}::test_a_large_answer_is_sent_to_a_slow_client_and_not_kept_for_a_silent_one",
    ),
    Mutation(
        "an origin is compared",
        f"{SERVER}/guard.py",
        "origin is not None and not _same(",
        "False and not _same(",
        f"{ABUSE}::test_pages_of_others_are_refused_however_the_browser_says_it",
    ),
    Mutation(
        "a name that is led here is refused",
        f"{SERVER}/guard.py",
        "if self._hosts is not None and",
        "if False and",
        f"{ABUSE}::test_pages_of_others_are_refused_however_the_browser_says_it",
    ),
    Mutation(
        "pixels are counted before decoding",
        f"{SERVER}/body.py",
        "head.pixels > max_pixels",
        "False",
        f"{SERVES}::test_sixty_malformed_uploads_get_4xx_and_the_server_lives",
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
