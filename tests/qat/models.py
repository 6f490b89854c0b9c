"""Small networks that are trained in the tests of quantization-aware training."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.numerics.fake_quantizer import FakeQuantizer


class Residual(nn.Module):
    """Convolutions and batch norms, an activation, a sum; a parameter that is declared early."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)  # declared first, called last
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3, momentum=0.2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        made: Tensor = self.head(x.mean((2, 3)))
        return made


class Upward(nn.Module):
    """Transposed convolutions with batch norms, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.bn = nn.BatchNorm2d(8)
        self.out = nn.ConvTranspose2d(8, 4, 3, padding=1)
        self.bn_out = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.up(F.relu(self.down(x)))))
        made: Tensor = self.bn_out(self.out(x))
        return made


class Dense(nn.Module):
    """Linears with batch norm and dropout, as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.bn = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.25)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.bn(self.first(x))))
        x = F.dropout(F.relu(self.second(x)), 0.5, self.training)
        made: Tensor = self.last(x)
        return made


class Twice(nn.Module):
    """One convolution and one batch norm, called twice, and a table that is also the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return F.relu(self.bn(self.conv(x)))


class Tied(nn.Module):
    """An embedding whose table is the weight of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.mix = nn.Linear(16, 16)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(F.gelu(self.mix(self.table(x))))
        return made


class Attending(nn.Module):
    """A transformer layer with dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(12, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.layer(self.inside(x)))
        return made


def pictures(seed: int = 0, batch: int = 4) -> Tensor:
    """A batch of small pictures."""
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows(seed: int = 0, batch: int = 8) -> Tensor:
    """A batch of feature rows."""
    return torch.randn(batch, 12, generator=torch.Generator().manual_seed(seed))


def sequences(seed: int = 0, batch: int = 4) -> Tensor:
    """A batch of sequences of features."""
    return torch.randn(batch, 6, 12, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 0, batch: int = 4) -> Tensor:
    """A batch of sequences of tokens."""
    return torch.randint(0, 20, (batch, 6), generator=torch.Generator().manual_seed(seed))


Case = tuple[Callable[[], nn.Module], Callable[..., Tensor]]
CASES: dict[str, Case] = {
    "residual": (Residual, pictures),
    "upward": (Upward, pictures),
    "dense": (Dense, rows),
    "twice": (Twice, pictures),
    "tied": (Tied, tokens),
    "attending": (Attending, sequences),
}


def built(name: str, seed: int = 0) -> nn.Module:
    """The network called ``name``, in training mode, with statistics that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CASES[name][0]().train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, -1.0, 1.5)
                nn.init.normal_(module.bias)
        with torch.no_grad():
            for step in range(5):
                model(CASES[name][1](100 + step))
    return model


def trained(
    model: nn.Module, data: Callable[..., Tensor], steps: int = 3, rate: float = 0.01
) -> nn.Module:
    """``model`` after a few steps towards small outputs, with weight decay."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], rate, 0.9, weight_decay=1e-3
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for step in range(steps):
            optimizer.zero_grad()
            model(data(step)).square().mean().backward()
            optimizer.step()
    return model


def switch(model: nn.Module, quantizing: bool) -> None:
    """Turn every fake-quant on or off."""
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.switch(quantizing=quantizing)
