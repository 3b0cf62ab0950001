"""Loss scaling, which prevents the underflow of float16 gradients."""

from collections.abc import Mapping

import numpy as np
import torch

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000


class LossScaler:
    """A loss scale: halved after a non-finite step, doubled after 2000 finite steps in a row; or fixed at 1.

    Its tensors are on the device and are updated in place, because a CUDA graph reads them at a fixed address.
    """

    def __init__(self, device: torch.device, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.scale = torch.full((), 2.0**16 if dynamic else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss times the scale, for the backward pass."""
        return loss * self.scale if self.dynamic else loss

    def update(self, finite: torch.Tensor) -> None:
        """Update the scale after one step, without synchronizing the host with the device."""
        if not self.dynamic:
            return
        good_steps = torch.where(finite, self.good_steps + 1, 0)
        grown = good_steps >= INTERVAL
        self.scale.mul_(torch.where(finite, torch.where(grown, GROWTH, 1.0), BACKOFF))
        self.good_steps.copy_(torch.where(grown, 0, good_steps))

    def state(self) -> dict[str, np.ndarray]:
        """Return scaler/scale and scaler/good_steps; return an empty dict if the scale is fixed."""
        if not self.dynamic:
            return {}
        return {"scaler/scale": self.scale.cpu().numpy(), "scaler/good_steps": self.good_steps.cpu().numpy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Load the scale from ``state`` if it has one; otherwise keep the initial scale."""
        if self.dynamic and "scaler/scale" in state:
            self.scale.copy_(torch.as_tensor(state["scaler/scale"]))
            self.good_steps.copy_(torch.as_tensor(state["scaler/good_steps"]))
