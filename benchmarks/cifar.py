"""CIFAR-10 pictures, and the small networks that ``accuracy_cifar10`` trains on them."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from tests.zoo.any.vit import VisionTransformer
from tests.zoo.mobilenet_v2 import mobilenet_v2_cifar
from tests.zoo.resnet import resnet20

RESULTS = Path(__file__).parent / "results"
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Recipe:
    """How one network is trained; part of the name under which its checkpoint is kept."""

    build: Callable[[], nn.Module]
    epochs: int
    peak_rate: float
    batch: int = 64
    decay: float = 5e-4
    smoothing: float = 0.05
    adam: bool = False


# The pictures shrink to 8x8 before the wide stages: a quarter of the arithmetic of keeping 32x32,
# which is what lets 8,000 pictures be learned in a quarter of an hour on two cores.
RECIPES: dict[str, Recipe] = {
    "resnet20": Recipe(resnet20, epochs=30, peak_rate=0.15),
    "mobilenet_v2": Recipe(
        lambda: mobilenet_v2_cifar(width=0.5, strides=(1, 1, 2, 2, 2, 1, 1, 1)),
        epochs=30,
        peak_rate=0.1,
    ),
    "vit": Recipe(
        lambda: VisionTransformer(dim=128, depth=8, patch=4),
        epochs=40,
        peak_rate=1e-3,
        decay=0.05,
        adam=True,
    ),
    # For a machine that has other things to do: a minute for each epoch, on one core.
    "mobilenet_v2_small": Recipe(
        lambda: mobilenet_v2_cifar(width=0.35, strides=(2, 1, 2, 2, 1, 1, 1, 1)),
        epochs=8,
        peak_rate=0.1,
    ),
}


@dataclass(frozen=True)
class Pictures:
    """Images float32 [N, 3, 32, 32], normalised per channel, and labels int64 [N]."""

    images: Tensor
    labels: Tensor


def load(path: Path) -> Pictures:
    """Read an ``.npz`` of ``images`` uint8 [N, 32, 32, 3] and ``labels`` uint8 [N]."""
    with np.load(path, allow_pickle=False) as archive:
        raw = torch.from_numpy(archive["images"])
        labels = torch.from_numpy(archive["labels"]).long()
    images = raw.permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return Pictures(((images - mean) / std).contiguous(), labels)


def batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """The images in order, ``size`` at a time."""
    yield from images.split(size)


def accuracy(model: Callable[[Tensor], Tensor], data: Pictures, batch: int = 250) -> float:
    """Share of right answers, in percent."""
    with torch.no_grad():
        outputs = torch.cat([model(images) for images in batches(data.images, batch)])
    return 100.0 * (outputs.argmax(1) == data.labels).double().mean().item()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images, and cut each 32x32 at random out of its 40x40 padded self."""
    count = images.shape[0]
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4))
    top = torch.randint(0, 9, (count, 1), generator=generator)
    left = torch.randint(0, 9, (count, 1), generator=generator)
    rows = (top + torch.arange(32)).view(count, 1, 32, 1)
    columns = (left + torch.arange(32)).view(count, 1, 1, 32)
    index = torch.arange(count).view(-1, 1, 1, 1)
    return padded[index, torch.arange(3).view(1, -1, 1, 1), rows, columns]


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.adam:
        return torch.optim.AdamW(groups, lr=recipe.peak_rate)
    return torch.optim.SGD(groups, lr=recipe.peak_rate, momentum=0.9, nesterov=True)


def train(
    model: nn.Module,
    recipe: Recipe,
    data: Pictures,
    seed: int,
    after: Callable[[int, float], None],
) -> None:
    """Train ``model`` by ``recipe``; ``after`` gets the number and the mean loss of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, recipe)
    count = len(data.labels) // recipe.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_rate, total_steps=recipe.epochs * count, pct_start=0.2
    )
    for epoch in range(recipe.epochs):
        model.train()
        total = 0.0
        order = torch.randperm(len(data.labels), generator=generator)
        for chosen in order[: count * recipe.batch].split(recipe.batch):
            images = augment(data.images[chosen], generator)
            outputs = model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(outputs, data.labels[chosen], label_smoothing=recipe.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        after(epoch, total / count)


def trained(
    name: str, data: Pictures, check: Pictures, *, seed: int = 0, epochs: int | None = None
) -> nn.Module:
    """The network ``name``, trained, in eval mode; from its checkpoint if there is one.

    The checkpoint lies in ``benchmarks/results``, which git ignores.

    Example:
        >>> model = trained("resnet20", load(train_file), load(val_file))  # doctest: +SKIP
    """
    recipe = RECIPES[name]
    recipe = dataclasses.replace(recipe, epochs=epochs or recipe.epochs)
    path = RESULTS / f"cifar10_{name}_{recipe.epochs}epochs_seed{seed}.pt"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = recipe.build()
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        print(f"training {name} for {recipe.epochs} epochs", file=sys.stderr)
        convert_conv2d_weight_memory_format(model, torch.channels_last)
        start = time.perf_counter()

        def note(epoch: int, loss: float) -> None:
            del loss
            if epoch % 5 == 4:
                score, spent = accuracy(model.eval(), check), time.perf_counter() - start
                print(f"epoch {epoch + 1}: {score:.2f} % after {spent:.0f} s", file=sys.stderr)

        train(model, recipe, data, seed, note)
    RESULTS.mkdir(exist_ok=True)
    convert_conv2d_weight_memory_format(model, torch.contiguous_format)
    partial = path.with_suffix(".part")
    torch.save(model.state_dict(), partial)
    partial.rename(path)
    return model.eval()
