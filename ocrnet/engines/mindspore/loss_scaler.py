"""Loss scaling, which prevents the underflow of float16 gradients."""

from collections.abc import Mapping

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000
INITIAL_SCALE = 2.0**10  # untrained weights overflow at larger scales: from 2**16, six of the first steps were skipped


class LossScaler(nn.Cell):
    """A loss scale: halved after a non-finite step, doubled after 2000 finite steps in a row; or fixed at ``fixed``."""

    def __init__(self, *, dynamic: bool, fixed: float = 1.0) -> None:
        super().__init__()
        self.dynamic, self.is_one = dynamic, not dynamic and fixed == 1.0
        initial = Tensor(np.array(INITIAL_SCALE if dynamic else fixed, np.float32))
        self.scale = Parameter(initial, name="scale", requires_grad=False)
        self.good_steps = Parameter(Tensor(np.array(0, np.int32)), name="good_steps", requires_grad=False)

    def update(self, finite: Tensor) -> None:
        """Update the scale after one step, within its graph."""
        if self.dynamic:
            good = ops.where(finite, self.good_steps + 1, ops.zeros_like(self.good_steps))
            grown = good >= INTERVAL
            factor = ops.where(finite, ops.where(grown, Tensor(GROWTH), Tensor(1.0)), Tensor(BACKOFF))
            ops.assign(self.scale, self.scale * factor)
            ops.assign(self.good_steps, ops.where(grown, ops.zeros_like(good), good))

    def state(self) -> dict[str, np.ndarray]:
        """Return scaler/scale and scaler/good_steps; return an empty dict if the scale is fixed."""
        if not self.dynamic:
            return {}
        good_steps = self.good_steps.asnumpy().astype(np.int64)
        return {"scaler/scale": self.scale.asnumpy().copy(), "scaler/good_steps": good_steps}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Load the scale from a state that contains one; otherwise keep the current scale."""
        if self.dynamic and "scaler/scale" in state:
            ops.assign(self.scale, Tensor(np.asarray(state["scaler/scale"], np.float32)))
            ops.assign(self.good_steps, Tensor(np.asarray(state["scaler/good_steps"], np.int32)))
