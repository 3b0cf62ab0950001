"""The plain baseline: OCRNet trained and run as in the authors' code, without any of our optimizations.

It runs eagerly in float32 and channels-first, upsamples both heads to full resolution, uses PyTorch's cross-entropy
with class weights and PyTorch's SGD, and reads the loss after every step. The modules are ours, which compute the same
as the authors' (tests/reference), in PyTorch's default memory order. Nothing is slower than in that recipe. ``amp``
adds bfloat16 autocast, which needs no loss scaling, and ``channels_last`` that memory order, as current toolboxes do.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.config import Data
from ocrnet.engines.torch.ocr import OCRNet

AUX, OCR = 0.4, 1.0
Images = np.ndarray | torch.Tensor


class Plain:
    """A network and its optimizer. Images are uint8 N,H,W,3 and labels uint8 N,H,W, as arrays or (pinned) tensors."""

    def __init__(self, arch: Arch, device: str = "cpu", *, amp: bool = False, channels_last: bool = False) -> None:
        self.device, self.amp = torch.device(device), amp
        self.order = torch.channels_last if channels_last else torch.contiguous_format
        self.model = OCRNet(arch, low_resolution=False)
        state = {name: torch.from_numpy(array) for name, array in architecture.init(arch, 1).items()}
        self.model.load_state_dict(state)
        self.model.to(self.device, memory_format=self.order)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.criterion = nn.CrossEntropyLoss(torch.ones(arch.num_classes, device=self.device), ignore_index=255)
        self.mean = torch.tensor(Data.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(Data.std, device=self.device).view(1, 3, 1, 1)

    def train(self, images: Images, label: Images) -> float:
        """Run one training step; return its loss."""
        self.model.train()
        target = torch.as_tensor(label).to(self.device, non_blocking=True).long()
        self.optimizer.zero_grad()
        with self._autocast():
            heads = self.model(self._input(images))
        aux, ocr = (self._full(logits.float(), target.shape[1:]) for logits in heads)
        loss = AUX * self.criterion(aux, target) + OCR * self.criterion(ocr, target)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def predict(self, images: Images) -> np.ndarray:
        """Return class indices, uint8 N,H,W."""
        self.model.eval()
        with self._autocast():
            logits = self.model(self._input(images))[1].float()
        logits = self._full(logits, images.shape[1:3])
        return logits.argmax(1).to(torch.uint8).cpu().numpy()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def _input(self, images: Images) -> torch.Tensor:
        x = torch.as_tensor(images).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        x = x.contiguous(memory_format=self.order).float() / 255
        return (x - self.mean) / self.std

    def _full(self, logits: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=True)
