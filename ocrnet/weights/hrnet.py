"""The HRNet authors' files: canonical names already, under wrappers."""

from collections.abc import Mapping

import numpy as np

PREFIXES = ("module.", "model.")
DROPPED = ("loss.", "criterion.")


def canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Peel ``module.`` and ``model.``; leave out the loss's tensors and BN's num_batches_tracked."""
    peeled = {}
    for name, array in tensors.items():
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if not name.startswith(DROPPED) and not name.endswith("num_batches_tracked"):
            peeled[name] = array
    return peeled
