"""Unavailable devices are rejected, and environment variables are set before MindSpore is imported."""

import os
import subprocess
import sys

import pytest

from ocrnet.config import Config
from ocrnet.engines.factory import choose_engine
from ocrnet.engines.mindspore.device import choose_device, choose_precision, describe, translate_oom
from ocrnet.utils.errors import OcrnetError


def test_an_unavailable_device_is_rejected_with_a_remedy(capfd):
    with pytest.raises(OcrnetError, match="CANN toolkit"):
        choose_device("Ascend")
    with pytest.raises(OcrnetError, match="--engine torch"):
        choose_device("GPU")
    assert choose_device("CPU") == ("CPU", "CPU")
    assert choose_device(None) == ("CPU", "CPU, because MindSpore sees neither Ascend nor GPU")
    assert capfd.readouterr().err == ""


def test_ascend_selects_mindspore_and_torch_rejects_ascend():
    assert choose_engine(Config(device_target="Ascend")) == "mindspore"
    assert choose_engine(Config(device_target="CPU")) == "torch"
    assert choose_engine(Config(engine="mindspore")) == "mindspore"
    with pytest.raises(OcrnetError, match="--engine torch does not run on Ascend"):
        choose_engine(Config(engine="torch", device_target="Ascend"))


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, check=False, timeout=120
    )


def test_variables_set_by_the_user_are_kept():
    script = "import ocrnet.engines.mindspore, os; print(os.environ['GLOG_v'], os.environ['ONEDNN_MAX_CPU_ISA'])"
    assert run(script, GLOG_v="1", ONEDNN_MAX_CPU_ISA="ALL").stdout.split() == ["1", "ALL"]
    clean = {name: value for name, value in os.environ.items() if name not in ("GLOG_v", "ONEDNN_MAX_CPU_ISA")}
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean, check=True)
    assert completed.stdout.split() == ["3", "AVX2"]


def test_numpy_2_is_rejected_with_a_remedy():
    completed = run("import numpy; numpy.__version__ = '2.1.0'; import ocrnet.engines.mindspore")
    assert completed.returncode != 0
    assert "pip install 'numpy<2'" in completed.stderr


def test_the_compile_cache_is_rejected():
    completed = run("import ocrnet.engines.mindspore", MS_COMPILER_CACHE_ENABLE="1")
    assert completed.returncode != 0
    assert "unset MS_COMPILER_CACHE_ENABLE" in completed.stderr


@pytest.mark.parametrize(
    "error", [MemoryError("3 GiB"), RuntimeError("Allocate memory failed\nmore"), RuntimeError("Out of memory")]
)
def test_out_of_memory_errors_become_an_error_with_a_remedy(error):
    with pytest.raises(OcrnetError, match="lower batch_size"), translate_oom("lower batch_size"):
        raise error


def test_other_errors_are_not_translated():
    with pytest.raises(RuntimeError, match="shape"), translate_oom("lower batch_size"):
        raise RuntimeError("shape mismatch")


def test_threads_and_instruction_set_are_logged_and_recorded(monkeypatch):
    def describe_cpu(**settings):
        cfg = Config(**settings)
        return describe("CPU", "CPU", choose_precision("CPU", cfg), cfg, training=cfg.fused_norm)

    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})  # as mpirun does when it binds a rank
        lines, versions = describe_cpu(loss_scale=128.0)
    finally:
        os.sched_setaffinity(0, before)
    assert lines[0].endswith(", 1 thread")
    assert (versions["threads"], versions["ONEDNN_MAX_CPU_ISA"]) == ("1", "AVX2")
    assert "loss_scale: no effect in float32; --mix True enables mixed precision" in lines
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    lines, versions = describe_cpu(mix=True, loss_scale=128.0)
    assert any(line.startswith("ONEDNN_MAX_CPU_ISA is SSE41 in the environment") for line in lines)
    assert versions["ONEDNN_MAX_CPU_ISA"] == "SSE41"
    assert not any(line.startswith("loss_scale") for line in lines)
    assert "fused_norm: no effect on the mindspore engine" in describe_cpu(fused_norm=True)[0]
