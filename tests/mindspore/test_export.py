"""A checkpoint exported as MINDIR gives the logits and labels of the checkpoint."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import ocrnet
from ocrnet import architecture, config
from ocrnet.architecture import Arch
from ocrnet.cli import main
from ocrnet.config import Config
from ocrnet.distributed.launcher import World
from ocrnet.engines.factory import open_engine
from ocrnet.export.compare import draw
from ocrnet.weights import checkpoint

ARCH = Arch(width=4, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "weights.safetensors"
    checkpoint.save(path, architecture.init(ARCH, 3), {"config": config.as_dict(Config()), "step": 0})
    return path


def test_the_exported_network_has_the_outputs_of_the_torch_engine(saved, tmp_path, capsys):
    output = tmp_path / "new" / "small.mindir"
    argv = ["export", "--checkpoint_path", str(saved), "--output", str(output), "--size", "[64, 96]"]
    assert main.main(argv) == 0
    assert "its logits differ by at most " in capsys.readouterr().out
    x = np.random.default_rng(5).standard_normal((1, 3, 64, 96)).astype(np.float32)
    found = nn.GraphCell(ms.load(str(output)))(Tensor(x))
    engine = open_engine(Config(engine="torch", device_target="CPU"), ARCH, world=World())
    engine.restore(checkpoint.load(saved).tensors, 0)
    for a, b in zip(found, engine.logits(x), strict=True):
        np.testing.assert_allclose(a.asnumpy(), b, rtol=1e-4, atol=1e-5)
    assert output.stat().st_mode & 0o777 == saved.stat().st_mode & 0o777
    image = draw((64, 96), 0)
    np.testing.assert_array_equal(ocrnet.load(output).predict(image), ocrnet.load(saved, engine="torch").predict(image))


@pytest.mark.long
def test_a_file_whose_outputs_differ_is_removed(saved, tmp_path, capsys):
    output = tmp_path / "new" / "small.mindir"
    argv = ["export", "--checkpoint_path", str(saved), "--output", str(output), "--size", "[64, 96]"]
    assert main.main([*argv, "--tolerance", "0"]) == 2
    assert "was not written" in capsys.readouterr().err
    assert not output.parent.exists()
