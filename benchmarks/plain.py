"""The rival: OCRNet as the authors' code trains and predicts with it, without any of our choices.

Eager, channels-first, float32; both heads brought to full resolution; PyTorch's cross-entropy with class weights and
its own SGD; the loss is fetched every step. The network's modules are ours, which compute what the authors' compute
(tests/twins), in PyTorch's default memory order. Nothing is made slower than that recipe has it.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ocrnet import spec
from ocrnet.config import Data
from ocrnet.engines.torch.ocr import OCRNet
from ocrnet.spec import Arch

AUX, OCR = 0.4, 1.0


class Plain:
    """One network with its optimizer; images are uint8 N,H,W,3 and labels uint8 N,H,W, as for our engine."""

    def __init__(self, arch: Arch, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = OCRNet(arch)
        state = {name: torch.from_numpy(array) for name, array in spec.init(arch, 1).items()}
        self.model.load_state_dict(state)
        self.model.to(self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.criterion = nn.CrossEntropyLoss(torch.ones(arch.num_classes, device=self.device), ignore_index=255)
        self.mean = torch.tensor(Data.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(Data.std, device=self.device).view(1, 3, 1, 1)

    def train(self, images: np.ndarray, label: np.ndarray) -> float:
        """Take one step; return its loss."""
        self.model.train()
        target = torch.from_numpy(label).to(self.device).long()
        self.optimizer.zero_grad()
        aux, ocr = (self._full(logits, target.shape[1:]) for logits in self.model(self._input(images)))
        loss = AUX * self.criterion(aux, target) + OCR * self.criterion(ocr, target)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return class indices, uint8 N,H,W."""
        self.model.eval()
        logits = self._full(self.model(self._input(images))[1], images.shape[1:3])
        return logits.argmax(1).to(torch.uint8).cpu().numpy()

    def _input(self, images: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).contiguous().float() / 255
        return (x - self.mean) / self.std

    def _full(self, logits: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=True)
