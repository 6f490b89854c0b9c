"""A multilayer perceptron with BatchNorm1d, for 8x8 pictures in one channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Three linear layers; its two BatchNorm1d follow a linear with and one without bias."""

    def __init__(self, num_classes: int = 10, hidden: int = 128, features: int = 64) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, hidden, bias=False)
        self.bn2 = nn.BatchNorm1d(hidden)
        self.drop = nn.Dropout(0.1)
        self.fc3 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = torch.relu(self.bn1(self.fc1(x)))
        x = self.bn2(self.fc2(x)).relu_()
        x = self.fc3(self.drop(x))
        return x


def mlp(num_classes: int = 10, hidden: int = 128, features: int = 64) -> MLP:
    """An MLP of 26,506 parameters at the defaults."""
    return MLP(num_classes, hidden, features)
