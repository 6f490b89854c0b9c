"""Decoders: transposed convolutions, autoencoders, style transfer, a diffusion block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.any.case import Case, features, images
from tests.zoo.common import conv_bn_act, init_convs


class DCGAN(nn.Module):
    """Noise to picture."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(24, 32, 4, 1, 0, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(True),
            nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )
        init_convs(self)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z.view(z.size(0), 24, 1, 1))


class GroupedDecoder(nn.Module):
    """Grouped transposed convolutions with output padding and dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(conv_bn_act(3, 16, 3, 2), conv_bn_act(16, 24, 3, 2))
        self.up1 = nn.ConvTranspose2d(24, 16, 3, 2, 1, output_padding=1, groups=4)
        self.up2 = nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1, groups=8)
        self.out = nn.Conv2d(8, 3, 3, padding=1)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enc(x)
        x = F.leaky_relu(self.up1(x), 0.2)
        x = F.leaky_relu(self.up2(x), 0.2)
        return torch.tanh(self.out(x) / 4)


class VAE(nn.Module):
    """Returns reconstruction, mean and log-variance; samples only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn_act(1, 12, 3, 2), conv_bn_act(12, 16, 3, 2))
        self.fc_mu, self.fc_var = nn.Linear(16 * 16, 8), nn.Linear(16 * 16, 8)
        self.decoder_input = nn.Linear(8, 16 * 16)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 12, 3, 2, 1, output_padding=1),
            nn.BatchNorm2d(12),
            nn.LeakyReLU(),
            nn.ConvTranspose2d(12, 1, 2, 2),
        )
        init_convs(self)

    def encode(self, x: Tensor) -> list[Tensor]:
        result = torch.flatten(self.encoder(x), start_dim=1)
        return [self.fc_mu(result), self.fc_var(result)]

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        if not self.training:
            return mu
        std = torch.exp(0.5 * logvar)
        return torch.randn_like(std) * std + mu

    def decode(self, z: Tensor) -> Tensor:
        result = self.decoder_input(z)
        result = result.view(-1, 16, 4, 4)
        return self.decoder(result).sigmoid()

    def forward(self, input: Tensor) -> list[Tensor]:
        mu, log_var = self.encode(input)
        z = self.reparameterize(mu, log_var)
        return [self.decode(z), mu, log_var]


class StyleTransfer(nn.Module):
    """Johnson's network: reflection padding, instance norm, upsampling before convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = self._layer(3, 12, 5, 1)
        self.conv2 = self._layer(12, 16, 3, 2)
        self.res = self._layer(16, 16, 3, 1)
        self.conv3 = self._layer(16, 12, 3, 1)
        self.out = nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(12, 3, 5))

    @staticmethod
    def _layer(cin: int, cout: int, kernel: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.ReflectionPad2d(kernel // 2),
            nn.Conv2d(cin, cout, kernel, stride),
            nn.InstanceNorm2d(cout, affine=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = x + self.res(x)
        x = F.interpolate(x, mode="nearest", scale_factor=2)
        return self.out(F.relu(self.conv3(x)))


class Denoiser(nn.Module):
    """A diffusion step: sinusoidal time embedding, group norm, SiLU, scale and shift."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.dim = 16
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 2 * channels))
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def embed(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        freqs = torch.exp(-math.log(100) * torch.arange(half, dtype=torch.float32) / half)
        args = t[:, None].float() * freqs[None]
        return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = self.time(self.embed(timesteps))
        scale, shift = emb[:, :, None, None].chunk(2, dim=1)
        x = self.conv_in(x)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(F.silu(h))
        return self.conv_out(x + h)


def noisy(batch: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Pictures and the step each is at, an integer."""
    steps = torch.randint(0, 50, (batch,), generator=torch.Generator().manual_seed(seed))
    return images()(batch, seed, size), steps


CASES = {
    "dcgan": Case(DCGAN, features(24), 0),
    "grouped_decoder": Case(GroupedDecoder, images(), 32, 40),
    "vae": Case(VAE, images(1), 16),
    # torch itself cannot mirror an empty batch
    "style_transfer": Case(StyleTransfer, images(), 32, 40, empty=False),
    "denoiser": Case(Denoiser, noisy, 16, 24),
}
