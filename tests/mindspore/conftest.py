"""What MindSpore reads when it is imported, as `ocrnet.engines.mindspore` sets it, for tests that import it first."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
os.environ.setdefault("GLOG_v", "3")
