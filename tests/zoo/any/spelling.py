"""The same few layers in every way people spell them."""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.any.case import Case, features, images
from tests.zoo.common import conv_bn_act, init_convs


class Additions(nn.Module):
    """Residual additions as a method, in place, with alpha, as an operator, with a number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.convs = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(6)])
        self.fc = nn.Linear(16, 10)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        a, b, c, d, e, f = self.convs
        x = x.add(a(x))
        x = F.relu(x).add_(b(x))
        x = torch.add(x, c(x), alpha=2)
        x = torch.sub(torch.relu(x), d(x), alpha=1)
        x = operator.add(x, e(x).sub(0.5))
        x += f(x).mul(0.5)
        x = 1 + x
        x -= 1.0
        return self.fc(x.mean(dim=(-2, -1)))


class FunctionalOnly(nn.Module):
    """No layer modules: parameters and F calls, arguments by keyword."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()

        def kaiming(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * math.sqrt(2 / math.prod(shape[1:])))

        self.w1, self.b1 = kaiming(12, 3, 3, 3), nn.Parameter(0.1 * torch.randn(12))
        self.w2 = kaiming(16, 12, 3, 3)
        self.gamma = nn.Parameter(torch.rand(16) + 0.5)
        self.beta = nn.Parameter(0.1 * torch.randn(16))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))
        self.wd = kaiming(16, 1, 3, 3)
        self.w3, self.b3 = kaiming(10, 16), nn.Parameter(0.1 * torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(input=x, weight=self.w1, bias=self.b1, stride=2, padding=1)
        x = F.relu(x, inplace=True)
        x = torch.conv2d(x, self.w2, None, 1, 1)
        x = F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, training=self.training)
        x = torch.relu_(x)
        x = F.conv2d(x, self.wd, padding="same", groups=16)
        x = F.max_pool2d(F.leaky_relu(x, 0.1), kernel_size=2)
        x = F.adaptive_avg_pool2d(x, output_size=1)
        x = x.view(x.size(0), -1)
        return F.linear(x, weight=self.w3, bias=self.b3)


class InPlace(nn.Module):
    """Everything that can be in place is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1)
        self.conv2 = nn.Conv2d(16, 16, 3, 1, 1)
        self.conv3 = nn.Conv2d(16, 16, 1)
        self.head = nn.Conv2d(16, 6, 1)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x.relu_()
        y = self.conv2(x)
        y.clamp_(min=0, max=6)
        y.mul_(0.5).add_(x)
        z = self.conv3(y)
        z.sigmoid_()
        y *= z
        y.unsqueeze_(0)
        y.squeeze_(0)
        out = self.head(y)
        out.div_(2.0)
        return out


class HandWritten(nn.Module):
    """Activations as formulas: swish, mish, hard swish, GELU by tanh and by erf, softplus."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 16, 16, 3, 1, 1) for i in range(6)])
        self.slope = nn.Parameter(torch.full((16,), 0.2))
        self.fc = nn.Linear(16, 10)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x)
        x = x * torch.sigmoid(x)
        x = F.max_pool2d(self.convs[1](x), 2)
        x = x * torch.tanh(F.softplus(x))
        x = self.convs[2](x)
        x = x * F.relu6(x + 3) / 6
        x = self.convs[3](x)
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))
        x = self.convs[4](x)
        x = x * 0.5 * (1.0 + torch.erf(x / 1.41421))
        x = self.convs[5](x)
        x = F.prelu(x, self.slope)
        return self.fc(x.flatten(2).mean(-1))


class Activations(nn.Module):
    """The activation modules of torch.nn, one after another."""

    def __init__(self) -> None:
        super().__init__()
        acts = (
            nn.PReLU(16),
            nn.Mish(),
            nn.Hardswish(),
            nn.ELU(),
            nn.SELU(),
            nn.Softplus(),
            nn.GLU(1),
        )
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1))
        for act in acts:
            self.layers.append(act)
            self.layers.append(nn.Conv2d(8 if isinstance(act, nn.GLU) else 16, 16, 1))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(16, 10), nn.LogSoftmax(dim=1))
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.layers(x)))


class PaddingModes(nn.Module):
    """Convolutions that reflect, replicate, wrap; padding modules; F.pad with signs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1, padding_mode="reflect")
        self.b = nn.Conv2d(12, 12, 3, padding=1, padding_mode="replicate")
        self.c = nn.Conv2d(12, 12, 3, padding=(1, 1), padding_mode="circular")
        self.d = nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(12, 12, 5), nn.ReLU())
        self.e = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(12, 8, 2))
        self.f = nn.Sequential(nn.ReplicationPad2d(1), nn.ConstantPad2d(-1, 0.0))
        self.same = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(x))
        x = torch.relu(self.c(x))
        x = self.f(self.e(self.d(x)))
        x = F.pad(x, (1, -1, 1, -1), mode="constant", value=0.0)
        return self.same(x)


class Blocks(nn.Module):
    """A plain network by a factory, written without a forward of its own anywhere below."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn_act(3, 16, 3, 2), conv_bn_act(16, 24, 3, act=nn.ReLU6), nn.AvgPool2d(2)
        )
        self.head = nn.Sequential(nn.Dropout2d(), nn.Flatten(), nn.LazyLinear(10))
        init_convs(self)
        self(torch.zeros(2, 3, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Scalars(nn.Module):
    """Buffers and numbers on either side of every operator, in an MLP."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(24, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.register_buffer("mean", torch.full((24,), 0.1))
        self.register_buffer("std", torch.full((24,), 1.5))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = torch.tanh(self.fc1(x)) * self.scale
        x = 2.0 * x - 0.1
        x = -x
        x = self.fc2(x).clamp(min=0) ** 2
        x = 1.0 - torch.exp(-x)
        return self.fc3(x.div(0.5)).abs().add(1).log()


CASES = {
    "additions": Case(Additions, images(), 32, 40, plain=True),
    "functional_only": Case(FunctionalOnly, images(), 32, 40, plain=True, empty=False),
    "in_place": Case(InPlace, images(), 32, 40),
    "hand_written_activations": Case(HandWritten, images(), 24, 32),
    "activation_modules": Case(Activations, images(), 24, 32),
    "padding_modes": Case(PaddingModes, images(), 24, 32),
    "sequential_only": Case(Blocks, images(), 32, plain=True),
    "scalars": Case(Scalars, features(24), 0),
}
