"""Modules called twice, weights with two owners, weights computed in forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.zoo.any.case import Case, Data, features, images, rows, tokens
from tests.zoo.common import conv_bn_act, init_convs


def two_images(batch: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """A picture and another one."""
    return images()(batch, seed, size), images()(batch, seed + 50, size)


class Siamese(nn.Module):
    """One network for two inputs, and the angle between what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            conv_bn_act(3, 16, 3, 2),
            conv_bn_act(16, 24, 3, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.fc = nn.Linear(24, 16)
        init_convs(self)

    def forward_once(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = self.forward_once(a), self.forward_once(b)
        return first, second, F.cosine_similarity(first, second)


class ReusedConv(nn.Module):
    """A convolution that is followed by a batch norm in one place and by none in another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(16, 10)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.bn1(self.conv(x)))
        x = self.relu(self.conv(x))
        x = self.relu(self.bn2(self.conv(x)))
        return self.fc(x.mean((2, 3)))


class NestedReuse(nn.Module):
    """The same block twice inside a Sequential, which stands in two places itself."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        block = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), act)
        self.body = nn.Sequential(block, act, block)
        self.again = self.body
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), act)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.body(self.stem(x))))


class TiedAutoencoder(nn.Module):
    """The decoder multiplies by the encoder's weights, transposed in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder1, self.encoder2 = nn.Linear(32, 24), nn.Linear(24, 12)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(24)), nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.encoder1(x))
        code = self.encoder2(h)
        h = torch.relu(F.linear(code, self.encoder2.weight.t(), self.bias1))
        return F.linear(h, self.encoder1.weight.t()) + self.bias2


class TiedLanguageModel(nn.Module):
    """The output layer is the embedding."""

    def __init__(self, vocabulary: int = 64, dim: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList([nn.Linear(dim, dim) for _ in range(2)])
        self.norm = nn.LayerNorm(dim)
        self.decoder = nn.Linear(dim, vocabulary, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return self.decoder(self.norm(x))


class WeightNorms(nn.Module):
    """Weight norm and spectral norm, as parametrizations."""

    def __init__(self) -> None:
        super().__init__()
        self.a = weight_norm(nn.Conv2d(3, 16, 3, 2, 1))
        self.b = spectral_norm(nn.Conv2d(16, 16, 3, 1, 1))
        self.c = weight_norm(nn.Conv2d(16, 16, 1))
        self.fc = spectral_norm(nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.a(x), 0.2)
        x = F.leaky_relu(self.b(x), 0.2)
        x = F.leaky_relu(self.c(x), 0.2)
        return self.fc(x.mean(dim=(2, 3)))


class StandardizedConv2d(nn.Conv2d):
    """Weight standardization: a subclass that computes its weight in every call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        mean = weight.mean(dim=(1, 2, 3), keepdim=True)
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = (weight - mean) / std.expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class MaskedLinear(nn.Linear):
    """Pruned: the mask is multiplied in every call."""

    mask: Tensor

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(cin, cout)
        self.register_buffer("mask", (torch.rand(cout, cin) > 0.3).float())

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


class ComputedWeights(nn.Module):
    """Both of them in a network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = StandardizedConv2d(3, 16, 3, 2, 1)
        self.conv2 = StandardizedConv2d(16, 16, 3, 2, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.fc1, self.fc2 = MaskedLinear(16, 24), MaskedLinear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.conv2(x) * 0.1)
        return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))


class SharedLayers(nn.Module):
    """ALBERT's way: one layer, applied again and again in a loop."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.depth = 3
        self.mix = nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = self.norm(x + torch.tanh(self.mix(x)))
            x = self.norm(x + self.ffn(x))
        return x


_pairs: Data = two_images
CASES = {
    "siamese": Case(Siamese, _pairs, 32, 40),
    "reused_conv_bn": Case(ReusedConv, images(), 32, 40, plain=True),
    "nested_reuse": Case(NestedReuse, images(), 32, 40, plain=True),
    "tied_autoencoder": Case(TiedAutoencoder, features(32), 0),
    "tied_embedding": Case(TiedLanguageModel, tokens(64), 12, 20),
    "weight_norms": Case(WeightNorms, images(), 16, 24),
    "computed_weights": Case(ComputedWeights, images(), 32, 40),
    "shared_layers": Case(SharedLayers, rows(32), 10, 16),
}
