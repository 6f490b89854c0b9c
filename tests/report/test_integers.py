"""Masks, positions and indices are no ops to quantize: they have no observer and no row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxquant
from fxquant.numerics.observers import Observer


class Masked(nn.Module):
    """Embeds tokens at positions, and averages those that a mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(32, 16)
        self.fc = nn.Linear(16, 8)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(tokens.shape[1]) + 1
        keep = (mask.to(torch.bool) & (tokens != 0)).unsqueeze(-1)
        y = self.fc(self.words(tokens) + self.places(places))
        y = (y * keep.to(y.dtype)).sum(1)
        return y, y.argmax(-1)


def test_integers_have_no_rows_and_no_observers() -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    batch = (torch.randint(1, 50, (4, 12)), torch.ones(4, 12, dtype=torch.long))
    prepared = fxquant.prepare(model, example_inputs=batch)
    fxquant.calibrate(prepared, [batch])
    assert all(m.seen for m in prepared.modules() if isinstance(m, Observer))
    quantized = fxquant.convert(prepared)
    names = [row["op"] for row in fxquant.report(quantized).to_dict()["ops"]]
    assert not {"arange", "and_", "ne", "unsqueeze"} & {str(name) for name in names}
    # It reads floats, whatever it makes of them.
    assert any("argmax" in str(name) for name in names)
    other = (torch.randint(1, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long))
    found, wanted = quantized(*other), model(*other)
    # 8 bits keep about 40 dB of one layer; a mask or position gone wrong leaves none.
    error = (found[0] - wanted[0]).square().mean() / wanted[0].square().mean()
    assert error < 1e-3
