"""Ctrl-C raises KeyboardInterrupt in Python while MindSpore compiles or runs a graph, in real processes."""

import signal
import subprocess
import sys
import textwrap

import pytest

BEGIN = """
    import signal
    import sys
    import time
    from contextlib import nullcontext

    signal.signal(signal.SIGINT, signal.default_int_handler)  # SIGINT is ignored if the tests run in the background

    from ocrnet.engines.mindspore import interrupts
    import mindspore as ms
    import numpy as np
    from mindspore import nn, ops

    class Long(nn.Cell):
        def construct(self, x):
            for _ in range(200):
                x = ops.tanh(ops.matmul(x, x))
            return x

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    cell, x = Long(), ms.Tensor(np.eye(384, dtype=np.float32))
"""


@pytest.fixture
def run_and_interrupt(tmp_path):
    """Return a function that runs BEGIN and a script, waits until the script prints ready, and sends SIGINT."""

    def run(script: str) -> subprocess.CompletedProcess:
        file = tmp_path / "script.py"  # MindSpore's compiler reads the source from it
        file.write_text(textwrap.dedent(BEGIN) + textwrap.dedent(script), encoding="utf-8")
        process = subprocess.Popen([sys.executable, file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n", process.communicate()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    return run


def test_ctrl_c_interrupts_a_running_graph(run_and_interrupt):
    completed = run_and_interrupt("""
        cell(x)
        try:
            print("ready", flush=True)
            while True:
                cell(x).asnumpy()
        except KeyboardInterrupt:
            print("interrupted")
    """)
    assert (completed.returncode, completed.stdout) == (0, "interrupted\n"), completed.stderr


def test_ctrl_c_interrupts_after_the_compilation_of_a_graph(run_and_interrupt):
    completed = run_and_interrupt("""
        try:
            with interrupts.defer_interrupts():
                print("ready", flush=True)
                cell(x).asnumpy()
                end = time.monotonic() + 5  # the signal may arrive after compiling has completed
                while not interrupts._pending and time.monotonic() < end:
                    time.sleep(0.01)
                print("compiled", flush=True)
        except KeyboardInterrupt:
            print("interrupted")
    """)
    assert (completed.returncode, completed.stdout) == (0, "compiled\ninterrupted\n"), completed.stderr
    assert "Traceback" not in completed.stderr


def test_ctrl_c_interrupts_a_sleep(run_and_interrupt):
    completed = run_and_interrupt("""
        try:
            print("ready", flush=True)
            time.sleep(40)
        except KeyboardInterrupt:
            print("interrupted")
    """)
    assert (completed.returncode, completed.stdout) == (0, "interrupted\n"), completed.stderr


def test_an_ignored_ctrl_c_stays_ignored(run_and_interrupt):
    completed = run_and_interrupt("""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("ready", flush=True)
        time.sleep(1)
        print("continued")
    """)
    assert (completed.returncode, completed.stdout) == (0, "continued\n"), completed.stderr
