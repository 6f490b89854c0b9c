"""Nothing that a model computes with stays behind on the processor when the model is elsewhere.

There is no GPU here: fake tensors of another device stand for one. They compute nothing, and raise
where tensors of two devices meet.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxquant

ELSEWHERE = torch.device("meta")


class Net(nn.Module):
    """A table, layers, attention, recurrent layers, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 32)
        self.qkv = nn.Linear(32, 96)
        self.conv, self.up = nn.Conv1d(32, 32, 3, padding=1), nn.ConvTranspose1d(32, 32, 2)
        self.lstm, self.gru = nn.LSTM(32, 16, batch_first=True), nn.GRU(16, 24, batch_first=True)
        self.norm, self.last = nn.LayerNorm(24), nn.Linear(24, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(self.table(ids)).chunk(3, dim=-1)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x, _ = self.lstm(self.up(F.gelu(self.conv(x))).transpose(1, 2))
        x, _ = self.gru(x)
        made: Tensor = self.last(self.norm(x))
        return made


def moved(model: nn.Module) -> nn.Module:
    """Let all tensors of ``model`` be fakes of another device, those in lists too."""
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for name, held in registry.items():
                if held is not None:
                    fake = torch.empty(held.shape, dtype=held.dtype, device=ELSEWHERE)
                    registry[name] = fake  # type: ignore[assignment]  # parameters are only read
        if isinstance(module, nn.RNNBase):
            names = module._flat_weights_names
            module._flat_weights = [getattr(module, name, None) for name in names]
    return model


def test_a_tensor_left_behind_is_found() -> None:
    class Left(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(x.shape[-1])

    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        Left()(torch.empty(2, 3, device=ELSEWHERE))


@pytest.mark.filterwarnings("ignore::fxquant.errors.FxQuantWarning")
@pytest.mark.parametrize("backend", ["cuda", "reference"])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("dynamic", {}),
        ("dynamic", {"overrides": {F.scaled_dot_product_attention: "dynamic"}}),
        ("dynamic", {"qconfig": "int8-bf16"}),
        ("weight_only", {}),
        ("weight_only", {"qconfig": "weight-only-int4"}),
        ("static", {}),
        ("bfloat16", {}),
    ],
    ids=["dynamic", "products", "dynamic-bf16", "int8", "int4", "static", "bfloat16"],
)
def test_models_compute_where_they_are(
    mode: Any, options: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (3, 5))
    data = [ids] if mode == "static" else None
    q = fxquant.quantize(
        Net().eval(), data, mode=mode, backend=backend, example_inputs=ids, **options
    )
    wanted = q(ids)
    with FakeTensorMode(), torch.no_grad():
        made = moved(q)(torch.empty(3, 5, dtype=torch.long, device=ELSEWHERE))
    assert made.device == ELSEWHERE
    assert made.shape == wanted.shape and made.dtype == wanted.dtype
