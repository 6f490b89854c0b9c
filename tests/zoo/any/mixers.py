"""Mixers, point clouds, volumes, graphs, recommenders: nets that are neither CNN nor BERT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.any.case import Case, features, images, rows, signals, tokens


class MixerBlock(nn.Module):
    """Linears across patches, then across channels."""

    def __init__(self, dim: int, patches: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(patches, 32), nn.GELU(), nn.Linear(32, patches))
        self.channels = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).transpose(1, 2)
        x = x + self.tokens(y).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MLPMixer(nn.Module):
    """Patches by reshape and permute rather than by a convolution."""

    def __init__(self, side: int = 32, patch: int = 8, dim: int = 24) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch * patch, dim)
        self.blocks = nn.Sequential(*[MixerBlock(dim, (side // patch) ** 2) for _ in range(2)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        p = self.patch
        x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        x = self.embed(x.reshape(b, (h // p) * (w // p), c * p * p))
        return self.head(self.norm(self.blocks(x)).mean(1))


class SpatialGating(nn.Module):
    """gMLP: one half gates the other through a convolution over positions."""

    def __init__(self, dim: int = 16, length: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.proj_in, self.proj_out = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)
        self.spatial = nn.Conv1d(length, length, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        u, v = F.gelu(self.proj_in(self.norm(x))).chunk(2, dim=-1)
        x = u * (1 + 0.1 * self.spatial(v))
        return self.proj_out(x) + residual


class TNet(nn.Module):
    """PointNet's transform: max over points, a matrix near the identity."""

    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.k = k
        self.conv1, self.conv2 = nn.Conv1d(k, 16, 1), nn.Conv1d(16, 32, 1)
        self.fc = nn.Linear(32, k * k)
        self.bn1, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        batchsize = x.size()[0]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = torch.max(x, 2, keepdim=True)[0]
        x = self.fc(x.view(-1, 32))
        iden = torch.eye(self.k).view(1, self.k * self.k).repeat(batchsize, 1)
        return (0.1 * x + iden).view(-1, self.k, self.k)


class PointNet(nn.Module):
    """Transform the points by bmm, features per point, max, classify."""

    def __init__(self) -> None:
        super().__init__()
        self.stn = TNet()
        self.conv1, self.conv2 = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 32, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(32)
        self.fc = nn.Linear(48, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n_pts = x.size()[2]
        trans = self.stn(x)
        x = x.transpose(2, 1)
        x = torch.bmm(x, trans)
        x = x.transpose(2, 1)
        point = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(point))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 32, 1).repeat(1, 1, n_pts)
        x = torch.cat([x, point], 1)
        return F.log_softmax(self.fc(x.transpose(1, 2)), dim=-1), trans


class VideoNet(nn.Module):
    """C3D and R(2+1)D blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 12, (3, 3, 3), (1, 2, 2), (1, 1, 1), bias=False),
            nn.BatchNorm3d(12),
            nn.ReLU(),
        )
        self.spatial = nn.Conv3d(12, 16, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.temporal = nn.Conv3d(16, 12, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn1, self.bn2 = nn.BatchNorm3d(16), nn.BatchNorm3d(12)
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.avgpool = nn.AdaptiveAvgPool3d((1, 1, 1))
        self.fc = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = F.relu(self.bn1(self.spatial(x)), inplace=True)
        x = F.relu(x + self.bn2(self.temporal(y)))
        x = self.avgpool(x)
        x = x.flatten(1)
        return self.fc(x)


def clips(batch: int, seed: int, size: int) -> Tensor:
    """Four frames, each a little like the last."""
    return torch.stack([images()(batch, seed, size) * (1 - 0.1 * t) for t in range(4)], dim=2)


class GraphConvolution(nn.Module):
    """A dense adjacency matrix, normalised in forward; two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.randn(12, 24) * 0.3)
        self.weight2 = nn.Parameter(torch.randn(24, 5) * 0.3)
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        adj = adj / adj.sum(dim=-1, keepdim=True)
        support = torch.matmul(x, self.weight1)
        x = F.relu(torch.bmm(adj, support) + self.bias)
        return torch.einsum("bij,bjk->bik", adj, x @ self.weight2)


def graphs(batch: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Features of nodes, and an adjacency with self loops."""
    generator = torch.Generator().manual_seed(seed)
    links = (torch.rand(batch, size, size, generator=generator) > 0.7).float()
    return rows(12)(batch, seed, size), links + torch.eye(size)


class Recommender(nn.Module):
    """DLRM: dense features, embeddings of categories, dot products of all pairs."""

    li: Tensor
    lj: Tensor

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(13, 96), nn.ReLU(), nn.Linear(96, dim), nn.ReLU())
        self.tables = nn.ModuleList([nn.EmbeddingBag(50, dim, mode="sum") for _ in range(3)])
        pairs = torch.tril_indices(4, 4, offset=-1)
        self.register_buffer("li", pairs[0])
        self.register_buffer("lj", pairs[1])
        self.top = nn.Sequential(nn.Linear(dim + 6, 96), nn.ReLU(), nn.Linear(96, 1), nn.Sigmoid())

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        ly = [table(sparse[:, i]) for i, table in enumerate(self.tables)]
        (batch_size, d) = x.shape
        T = torch.cat([x, *ly], dim=1).view((batch_size, -1, d))
        Z = torch.bmm(T, torch.transpose(T, 1, 2))
        Zflat = Z[:, self.li, self.lj]
        return self.top(torch.cat([x, Zflat], dim=1)).squeeze(1)


def clicks(batch: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Dense features, and two categories of each of three kinds."""
    ids = tokens(50)(batch, seed, 6).view(batch, 3, 2)
    return features(13)(batch, seed, 0), ids


_PRODUCTS = (
    "products of two computed matrices: int8 is measured to pay only for large ones, and for these "
    "the report tells microseconds of both"
)
CASES = {
    "mlp_mixer": Case(MLPMixer, images(), 32),
    "gmlp": Case(SpatialGating, rows(16), 12),
    "pointnet": Case(PointNet, signals(3), 24, 32),
    "video_3d": Case(VideoNet, clips, 24, 32, plain=True),
    "graph_convolution": Case(GraphConvolution, graphs, 10, 14, macs=0.5, why=_PRODUCTS),
    "dlrm": Case(Recommender, clicks, 0, empty=False),
}
