"""Vision transformers: attention by hand as in timm, nn.MultiheadAttention as in torchvision.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.any.case import Case, images, rows


class Attention(nn.Module):
    """timm's: one projection for q, k, v; unbind; scale; softmax."""

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = attn @ v
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class PatchEmbed(nn.Module):
    """Checks the size of the picture, as most do."""

    def __init__(self, side: int, patch: int, dim: int) -> None:
        super().__init__()
        self.img_size = (side, side)
        self.num_patches = (side // patch) ** 2
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        _, _, H, W = x.shape
        assert H == self.img_size[0] and W == self.img_size[1], (
            f"Input image size ({H}*{W}) doesn't match model ({self.img_size[0]})."
        )
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Class token, learned positions, the class token's feature out."""

    def __init__(self, side: int = 32, dim: int = 64, depth: int = 2, patch: int = 8) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(side, patch, dim)
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, self.patch_embed.num_patches + 1, dim))
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        cls_tokens = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat((cls_tokens, x), dim=1)
        x = x + self.pos_embed
        for blk in self.blocks:
            x = blk(x)
        x = self.norm(x)
        return self.head(x[:, 0])


class EncoderBlock(nn.Module):
    """torchvision's encoder block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, 4, dropout=0.1, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 3, f"Expected (batch, length, dim) got {input.shape}")
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = x + input
        y = self.ln_2(x)
        y = self.mlp(y)
        return x + y


class TorchvisionViT(nn.Module):
    """torchvision's spelling: _process_input, expand of the class token."""

    def __init__(self, side: int = 32, dim: int = 64) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.hidden_dim = side, 8, dim
        self.conv_proj = nn.Conv2d(3, dim, kernel_size=8, stride=8)
        self.class_token = nn.Parameter(0.5 * torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(0.5 * torch.randn(1, (side // 8) ** 2 + 1, dim))
        self.layers = nn.Sequential(EncoderBlock(dim), EncoderBlock(dim))
        self.ln = nn.LayerNorm(dim)
        self.heads = nn.Linear(dim, 10)

    def _process_input(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        p = self.patch_size
        torch._assert(h == self.image_size, f"Wrong image height! Expected {self.image_size}!")
        torch._assert(w == self.image_size, f"Wrong image width! Expected {self.image_size}!")
        n_h = h // p
        n_w = w // p
        x = self.conv_proj(x)
        x = x.reshape(n, self.hidden_dim, n_h * n_w)
        x = x.permute(0, 2, 1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self._process_input(x)
        n = x.shape[0]
        batch_class_token = self.class_token.expand(n, -1, -1)
        x = torch.cat([batch_class_token, x], dim=1)
        x = self.ln(self.layers(x + self.pos_embedding))
        x = x[:, 0]
        return self.heads(x)


class EncoderLayers(nn.Module):
    """nn.TransformerEncoder over features, mean over time."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(12, dim)
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(dim=1))


CASES = {
    "vit_timm": Case(VisionTransformer, images(), 32),
    "vit_torchvision": Case(TorchvisionViT, images(), 32),
    "transformer_encoder": Case(EncoderLayers, rows(12), 16, 24),
}
