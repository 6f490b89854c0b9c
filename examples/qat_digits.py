"""Quantization-aware training on handwritten digits: four bits a weight, and what that costs.

A small network of depthwise and pointwise convolutions is trained in float. With weights of four
bits and one scale a tensor, static quantization loses much of what it learned; some epochs of
training with the rounding errors bring it back. The data are the 1,797 pictures of 8 x 8 pixels
that scikit-learn carries. Run it with ``python examples/qat_digits.py``; it takes half a minute.
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
from fxquant.schedule import freeze_norms

BITS = fxquant.QConfig(weight=fxquant.QSpec("int8", 4, symmetric=True, observer="minmax"))
"""Four bits a weight, one scale a tensor."""


def block(inside: int, outside: int) -> nn.Sequential:
    """A depthwise convolution and a pointwise one, each with its batch norm."""
    return nn.Sequential(
        nn.Conv2d(inside, inside, 3, padding=1, groups=inside, bias=False),
        nn.BatchNorm2d(inside),
        nn.ReLU(),
        nn.Conv2d(inside, outside, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(),
    )


class Reader(nn.Module):
    """Scores ``[batch, 10]`` of pictures ``[batch, 1, 8, 8]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(block(width, 2 * width), block(2 * width, 2 * width))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """See the class."""
        x = self.blocks(F.max_pool2d(torch.relu(self.stem(pictures)), 2))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


@dataclass(frozen=True)
class Result:
    """Right answers on pictures that were not trained on, in percent.

    Args:
        in_float: of the float network.
        static: with four bits a weight, calibrated.
        trained: with four bits a weight, trained so.
        worst: the largest difference of any op between what was trained and what runs, in codes.
    """

    in_float: float
    static: float
    trained: float
    worst: int


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures and labels to train on, and 597 to test with."""
    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    known, others = order[:1200], order[1200:]
    return pictures[known], labels[known], pictures[others], labels[others]


def train(model: nn.Module, pictures: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """Adam, one cycle."""
    batches = len(pictures) // 60
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * batches)
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


def compare(width: int = 12, epochs: int = 12) -> Result:
    """Train in float; quantize; train on with the rounding errors, quantize, and check."""
    torch.manual_seed(0)
    pictures, labels, others, answers = digits()
    model = Reader(width).train()
    train(model, pictures, labels, epochs, 0.01)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpeedWarning)  # so small a network gains no time
        static = fxquant.quantize(model, pictures.split(60), qconfig=BITS, backend="reference")
        prepared = fxquant.prepare(
            model, mode="qat", example_inputs=pictures[:1], qconfig=BITS, backend="reference"
        )
        fxquant.calibrate(prepared, pictures.split(60))
        # With so few bits a channel may round to nothing in one step and to something in the next,
        # and statistics that follow that are those of neither: those of float training are kept.
        freeze_norms(prepared)
        train(prepared.train(), pictures, labels, epochs, 0.003)
        trained = fxquant.convert(prepared, backend="reference")
    verified = fxquant.verify(prepared, trained, others.split(200))
    if not verified.ok:
        raise RuntimeError(str(verified))
    return Result(
        accuracy(model, others, answers),
        accuracy(static, others, answers),
        accuracy(trained, others, answers),
        verified.worst,
    )


def main() -> None:
    """Print the three accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    found = compare(args.width, args.epochs)
    print(f"float            {found.in_float:.2f} %")
    print(f"static, 4 bits   {found.static:.2f} %")
    print(f"trained, 4 bits  {found.trained:.2f} %, {found.worst} codes from what was trained")


if __name__ == "__main__":
    main()
