"""An LSTM that reads handwritten digits row by row, in float and in int8.

The data are the 1,797 pictures of 8 x 8 pixels that scikit-learn carries. Run it with
``python examples/lstm_digits.py``; it takes about half a minute.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxquant
from fxquant.errors import SpeedWarning


class Reader(nn.Module):
    """Eight rows of eight pixels, one after the other; the last state says which digit it is."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Scores ``[batch, 10]`` of pictures ``[batch, 8, 8]``."""
        states, _ = self.lstm(rows)
        scores: Tensor = self.head(states[:, -1])
        return scores


@dataclass(frozen=True)
class Result:
    """Right answers on pictures that were not trained on, in percent, and sizes in bytes."""

    float_accuracy: float
    int8_accuracy: float
    float_bytes: int
    int8_bytes: int


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures and labels to train on, and 597 to test with."""
    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32) / 16.0
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    known, others = order[:1200], order[1200:]
    return pictures[known], labels[known], pictures[others], labels[others]


def train(model: Reader, pictures: Tensor, labels: Tensor, epochs: int) -> None:
    """Adam, one cycle."""
    batches = len(pictures) // 60
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(pictures)).chunk(batches):
            optimizer.zero_grad()
            F.cross_entropy(model(pictures[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()


def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Percent of right answers."""
    with torch.no_grad():
        right = model(pictures).argmax(1) == labels
    return 100.0 * float(right.double().mean())


def compare(hidden: int = 128, epochs: int = 20) -> Result:
    """Train in float, quantize, and test both."""
    torch.manual_seed(0)
    pictures, labels, others, answers = digits()
    model = Reader(hidden)
    train(model, pictures, labels, epochs)
    model.eval()
    with warnings.catch_warnings():
        # Eight steps of so small a layer take longer in int8 than in float; a larger one does not.
        warnings.simplefilter("ignore", SpeedWarning)
        # The state of an LSTM is quantized row by row while it runs; the linear, beforehand.
        q = fxquant.quantize(model, [pictures[:100]], overrides={nn.LSTM: "dynamic"})
    sizes = fxquant.report(q).to_dict()
    return Result(
        accuracy(model, others, answers),
        accuracy(q, others, answers),
        sizes["bytes_before"],
        sizes["bytes_after"],
    )


def main() -> None:
    """Print what :func:`compare` finds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    found = compare(args.hidden, args.epochs)
    print(f"float  {found.float_accuracy:.1f} % right, {found.float_bytes / 1024:.0f} KiB")
    print(f"int8   {found.int8_accuracy:.1f} % right, {found.int8_bytes / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
