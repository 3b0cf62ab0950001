"""Two machines, which are network namespaces joined by a cable that can be cut: torchrun with a c10d rendezvous."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
from commands import ROOT
from test_many_ranks import ENV, alone, apart, trained, training  # noqa: F401 - fixtures

from ocrnet.weights import checkpoint

FIRST, SECOND = (f"ocrnet{number}-{os.getpid()}" for number in (1, 2))
ADDRESSES = {FIRST: "10.177.0.1", SECOND: "10.177.0.2"}


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


def why_not() -> str:
    """Return why this machine cannot play two; empty where it can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    tried = ip("netns", "add", f"{FIRST}-try")
    if tried.returncode:
        return f"ip netns add: {tried.stderr.strip()}"
    try:
        tried = ip("-n", f"{FIRST}-try", "link", "add", "one", "type", "veth", "peer", "name", "two")
        return f"no veth: {tried.stderr.strip()}" if tried.returncode else ""
    finally:
        ip("netns", "del", f"{FIRST}-try")


@pytest.fixture
def machines() -> Iterator[None]:
    if reason := why_not():
        pytest.skip(reason)
    try:
        for machine in ADDRESSES:
            ip("netns", "add", machine)
            ip("-n", machine, "link", "set", "lo", "up")
            # torchrun itself waits on a connection that is cut for as long as TCP does: 15 minutes with Linux's 15.
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


def end(processes: list[subprocess.Popen], within: float) -> list[tuple[int, str]]:
    """Return status and output of each; all must end in time."""
    begun = time.monotonic()
    found = []
    for process in processes:
        try:
            said = process.communicate(timeout=within - (time.monotonic() - begun))[0]
        finally:
            process.kill()
        found.append((process.returncode, said))
    return found


@pytest.mark.long
def test_two_machines_are_one_with_the_whole_batch(machines, trained, alone, tmp_path):  # noqa: F811
    found = end(start(29401, *training("torch", trained, tmp_path / "out", 1)), within=120)
    assert [status for status, _ in found] == [0, 0], found
    assert max(apart(tmp_path / "out", alone)) < 1e-4


def test_a_cut_cable_ends_both_and_the_same_command_goes_on(machines, trained, alone, tmp_path):  # noqa: F811
    folder = tmp_path / "out"
    command = training("torch", "auto", folder, 1, "save_interval=3", "rank_timeout=5", "total_step=400")
    processes = start(29402, *command)
    said = ""
    while "step 8/400" not in said:
        time.sleep(0.1)
        log = folder / "logs/train.log"
        said = log.read_text() if log.exists() else ""
        assert all(process.poll() is None for process in processes), end(processes, 10)
    ip("-n", FIRST, "link", "set", "cable", "down")
    found = end(processes, within=90)
    assert all(status != 0 for status, _ in found), found
    assert any("did not take part in a collective within 5 s" in text for _, text in found), found
    found_there = checkpoint.newest_valid(folder / "checkpoint")
    assert not found_there.skipped  # nothing half-written
    assert found_there.checkpoint.meta["step"] >= 6
    ip("-n", FIRST, "link", "set", "cable", "up")
    command[command.index("total_step=400")] = f"total_step={found_there.checkpoint.meta['step'] + 5}"
    found = end(start(29403, *command), within=120)
    assert [status for status, _ in found] == [0, 0], found
    assert any(f"resume: from {found_there.checkpoint.path}" in text for _, text in found)
