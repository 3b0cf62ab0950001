"""Set what MindSpore reads once, when it is imported."""

import ocrnet.engines.mindspore  # noqa: F401
