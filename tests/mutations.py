"""Break each safety mechanism in a copy of the repository, and require that its test fails.

    python tests/mutations.py [NAME ...]      all mutations (`make mutations`), or those named
    python tests/mutations.py --table         also print the results as the table of docs/reliability.md

A comment ``# mutation: NAME`` in the code marks the statement below it. Names and layout of the code may change around
the comment: the statement is parsed, changed by the operator given here, and written back. The unchanged test must
pass first. Only a test that fails counts: one that times out, or that cannot be collected, does not.
`tests/core/test_mutations.py` applies every operator in CI, without running the tests.
"""

import argparse
import ast
import concurrent.futures
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parents[1]
EXCLUDED = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "quickstart", "*.egg-info", ".mypy_cache", "site")
MARKER = re.compile(r"^ *# mutation: ([a-z0-9-]+)$")
SECONDS = 600  # of one test

# An operator takes a statement and returns what replaces it; it raises `ValueError` if it does not apply.
Operator = Callable[[ast.stmt], ast.stmt]


def delete(statement: ast.stmt) -> ast.stmt:
    """Replace a statement by ``pass``."""
    return ast.Pass()


def condition(value: bool) -> Operator:
    """Replace the condition of an ``if``, a ``while``, or the first conditional expression by a constant."""

    def apply(statement: ast.stmt) -> ast.stmt:
        for node in ast.walk(statement):
            if isinstance(node, ast.If | ast.While | ast.IfExp):
                node.test = ast.Constant(value)
                return statement
        raise ValueError("no condition")

    return apply


def value(text: str) -> Operator:
    """Replace the value of an assignment or a ``return``."""

    def apply(statement: ast.stmt) -> ast.stmt:
        if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Return):
            raise ValueError("neither an assignment nor a return")
        statement.value = ast.parse(text, mode="eval").body
        return statement

    return apply


def edit(pattern: str, replacement: str) -> Operator:
    """Replace what ``pattern`` matches, exactly once, in the statement as `ast.unparse` writes it."""

    def apply(statement: ast.stmt) -> ast.stmt:
        text, count = re.subn(pattern, replacement, ast.unparse(statement))
        if count != 1:
            raise ValueError(f"{pattern} matches {count} times")
        # ``return`` parses only within a function.
        return ast.parse("def wrapper():\n" + re.sub("^", "    ", text, flags=re.MULTILINE)).body[0].body[0]

    return apply


class Mutation(NamedTuple):
    """The name in a marker, the operator for the statement below it, and the test that must fail."""

    name: str
    operator: Operator
    test: str


INTERRUPTIONS = "tests/cli/test_interruptions.py"
RANKS = "tests/cli/test_many_ranks.py"
TRAINING = "tests/contract/test_training.py"
PULL = "tests/cloud/test_pull.py"
PUSH = "tests/cloud/test_push.py"
REPORT = "tests/core/test_report_page.py"
TRACKERS = "tests/core/test_services.py"
CACHE = "tests/core/test_datasets_cache.py"
ABUSE = "tests/serve/test_serve_abuse.py"
LIMITS = "tests/serve/test_serve_limits.py"
URLS = "tests/core/test_predict_urls.py"
FILES = "tests/core/test_predict_files.py"
SUBMIT = "tests/cli/test_submit.py"
LOADER = "tests/torch/test_dataloader.py"

MUTATIONS = (
    Mutation(
        "restore-momentum",
        condition(False),
        f"{INTERRUPTIONS}::test_a_run_killed_at_random_moments_resumes_to_the_same_result",
    ),
    Mutation(
        "restore-stream-position",
        value("0"),
        f"{INTERRUPTIONS}::test_a_run_killed_at_random_moments_resumes_to_the_same_result",
    ),
    Mutation(
        "restore-unlogged-losses",
        edit(r"(\['progress'\])\)", r"\1 | {'losses': []})"),
        f"{INTERRUPTIONS}::test_a_run_killed_at_random_moments_resumes_to_the_same_result",
    ),
    Mutation(
        "cut-metrics-after-restored-step",
        delete,
        "tests/cli/test_seed_commands.py::test_auto_resume_removes_the_metrics_after_the_restored_step",
    ),
    Mutation(
        "skip-damaged-checkpoints",
        edit(r"reversed\((\w+\(\w+\))\)", r"reversed(\1[-1:])"),
        "tests/core/test_checkpoint_folder.py::test_newest_valid_skips_damaged_checkpoints",
    ),
    Mutation(
        "verify-checkpoint-digest",
        condition(False),
        "tests/core/test_checkpoint.py::test_every_flipped_bit_is_detected",
    ),
    Mutation(
        "rename-checkpoint-when-complete",
        edit(r"os\.replace\((\w+), (\w+)\)", r"\2.write_bytes(\1.read_bytes())"),
        "tests/core/test_checkpoint_folder.py::test_a_reader_finds_a_complete_checkpoint_at_any_moment_of_saving",
    ),
    Mutation(
        "stop-on-signal",
        edit(r"(for \w+) in \w+", r"\1 in ()"),
        f"{INTERRUPTIONS}::test_a_run_stopped_by_a_signal_resumes_to_the_same_result",
    ),
    Mutation(
        "workers-ignore-signals",
        delete,
        f"{LOADER}::test_workers_ignore_stop_signals",
    ),
    Mutation(
        "block-signals-while-workers-start",
        edit(r"(signal\.SIG_BLOCK), \w+", r"\1, ()"),
        f"{LOADER}::test_workers_ignore_stop_signals",
    ),
    Mutation(
        "second-signal-exits", edit(r".+", "return"), "tests/core/test_signals.py::test_a_second_signal_exits_at_once"
    ),
    Mutation(
        "signals-within-a-second-are-one",
        condition(False),
        "tests/core/test_signals.py::test_signals_within_a_second_of_the_first_are_one_request",
    ),
    Mutation(
        "keep-bn-statistics-of-nonfinite-step",
        delete,
        f"{TRAINING}::test_a_sample_that_is_not_finite_only_skips_its_step",
    ),
    Mutation(
        "keep-weights-of-nonfinite-step",
        value("torch.zeros(())"),
        f"{TRAINING}::test_a_sample_that_is_not_finite_only_skips_its_step",
    ),
    Mutation(
        "end-after-max-skipped",
        condition(False),
        f"{INTERRUPTIONS}::test_weights_that_are_not_finite_end_the_run_and_the_images_are_logged",
    ),
    Mutation(
        "never-save-nonfinite-state",
        condition(False),
        "tests/core/test_trainer.py::test_a_state_that_is_not_finite_is_never_saved",
    ),
    Mutation(
        "report-dead-worker",
        condition(True),
        f"{INTERRUPTIONS}::test_a_killed_dataloader_worker_ends_the_run_with_an_error",
    ),
    Mutation(
        "report-dead-worker-in-order",
        delete,
        f"{LOADER}::test_a_killed_worker_raises_only_when_its_batch_is_requested",
    ),
    Mutation(
        "deregister-dead-workers",
        delete,
        f"{LOADER}::test_a_loader_starts_at_the_address_of_one_whose_worker_died",
    ),
    Mutation("kill-hanging-worker", delete, f"{LOADER}::test_close_kills_a_hung_worker"),
    Mutation(
        "save-steps-before-error",
        delete,
        f"{INTERRUPTIONS}::test_a_run_ended_by_a_damaged_image_resumes_after_the_image_is_repaired",
    ),
    Mutation(
        "recreate-removed-run-folder", delete, f"{INTERRUPTIONS}::test_a_run_folder_removed_during_the_run_is_recreated"
    ),
    Mutation("lock-run-folder", delete, f"{INTERRUPTIONS}::test_a_run_folder_in_use_is_refused"),
    Mutation(
        "cap-unreadable-images",
        condition(False),
        f"{INTERRUPTIONS}::test_on_error_skip_replaces_damaged_images_up_to_a_limit",
    ),
    Mutation(
        "apply-weight-decay",
        edit(r"\([\w.]+, True\)", r"(0.0, True)"),
        "tests/contract/test_golden.py::test_losses_equal_the_stored_losses",
    ),
    Mutation(
        "resize-labels-nearest-exact",
        edit(r"INTER_NEAREST_EXACT", r"INTER_NEAREST"),
        "tests/contract/test_golden.py::test_losses_equal_the_stored_losses",
    ),
    Mutation("verify-downloaded-digest", condition(False), f"{PULL}::test_an_incomplete_download_leaves_no_file"),
    Mutation(
        "rename-download-when-complete",
        edit(r"= (\w+)\.with_name.*", r"= \1"),
        f"{PULL}::test_an_incomplete_download_leaves_no_file",
    ),
    Mutation(
        "resume-partial-download", edit(r" and .*:", r":"), f"{PULL}::test_a_killed_download_resumes_within_a_file"
    ),
    Mutation(
        "keep-downloaded-files",
        edit(r" if .*\]", r"]"),
        f"{PULL}::test_a_folder_is_downloaded_once_and_changed_files_again",
    ),
    Mutation(
        "download-changed-files",
        edit(r" if .* or ", r" if "),
        f"{PULL}::test_a_folder_is_downloaded_once_and_changed_files_again",
    ),
    Mutation("one-download-per-machine", delete, f"{PULL}::test_one_process_per_machine_downloads_and_the_others_wait"),
    Mutation("check-size-without-md5", delete, f"{PULL}::test_without_an_md5_the_size_is_checked_twice_and_logged"),
    Mutation(
        "check-disk-space-for-download",
        condition(False),
        f"{PULL}::test_a_full_disk_is_an_error_and_a_smaller_download_then_succeeds",
    ),
    Mutation(
        "retry-failed-requests", condition(True), f"{PULL}::test_a_download_succeeds_when_every_third_request_fails"
    ),
    Mutation(
        "give-up-stalled-request",
        edit(r", timeout=[\w.]+", r""),
        "tests/cloud/test_stores.py::test_a_stalled_request_times_out",
    ),
    Mutation(
        "extract-tar-safely",
        edit(r"'data'", r"'fully_trusted'"),
        f"{PULL}::test_an_unsafe_or_damaged_tar_is_refused",
    ),
    Mutation(
        "keep-unconfirmed-checkpoint",
        value("()"),
        "tests/cloud/test_cloud_runs.py::test_failed_uploads_are_reported_and_repeated_by_the_next_start",
    ),
    Mutation("confirm-upload", condition(False), f"{PUSH}::test_an_upload_with_a_wrong_size_is_not_confirmed"),
    Mutation(
        "upload-record-before-checkpoint",
        edit(r"return \(?0,", r"return (3,"),
        f"{PUSH}::test_metrics_are_uploaded_before_their_checkpoint",
    ),
    Mutation(
        "refused-file-blocks-nothing",
        edit(r"self\.\w+\.get\(\w+, 0\)", r"0"),
        f"{PUSH}::test_a_refused_file_does_not_block_other_uploads",
    ),
    Mutation(
        "prune-older-steps-only",
        edit(r"( is not None) and \w+ <= \w+", r"\1"),
        f"{PUSH}::test_later_checkpoints_in_the_store_are_not_pruned",
    ),
    Mutation("wait-for-uploads-at-end", value("[]"), f"{PUSH}::test_saved_files_are_uploaded_however_a_run_ends"),
    Mutation(
        "bound-wait-for-uploads",
        edit(r"< (\w+):", r"< \1 + 60:"),
        f"{PUSH}::test_the_end_of_a_run_waits_for_push_timeout_and_names_the_rest",
    ),
    Mutation(
        "download-record-with-checkpoint", delete, f"{PUSH}::test_the_newest_checkpoint_is_downloaded_with_its_metrics"
    ),
    Mutation("skip-damaged-remote-checkpoint", delete, f"{PUSH}::test_a_damaged_checkpoint_in_the_store_is_skipped"),
    Mutation(
        "download-damaged-copy-again", value("1"), f"{PUSH}::test_a_checkpoint_altered_in_transit_is_downloaded_again"
    ),
    Mutation(
        "look-for-remote-checkpoint",
        delete,
        "tests/cloud/test_cloud_runs.py::test_a_killed_run_resumes_on_an_empty_machine",
    ),
    Mutation(
        "refuse-credentials-in-url",
        value("False"),
        "tests/core/test_cloud_urls.py::test_credentials_in_a_url_are_refused_and_not_printed",
    ),
    Mutation(
        "scrub-credentials",
        edit(r"\w+\.\w+\((\w+)\)\)$", r"\1)"),
        "tests/core/test_cloud_urls.py::test_credentials_of_the_environment_are_scrubbed",
    ),
    Mutation(
        "one-loss-denominator", delete, f"{RANKS}::test_two_ranks_of_batch_1_match_one_rank_of_batch_2[torch-torchrun]"
    ),
    Mutation(
        "synchronize-batch-norm",
        value("False"),
        f"{RANKS}::test_two_ranks_of_batch_1_match_one_rank_of_batch_2[torch-torchrun]",
    ),
    Mutation(
        "separate-store-per-start",
        edit(r"dist\.PrefixStore\(.*, (\w+)\)", r"\1"),
        f"{RANKS}::test_a_killed_rank_is_restarted_and_the_run_ends_the_same",
    ),
    Mutation(
        "give-up-hanging-rank",
        edit(r", timeout=\w+", r""),
        f"{RANKS}::test_a_rank_that_hangs_ends_the_run_within_rank_timeout",
    ),
    Mutation(
        "resume-after-restart",
        delete,
        f"{RANKS}::test_a_killed_rank_is_restarted_and_the_run_ends_the_same",
    ),
    Mutation(
        "end-with-launcher", delete, f"{RANKS}::test_ranks_save_a_checkpoint_and_stop_when_their_launcher_is_killed"
    ),
    Mutation(
        "keep-sigint-from-mindspore",
        delete,
        "tests/mindspore/test_interrupts.py::test_ctrl_c_interrupts_a_running_graph",
    ),
    Mutation(
        "defer-sigint-while-compiling",
        edit(r"(default_int_handler) and \w+", r"\1 and False"),
        "tests/mindspore/test_interrupts.py::test_ctrl_c_interrupts_after_the_compilation_of_a_graph",
    ),
    Mutation(
        "same-config-on-all-ranks",
        edit(r"flat\(.*?\)\)", r"flat({})"),
        f"{RANKS}::test_ranks_that_differ_in_config_or_images_are_refused[batch_size]",
    ),
    Mutation(
        "same-images-on-all-ranks",
        value("{}"),
        f"{RANKS}::test_ranks_that_differ_in_config_or_images_are_refused[validation images]",
    ),
    Mutation("check-upload-at-start", delete, f"{PUSH}::test_an_unwritable_store_is_an_error_at_the_start"),
    Mutation(
        "escape-class-names",
        edit(r"\{\w+\((\w+)\)\}'", r"{\1}'"),
        f"{REPORT}::test_hostile_names_are_escaped_and_the_page_loads_nothing",
    ),
    Mutation(
        "scrub-report",
        edit(r"\w+\.\w+\((str\(\w+\))\)", r"\1"),
        f"{REPORT}::test_credentials_and_paths_of_the_machine_are_not_on_the_page",
    ),
    Mutation(
        "skip-unfinished-rows",
        edit(r"\(ValueError, RecursionError\)", r"RecursionError"),
        f"{REPORT}::test_unfinished_and_invalid_lines_are_skipped",
    ),
    Mutation(
        "keep-edited-model-card",
        condition(False),
        f"{REPORT}::test_the_card_has_the_numbers_of_the_page_and_an_edited_card_is_kept",
    ),
    Mutation(
        "no-boundary-at-ignored-pixels",
        edit(r" & (\w+)\[\w+\] & \1\[\w+\]", r""),
        "tests/core/test_report_figures.py::test_ignored_pixels_and_the_image_border_are_no_boundary",
    ),
    Mutation("verify-cached-pair", condition(False), f"{CACHE}::test_a_damaged_file_is_reported_and_written_again"),
    Mutation(
        "rename-cached-pair-when-complete",
        edit(r"= (\w+)\.with_name.*", r"= \1"),
        f"{CACHE}::test_a_process_killed_while_writing_leaves_no_pair",
    ),
    Mutation(
        "decode-changed-source", condition(False), f"{CACHE}::test_a_changed_source_is_decoded_again_into_the_same_file"
    ),
    Mutation(
        "do-not-cache-changing-source",
        condition(True),
        f"{CACHE}::test_a_source_that_changes_while_it_is_read_is_not_cached",
    ),
    Mutation(
        "cache-per-class-table",
        edit(r", \w+\.\w+, sorted\(.*?\)", r""),
        f"{CACHE}::test_other_classes_or_another_decoder_use_separate_files",
    ),
    Mutation("check-disk-space-for-cache", condition(False), f"{CACHE}::test_free_disk_space_is_checked_at_the_start"),
    Mutation(
        "cache-error-is-no-unreadable-image",
        edit(r" and \(not isinstance.*", r""),
        f"{CACHE}::test_a_full_disk_is_an_error_even_with_on_error_skip",
    ),
    Mutation("verify-cached-pair-once", delete, f"{CACHE}::test_a_checksum_is_compared_once_by_all_forked_processes"),
    Mutation(
        "send-rows-to-trackers-once",
        condition(True),
        f"{TRACKERS}::test_a_resumed_run_continues_its_tracker_run_without_duplicate_rows",
    ),
    Mutation(
        "give-up-silent-tracker",
        condition(False),
        f"{TRACKERS}::test_a_tracker_that_stalls_is_reported_once_and_never_waited_for",
    ),
    Mutation(
        "never-wait-for-tracker-pipe",
        edit(r", False", r", True"),
        f"{TRACKERS}::test_a_full_pipe_counts_as_a_stalled_tracker",
    ),
    Mutation(
        "tracker-survives-killed-run",
        edit(r"contextlib\.suppress\(BrokenPipeError\)", r"contextlib.nullcontext()"),
        f"{TRACKERS}::test_the_rows_of_a_killed_run_reach_the_tracker",
    ),
    Mutation(
        "scrub-tracker-messages", delete, f"{TRACKERS}::test_a_tracker_that_fails_is_reported_once_and_switched_off"
    ),
    Mutation(
        "bound-url-download-time",
        edit(r"\.join\(\w+\)", r".join()"),
        f"{URLS}::test_a_slow_server_is_given_up",
    ),
    Mutation(
        "refuse-large-url-download", condition(False), f"{URLS}::test_invalid_responses_are_refused_with_the_reason"
    ),
    Mutation(
        "check-url-download-length", condition(False), f"{URLS}::test_invalid_responses_are_refused_with_the_reason"
    ),
    Mutation("bound-url-image-pixels", condition(False), f"{URLS}::test_invalid_responses_are_refused_with_the_reason"),
    Mutation("redirect-to-http-only", condition(False), f"{URLS}::test_invalid_responses_are_refused_with_the_reason"),
    Mutation(
        "detect-truncated-video",
        condition(True),
        f"{FILES}::test_a_truncated_video_is_reported_and_its_frames_are_kept",
    ),
    Mutation("remove-unfinished-video", delete, f"{FILES}::test_a_stopped_video_leaves_no_unfinished_file"),
    Mutation("count-written-frames", condition(False), f"{FILES}::test_a_video_that_is_not_fully_written_is_an_error"),
    Mutation(
        "validate-written-zip", condition(False), f"{SUBMIT}::test_a_written_zip_is_validated_before_it_is_renamed"
    ),
    Mutation(
        "submit-label-ids",
        edit(r"\w+\.\w+\.to_ids\((\w+)\)", r"\1"),
        f"{SUBMIT}::test_the_zip_holds_the_predictions_that_eval_scores",
    ),
    Mutation(
        "batch-equal-sizes-only",
        edit(r" if .*?\]", r"]"),
        f"{LIMITS}::test_queued_images_of_the_same_size_and_options_are_batched",
    ),
    Mutation(
        "failed-image-spares-its-batch",
        edit(r"\(.* else (\w+\(\w+\))\)$", r"(\1)"),
        f"{LIMITS}::test_an_image_that_fails_does_not_fail_its_batch",
    ),
    Mutation("full-server-reads-no-body", delete, f"{LIMITS}::test_a_full_server_sends_retry_after_and_reads_no_body"),
    Mutation("bound-images-in-memory", condition(False), f"{LIMITS}::test_the_memory_of_images_in_progress_is_limited"),
    Mutation(
        "compare-token",
        edit(r"hmac\.compare_digest\(.*\):", r"True:"),
        f"{LIMITS}::test_requests_without_the_token_get_401",
    ),
    Mutation("cancel-abandoned-request", delete, f"{LIMITS}::test_the_image_of_a_disconnected_client_is_not_predicted"),
    Mutation(
        "time-out-request",
        edit(r", timeout=\w+", r""),
        f"{LIMITS}::test_a_request_that_times_out_gets_504_and_is_not_predicted",
    ),
    Mutation("close-idle-connection", delete, f"{LIMITS}::test_slow_clients_do_not_block_others"),
    Mutation("time-out-slow-body", edit(r", timeout=\w+", r""), f"{LIMITS}::test_slow_clients_do_not_block_others"),
    Mutation("bound-bodies-in-memory", condition(False), f"{LIMITS}::test_bodies_in_progress_share_a_memory_limit"),
    Mutation(
        "bound-silence-within-body",
        edit(r"min\((.*), .*\)", r"\1"),
        f"{ABUSE}::test_a_body_that_stalls_after_a_fast_start_times_out",
    ),
    Mutation(
        "drop-silent-bodies-first",
        condition(True),
        f"{ABUSE}::test_stalled_bodies_are_dropped_when_others_need_the_memory",
    ),
    Mutation(
        "free-body-before-inference",
        delete,
        f"{ABUSE}::test_a_body_counts_until_it_is_decoded_and_is_then_freed",
    ),
    Mutation(
        "keep-connection-of-slow-reader",
        edit(r" if \w+ else (\w+)", r" or \1"),
        f"{ABUSE}::test_a_large_response_reaches_a_slow_client_and_is_dropped_for_a_stuck_one",
    ),
    Mutation(
        "close-connection-of-stuck-reader",
        edit(r"= .* if ", r"= False if "),
        f"{ABUSE}::test_a_large_response_reaches_a_slow_client_and_is_dropped_for_a_stuck_one",
    ),
    Mutation("compare-origin", value("False"), f"{ABUSE}::test_requests_from_other_origins_and_host_names_are_refused"),
    Mutation(
        "refuse-foreign-host-names",
        condition(False),
        f"{ABUSE}::test_requests_from_other_origins_and_host_names_are_refused",
    ),
    Mutation(
        "check-pixels-before-decoding",
        condition(False),
        "tests/serve/test_serve.py::test_sixty_malformed_uploads_get_4xx_and_the_server_survives",
    ),
)


@functools.cache
def markers() -> dict[str, list[tuple[Path, int]]]:
    """Return, by the name in each marker, its files and the line numbers of the statements below."""
    found = defaultdict(list)
    for path in sorted((ROOT / "ocrnet").rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if match := MARKER.match(line):
                below = next(i for i in range(number, len(lines)) if not lines[i].lstrip().startswith("#"))
                found[match[1]].append((path.relative_to(ROOT), below + 1))
    return dict(found)


class _Replace(ast.NodeTransformer):
    """Apply an operator to the statement that begins on a line."""

    def __init__(self, line: int, operator: Operator) -> None:
        self.line, self.operator, self.applied = line, operator, 0

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.stmt) and node.lineno == self.line:
            self.applied += 1
            return self.operator(node)
        if isinstance(node, ast.Try) and self.line in (handler.lineno for handler in node.handlers):
            self.applied += 1
            return self.operator(node)
        return self.generic_visit(node)


def mutated(mutation: Mutation) -> tuple[Path, str]:
    """Return the file that a mutation changes, as a path relative to the root, and its new text."""
    places = markers().get(mutation.name, [])
    if not places:
        raise ValueError(f"no marker '# mutation: {mutation.name}' in the code")
    path = places[0][0]
    if any(other != path for other, _ in places):
        raise ValueError(f"the markers '{mutation.name}' are in several files")
    before = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(before)
    for _, line in places:
        replace = _Replace(line, mutation.operator)
        tree = ast.fix_missing_locations(replace.visit(tree))
        if replace.applied != 1:
            raise ValueError(f"{path}:{line}: {replace.applied} statements begin here")
    after = ast.unparse(tree)
    if after == ast.unparse(ast.parse(before)):
        raise ValueError(f"{path}: the operator changes nothing")
    return path, after


def run_test(test: str, files: dict[Path, str]) -> str:
    """Run a test in a copy with replaced ``files``; return passes, fails, times out, or why it does not run."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "ocrnet"
        shutil.copytree(ROOT, copy, ignore=EXCLUDED)
        for path, text in files.items():
            (copy / path).write_text(text, encoding="utf-8")
        env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "OCRNET_TEST_LONG": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "--basetemp", f"{folder}/tmp", test]
        with open(f"{folder}/output", "w+", errors="replace") as output:
            process = subprocess.Popen(command, cwd=copy, env=env, stdout=output, stderr=output, start_new_session=True)
            try:
                status: int | None = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                status = None
            # Kill the processes that a failed test left running, or a test that hangs.
            for other in psutil.process_iter(["cmdline"]):
                if any(folder in word for word in other.info["cmdline"] or ()):
                    other.kill()
            process.wait()
            output.seek(0)
            last = output.read().strip().rpartition("\n")[2]
    if status == 0 and " passed" not in last:
        return f"does not run: {last}"
    return {0: "passes", 1: "fails", None: "times out"}.get(status, f"cannot be run: {last}")


class Runner:
    """Runs mutations, each unchanged test once."""

    def __init__(self) -> None:
        self._unchanged: dict[str, concurrent.futures.Future[str]] = {}
        self._lock = threading.Lock()

    def result(self, mutation: Mutation) -> str:
        """Return ``found`` if the test passes without the mutation and fails with it, else what happens instead."""
        with self._lock:
            mine = mutation.test not in self._unchanged
            unchanged = self._unchanged.setdefault(mutation.test, concurrent.futures.Future())
        if mine:
            unchanged.set_result(run_test(mutation.test, {}))
        if unchanged.result() != "passes":
            return f"not found: without the mutation, the test {unchanged.result()}"
        after = run_test(mutation.test, dict([mutated(mutation)]))
        return "found" if after == "fails" else f"not found: the test {after}"


def table(results: dict[str, str]) -> str:
    """Return the results as Markdown."""
    rows = ["| mechanism removed | where | test | result |", "| --- | --- | --- | --- |"]
    for mutation in MUTATIONS:
        if mutation.name in results:
            path, test = markers()[mutation.name][0][0], mutation.test.partition("::")
            name = f"`{test[2]}` in `{test[0]}`"
            rows.append(f"| {mutation.name} | `{path}` | {name} | {results[mutation.name]} |")
    return "\n".join(rows)


def main() -> None:
    """Run the mutations named, or all; exit with 1 if one is not found."""
    parser = argparse.ArgumentParser(description="Break each safety mechanism, and require that its test fails.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to run; default: all")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown at the end")
    parser.add_argument("--jobs", type=int, default=1, help="mutations run at a time; default 1")
    args = parser.parse_args()
    if unknown := set(args.names) - {mutation.name for mutation in MUTATIONS}:
        parser.error(f"unknown mutations: {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in MUTATIONS if not args.names or mutation.name in args.names]
    results: dict[str, str] = {}
    runner = Runner()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(runner.result, mutation): mutation for mutation in chosen}
        for future in concurrent.futures.as_completed(running):
            mutation = running[future]
            results[mutation.name] = future.result()
            print(
                f"{len(results):3}/{len(chosen)} {mutation.name}: {results[mutation.name]} ({mutation.test})",
                flush=True,
            )
    if args.table:
        print(table(results))
    missed = [name for name, result in results.items() if result != "found"]
    sys.exit(f"not found: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
