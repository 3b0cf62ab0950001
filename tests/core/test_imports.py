"""The core imports no framework: with torch and mindspore blocked, every core module still imports."""

import pkgutil
import subprocess
import sys

import ocrnet

BLOCK = """
import importlib, sys
for name in ("torch", "mindspore"):
    sys.modules[name] = None  # importing it now raises ImportError
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


ENGINES = ("ocrnet.engines.torch", "ocrnet.engines.mindspore")


def core_modules() -> list[str]:
    # walk_packages imports each package, and the MindSpore engine refuses NumPy 2 at import: ignore this error.
    modules = [m.name for m in pkgutil.walk_packages(ocrnet.__path__, "ocrnet.", onerror=lambda name: None)]
    return ["ocrnet", *(name for name in modules if not name.startswith(ENGINES) and name != "ocrnet.__main__")]


def run(*modules: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BLOCK, *modules], capture_output=True, text=True, check=False)


def test_the_core_imports_no_framework():
    names = core_modules()
    assert {"ocrnet.train.trainer", "ocrnet.engines.base", "ocrnet.weights.pth", "ocrnet.export.open"} <= set(names)
    result = run(*names)
    assert result.returncode == 0, result.stderr


def test_the_test_blocks_frameworks():
    assert run("ocrnet.engines.torch.engine").returncode != 0
