"""Files of weights: our checkpoints, and the files of other implementations."""

from ocrnet.weights.load import (
    DOCUMENT,
    FAMILIES,
    Weights,
    identity,
    read,
    read_backbone,
    read_only_backbone,
    write_ckpt,
)

__all__ = ["DOCUMENT", "FAMILIES", "Weights", "identity", "read", "read_backbone", "read_only_backbone", "write_ckpt"]
