"""The job files in examples/: their commands and syntax are valid, and values to change are marked with CHANGE."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from ocrnet.cli import flags
from ocrnet.config import Config

EXAMPLES = Path(__file__).parents[2] / "examples"
SHELL = ["mpirun.sh", "slurm.sbatch"]


def command(name: str) -> list[str]:
    """Return the arguments of train.py in a job file."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    if name.endswith(".yml"):
        (worker,) = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"].values()
        words = worker["template"]["spec"]["containers"][0]["command"]
    else:
        (line,) = [line for line in text.replace("\\\n", " ").splitlines() if "train.py" in line]
        words = shlex.split(line, comments=True)
    return words[words.index("train.py") + 1 :]


@pytest.mark.parametrize("name", [*SHELL, "pytorchjob.yml"])
def test_commands_are_valid(name):
    args = flags.parse("train", command(name))
    cfg = flags.load_config(args)
    assert args.options["resume_ckpt"] == "auto"
    # 16 ranks, two machines of eight devices, have the global batch size of the recipe.
    assert cfg.batch_size * 16 == cfg.base_batch_size


def test_the_modelarts_job_is_a_valid_config():
    args = flags.parse("train", ["--config", str(EXAMPLES / "modelarts.yml"), "--rank", "0", "--world_size=1"])
    cfg = flags.load_config(args)
    assert isinstance(cfg, Config)
    assert cfg.enable_modelarts
    assert (cfg.data_url[:6], cfg.train_url[:6]) == ("obs://", "obs://")


@pytest.mark.parametrize("name", SHELL)
def test_shell_scripts_have_valid_syntax(name):
    subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=True)


@pytest.mark.parametrize("name", [*SHELL, "pytorchjob.yml", "modelarts.yml", "hosts"])
def test_values_to_change_are_marked(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert "CHANGE" in text
