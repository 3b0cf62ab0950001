"""Ctrl-C reaches Python as itself, also while MindSpore compiles and runs a graph: real processes, a real signal."""

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

    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background

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
def begin(tmp_path):
    """Run what is given after BEGIN, wait for its first word, and send it SIGINT."""

    def started(script: str) -> subprocess.CompletedProcess:
        file = tmp_path / "script.py"  # MindSpore's compiler reads the source from it
        file.write_text(textwrap.dedent(BEGIN) + textwrap.dedent(script), encoding="utf-8")
        process = subprocess.Popen([sys.executable, file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n", process.communicate()
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, said, errors)

    return started


def test_while_a_graph_runs(begin):
    ended = begin("""
        cell(x)
        try:
            print("ready", flush=True)
            while True:
                cell(x).asnumpy()
        except KeyboardInterrupt:
            print("interrupted")
    """)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr


def test_while_a_graph_is_compiled(begin):
    ended = begin("""
        try:
            with interrupts.defer_interrupts():
                print("ready", flush=True)
                cell(x).asnumpy()
                end = time.monotonic() + 5  # compiling may have been faster than the signal
                while not interrupts._pending and time.monotonic() < end:
                    time.sleep(0.01)
                print("compiled", flush=True)
        except KeyboardInterrupt:
            print("interrupted")
    """)
    assert (ended.returncode, ended.stdout) == (0, "compiled\ninterrupted\n"), ended.stderr
    assert "Traceback" not in ended.stderr


def test_while_python_waits(begin):
    ended = begin("""
        try:
            print("ready", flush=True)
            time.sleep(40)
        except KeyboardInterrupt:
            print("interrupted")
    """)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr


def test_where_it_is_ignored(begin):
    ended = begin("""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("ready", flush=True)
        time.sleep(1)
        print("went on")
    """)
    assert (ended.returncode, ended.stdout) == (0, "went on\n"), ended.stderr
