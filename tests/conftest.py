"""What MindSpore reads from the environment at its import must stand there before any test imports it."""

import importlib.util

if importlib.util.find_spec("mindspore"):
    import ocrnet.engines.mindspore  # noqa: F401
