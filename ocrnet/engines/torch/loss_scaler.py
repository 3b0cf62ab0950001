"""The loss scale that keeps float16 gradients from vanishing."""

from collections.abc import Mapping

import numpy as np
import torch

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000


class LossScaler:
    """A loss scale on the device: halved by a step that is not finite, doubled after 2000 that are; or fixed at 1.

    Both tensors are changed in place, so that a recorded step finds them.
    """

    def __init__(self, device: torch.device, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.scale = torch.full((), 2.0**16 if dynamic else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to call backward on."""
        return loss * self.scale if self.dynamic else loss

    def update(self, finite: torch.Tensor) -> None:
        """Learn from one step, without asking the device."""
        if not self.dynamic:
            return
        good_steps = torch.where(finite, self.good_steps + 1, 0)
        grown = good_steps >= INTERVAL
        self.scale.mul_(torch.where(finite, torch.where(grown, GROWTH, 1.0), BACKOFF))
        self.good_steps.copy_(torch.where(grown, 0, good_steps))

    def state(self) -> dict[str, np.ndarray]:
        """Return scaler/scale and scaler/good_steps; nothing where the scale is fixed."""
        if not self.dynamic:
            return {}
        return {"scaler/scale": self.scale.cpu().numpy(), "scaler/good_steps": self.good_steps.cpu().numpy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a state that has a scale; keep the initial one otherwise."""
        if self.dynamic and "scaler/scale" in state:
            self.scale.copy_(torch.as_tensor(state["scaler/scale"]))
            self.good_steps.copy_(torch.as_tensor(state["scaler/good_steps"]))
