"""Stop signals to a real process: the first requests a stop; one more than a second later exits at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ocrnet.utils.signals import ONE_REQUEST_S

STEPPING = """
import signal, sys, time
from ocrnet.utils.signals import StopRequest
signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a shell ignore it
with StopRequest():
    print("begun", flush=True)
    time.sleep(60)  # a long step
sys.exit("ended by itself")
"""


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", STEPPING], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        yield process
        process.kill()


def request_stop(process, number):
    os.kill(process.pid, number)
    assert "send it again to exit immediately" in process.stderr.readline()


def test_a_second_signal_exits_at_once(process):
    request_stop(process, signal.SIGINT)
    time.sleep(ONE_REQUEST_S + 0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM


def test_signals_within_a_second_of_the_first_are_one_request(process):
    request_stop(process, signal.SIGTERM)
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGTERM,
    ):  # mpirun sends these when it ends, and so does a terminal
        time.sleep(0.01)
        os.kill(process.pid, number)
    time.sleep(ONE_REQUEST_S)
    assert process.poll() is None
