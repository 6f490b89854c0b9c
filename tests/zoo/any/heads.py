"""What stands at the end: masks, indices, gather, where, argmax, topk, squeeze without dim."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.any.case import Case, images, rows, tokens
from tests.zoo.common import conv_bn_act, init_convs


class MaskedMean(nn.Module):
    """A boolean mask as input: masked_fill, where, a mean over what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.score, self.fc = nn.Linear(12, 24), nn.Linear(24, 1), nn.Linear(48, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = F.relu(self.proj(x))
        scores = self.score(x).masked_fill(~mask.unsqueeze(-1), -1e4)
        weights = scores.softmax(dim=1)
        attended = (weights * x).sum(dim=1)
        zeroed = torch.where(mask[..., None], x, torch.zeros_like(x))
        mean = zeroed.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.fc(torch.cat([attended, mean], dim=-1))


def rows_and_mask(batch: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Sequences of which the last steps are padding."""
    mask = torch.ones(batch, size, dtype=torch.bool)
    mask[batch // 2 :, size - 2 :] = False
    return rows(12)(batch, seed, size), mask


class SpanExtraction(nn.Module):
    """Indices as input: gather of positions, index_select of columns, split into two heads."""

    columns: Tensor

    def __init__(self, vocabulary: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16)
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.qa = nn.Linear(16, 2)
        self.pair = nn.Linear(16, 6)
        self.register_buffer("columns", torch.tensor([3, 1, 0, 2, 5, 4, 7, 6] * 2))

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.encoder(self.embed(ids)) + self.embed(ids)
        start, end = self.qa(x).split(1, dim=-1)
        index = positions.unsqueeze(-1).expand(-1, -1, x.size(-1))
        picked = torch.gather(x, 1, index)
        picked = torch.index_select(picked, 2, self.columns)
        return start.squeeze(-1), end.squeeze(-1), self.pair(picked)


def ids_and_positions(batch: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Tokens, and two positions of each sample."""
    return tokens(50)(batch, seed, size), tokens(size)(batch, seed + 1, 2)


class Segmenter(nn.Module):
    """Labels out: the argmax over channels, beside the probabilities it was taken from."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv_bn_act(3, 16, 3, 2), conv_bn_act(16, 16, 3))
        self.head = nn.Conv2d(16, 4, 1)
        init_convs(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.net(x))
        logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
        return logits.argmax(dim=1), logits.softmax(1)


class Keypoints(nn.Module):
    """Heat maps: the best places by topk, coordinates by integer arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv_bn_act(3, 16, 3, 2), nn.Conv2d(16, 3, 3, padding=1))
        init_convs(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heat = torch.sigmoid(self.net(x))
        peak = F.max_pool2d(heat, (3, 3), stride=1, padding=1)
        keep = (peak == heat).float()
        b, c, _, w = heat.size()
        scores, where = torch.topk((heat * keep).view(b, c, -1), 2)
        ys = torch.div(where, w, rounding_mode="floor")
        return heat, scores, ys


class Regressor(nn.Module):
    """squeeze() without a dim, which takes away a batch of one too; unit vectors out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv_bn_act(3, 16, 3, 2), nn.AdaptiveAvgPool2d(1))
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x).squeeze()
        return F.normalize(self.fc2(F.elu(self.fc1(x))), dim=-1)


class Contrastive(nn.Module):
    """CLIP's last lines: two towers, norms, a temperature, similarities both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(
            nn.Conv2d(3, 16, 4, 4),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 16),
        )
        self.text = nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 16), nn.GELU())
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        image_features = self.visual(image)
        text_features = self.text(text)[:, -1, :]
        image_features = image_features / image_features.norm(dim=1, keepdim=True)
        text_features = text_features / text_features.norm(dim=1, keepdim=True)
        logit_scale = self.logit_scale.exp()
        logits_per_image = logit_scale * image_features @ text_features.T
        return logits_per_image, logits_per_image.mT


def image_and_text(batch: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """As many texts as pictures."""
    return images()(batch, seed, size), tokens(50)(batch, seed, 6)


CASES = {
    "masked_mean": Case(MaskedMean, rows_and_mask, 8, 12),
    "span_extraction": Case(SpanExtraction, ids_and_positions, 10, 14),
    "argmax_segmenter": Case(Segmenter, images(), 32, 40),
    # torch itself cannot settle the -1 of a view of nothing
    "topk_keypoints": Case(Keypoints, images(), 32, 40, empty=False),
    "squeeze_regressor": Case(Regressor, images(), 32, 40),
    "clip": Case(Contrastive, image_and_text, 32, 40),
}
