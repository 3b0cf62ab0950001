"""SGD with momentum whose step changes nothing if loss or gradients are not finite."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from ocrnet import architecture, config


class SGD:
    """SGD with PyTorch's functional interface.

    PyTorch's class is not used because creating it imports the compiler, which takes a third of the time of a short
    run. ``momentum`` contains the momentum buffers by parameter name, initially zero; it is empty without momentum.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer_cfg: config.Optimizer) -> None:
        self.parameters, self.optimizer_cfg = parameters, optimizer_cfg
        self.momentum = {name: torch.zeros_like(p) for name, p in parameters.items()} if optimizer_cfg.momentum else {}
        decays = {name: architecture.decays(name, optimizer_cfg.decay) for name in parameters}
        # mutation: apply-weight-decay
        self._groups = [
            (weight_decay, names)
            for weight_decay, decayed in ((optimizer_cfg.weight_decay, True), (0.0, False))
            if (names := [name for name in parameters if decays[name] is decayed])
        ]

    def free_gradients(self) -> None:
        """Set ``grad`` of all parameters to None; the next backward pass allocates new gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float | Tensor, divisor: Tensor, finite: Tensor) -> None:
        """Update parameters and momentum with the gradients divided by ``divisor``, if ``finite`` is true.

        Args:
            lr: The learning rate, a number or a scalar tensor.
            divisor: The divisor of the gradients, a float32 scalar.
            finite: Bool scalar; False leaves parameters and momentum unchanged.
        """
        # mutation: keep-weights-of-nonfinite-step
        found_inf = (~finite).float()
        for weight_decay, names in self._groups:
            with_gradient = [name for name in names if self.parameters[name].grad is not None]
            sgd(
                [self.parameters[name] for name in with_gradient],
                [self.parameters[name].grad for name in with_gradient],  # type: ignore[misc]
                [self.momentum.get(name) for name in with_gradient],
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
