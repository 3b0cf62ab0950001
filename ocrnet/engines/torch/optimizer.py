"""SGD with momentum, which leaves everything as it is after a step that was not finite."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from ocrnet import architecture, config


class SGD:
    """PyTorch's SGD, called as a function: making its class loads the compiler, a third of a short run's time.

    Momentum, by parameter name, begins as zeros, as the state of a file would; it is empty where there is none.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer_cfg: config.Optimizer) -> None:
        self.parameters, self.optimizer_cfg = parameters, optimizer_cfg
        self.momentum = {name: torch.zeros_like(p) for name, p in parameters.items()} if optimizer_cfg.momentum else {}
        decays = {name: architecture.decays(name, optimizer_cfg.decay) for name in parameters}
        # mutation: apply-weight-decay
        self._groups = [
            (weight_decay, names)
            for weight_decay, which in ((optimizer_cfg.weight_decay, True), (0.0, False))
            if (names := [name for name in parameters if decays[name] is which])
        ]

    def forget_gradients(self) -> None:
        """Free the gradients; the next backward makes its own."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float | Tensor, divisor: Tensor, finite: Tensor) -> None:
        """Take a step with the gradients over ``divisor`` (float32 scalar) if ``finite`` (bool scalar)."""
        # mutation: keep-weights-of-nonfinite-step
        found_inf = (~finite).float()
        for weight_decay, names in self._groups:
            there = [name for name in names if self.parameters[name].grad is not None]
            sgd(
                [self.parameters[name] for name in there],
                [self.parameters[name].grad for name in there],  # type: ignore[misc]
                [self.momentum.get(name) for name in there],
                fused=True,
                grad_scale=divisor,
                found_inf=found_inf,
                weight_decay=weight_decay,
                momentum=self.optimizer_cfg.momentum,
                lr=lr,  # type: ignore[arg-type]
                dampening=0.0,
                nesterov=self.optimizer_cfg.nesterov,
                maximize=False,
            )
