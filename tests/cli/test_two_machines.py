"""torchrun with a c10d rendezvous on two machines: two network namespaces whose link a test can set down."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
from commands import ROOT
from test_many_ranks import ENV, relative_differences, single_rank_run, start_checkpoint, training  # noqa: F401 - fixtures

from ocrnet.weights import checkpoint

FIRST, SECOND = (f"ocrnet{number}-{os.getpid()}" for number in (1, 2))
ADDRESSES = {FIRST: "10.177.0.1", SECOND: "10.177.0.2"}


def ip(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *argv], capture_output=True, text=True, check=False)


def unavailable_reason() -> str:
    """Return why this machine cannot create linked network namespaces, or an empty string."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    result = ip("netns", "add", f"{FIRST}-try")
    if result.returncode:
        return f"ip netns add: {result.stderr.strip()}"
    try:
        result = ip("-n", f"{FIRST}-try", "link", "add", "one", "type", "veth", "peer", "name", "two")
        return f"no veth: {result.stderr.strip()}" if result.returncode else ""
    finally:
        ip("netns", "del", f"{FIRST}-try")


@pytest.fixture
def machines() -> Iterator[None]:
    """Create the two network namespaces and the link `cable` between them."""
    if reason := unavailable_reason():
        pytest.skip(reason)
    try:
        for machine in ADDRESSES:
            ip("netns", "add", machine)
            ip("-n", machine, "link", "set", "lo", "up")
            # torchrun waits for a cut connection until TCP gives up: 15 minutes with Linux's default of 15 retries.
            ip("netns", "exec", machine, "sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")
        ip("-n", FIRST, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", SECOND)
        for machine, address in ADDRESSES.items():
            ip("-n", machine, "address", "add", f"{address}/24", "dev", "cable")
            assert ip("-n", machine, "link", "set", "cable", "up").returncode == 0
        yield
    finally:
        for machine in ADDRESSES:
            ip("netns", "del", machine)


def start(port: int, *argv) -> list[subprocess.Popen]:
    """Start a rank of a command on each machine."""
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", machine, "torchrun", "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d",
             f"--rdzv-endpoint={ADDRESSES[FIRST]}:{port}", f"--rdzv-id={port}",
             f"--rdzv-conf=is_host={int(machine == FIRST)},read_timeout=20", f"--local-addr={ADDRESSES[machine]}",
             *map(str, argv)],
            cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for machine in ADDRESSES
    ]  # fmt: skip


def wait_for_exit(processes: list[subprocess.Popen], timeout: float) -> list[tuple[int, str]]:
    """Return exit status and output of each process; all must end within `timeout` seconds."""
    started = time.monotonic()
    results = []
    for process in processes:
        try:
            output = process.communicate(timeout=timeout - (time.monotonic() - started))[0]
        finally:
            process.kill()
        results.append((process.returncode, output))
    return results


@pytest.mark.long
def test_two_machines_match_one_rank_with_the_global_batch(machines, start_checkpoint, single_rank_run, tmp_path):  # noqa: F811
    results = wait_for_exit(start(29401, *training("torch", start_checkpoint, tmp_path / "out", 1)), timeout=120)
    assert [status for status, _ in results] == [0, 0], results
    assert max(relative_differences(tmp_path / "out", single_rank_run)) < 1e-4


def test_a_cut_link_ends_both_ranks_and_the_same_command_resumes(machines, start_checkpoint, single_rank_run, tmp_path):  # noqa: F811
    folder = tmp_path / "out"
    command = training("torch", "auto", folder, 1, "save_interval=3", "rank_timeout=5", "total_step=400")
    processes = start(29402, *command)
    log, text = folder / "logs/train.log", ""
    while "step 8/400" not in text:
        time.sleep(0.1)
        text = log.read_text() if log.exists() else ""
        assert all(process.poll() is None for process in processes), wait_for_exit(processes, 10)
    ip("-n", FIRST, "link", "set", "cable", "down")
    results = wait_for_exit(processes, timeout=90)
    assert all(status != 0 for status, _ in results), results
    assert any("did not take part in a collective within 5 s" in text for _, text in results), results
    saved = checkpoint.newest_valid(folder / "checkpoint")
    assert not saved.skipped  # no damaged or partial checkpoint
    assert saved.checkpoint.meta["step"] >= 6
    ip("-n", FIRST, "link", "set", "cable", "up")
    command[command.index("total_step=400")] = f"total_step={saved.checkpoint.meta['step'] + 5}"
    results = wait_for_exit(start(29403, *command), timeout=120)
    assert [status for status, _ in results] == [0, 0], results
    assert any(f"resume: from {saved.checkpoint.path}" in text for _, text in results)
