"""Devices that are not there, and what is set before MindSpore is imported."""

import os
import subprocess
import sys

import pytest

from ocrnet.config import Config
from ocrnet.engines.factory import choose_engine
from ocrnet.engines.mindspore.device import choose_device, choose_precision, describe, translate_oom
from ocrnet.utils.errors import OcrnetError


def test_a_device_that_is_not_there_is_told_with_what_helps(capfd):
    with pytest.raises(OcrnetError, match="CANN toolkit"):
        choose_device("Ascend")
    with pytest.raises(OcrnetError, match="--engine torch"):
        choose_device("GPU")
    assert choose_device("CPU") == ("CPU", "CPU")
    assert choose_device(None) == ("CPU", "CPU, because MindSpore sees neither Ascend nor GPU")
    assert capfd.readouterr().err == ""


def test_ascend_means_mindspore_and_torch_refuses_it():
    assert choose_engine(Config(device_target="Ascend")) == "mindspore"
    assert choose_engine(Config(device_target="CPU")) == "torch"
    assert choose_engine(Config(engine="mindspore")) == "mindspore"
    with pytest.raises(OcrnetError, match="--engine torch does not run on Ascend"):
        choose_engine(Config(engine="torch", device_target="Ascend"))


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, check=False, timeout=120
    )


def test_what_the_user_set_stays():
    show = "import ocrnet.engines.mindspore, os; print(os.environ['GLOG_v'], os.environ['ONEDNN_MAX_CPU_ISA'])"
    assert run(show, GLOG_v="1", ONEDNN_MAX_CPU_ISA="ALL").stdout.split() == ["1", "ALL"]
    clean = {name: value for name, value in os.environ.items() if name not in ("GLOG_v", "ONEDNN_MAX_CPU_ISA")}
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, env=clean, check=True)
    assert done.stdout.split() == ["3", "AVX2"]


def test_numpy_2_is_refused_with_the_remedy():
    done = run("import numpy; numpy.__version__ = '2.1.0'; import ocrnet.engines.mindspore")
    assert done.returncode != 0
    assert "pip install 'numpy<2'" in done.stderr


def test_the_compile_cache_is_refused():
    done = run("import ocrnet.engines.mindspore", MS_COMPILER_CACHE_ENABLE="1")
    assert done.returncode != 0
    assert "unset MS_COMPILER_CACHE_ENABLE" in done.stderr


@pytest.mark.parametrize(
    "error", [MemoryError("3 GiB"), RuntimeError("Allocate memory failed\nmore"), RuntimeError("Out of memory")]
)
def test_what_is_raised_where_memory_ends_becomes_a_message(error):
    with pytest.raises(OcrnetError, match="lower batch_size"), translate_oom("lower batch_size"):
        raise error


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shape"), translate_oom("lower batch_size"):
        raise RuntimeError("shape mismatch")


def test_the_threads_that_compute_and_the_instructions_are_told_and_recorded(monkeypatch):
    def told(**given):
        cfg = Config(**given)
        return describe("CPU", "CPU", choose_precision("CPU", cfg), cfg, training=cfg.fused_norm)

    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})  # as mpirun binds a rank
        lines, versions = told(loss_scale=128.0)
    finally:
        os.sched_setaffinity(0, before)
    assert lines[0].endswith(", 1 thread")
    assert (versions["threads"], versions["ONEDNN_MAX_CPU_ISA"]) == ("1", "AVX2")
    assert "loss_scale: no effect in float32; --mix True enables mixed precision" in lines
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    lines, versions = told(mix=True, loss_scale=128.0)
    assert any(line.startswith("ONEDNN_MAX_CPU_ISA is SSE41 in the environment") for line in lines)
    assert versions["ONEDNN_MAX_CPU_ISA"] == "SSE41"
    assert not any(line.startswith("loss_scale") for line in lines)
    assert "fused_norm: no effect on the mindspore engine" in told(fused_norm=True)[0]
