"""Attention in training: one float op by default, int8 products where asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from tests.qat.models import sequences, switch, trained

OPEN: dict[Any, Any] = {F.scaled_dot_product_attention: "default"}


class Heads(nn.Module):
    """torch's own attention between linears."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.need = options.pop("need", False)
        self.causal = options.pop("causal", False)
        self.inside = nn.Linear(12, 16)
        self.heads = nn.MultiheadAttention(16, 2, batch_first=True, **options)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.inside(x)
        size = (x.shape[1], x.shape[1])
        mask = torch.triu(torch.full(size, float("-inf")), 1) if self.causal else None
        y, weights = self.heads(x, x, x, need_weights=self.need, attn_mask=mask)
        made: Tensor = self.out(x + y)
        return made + weights.sum() if self.need else made


class Function(nn.Module):
    """The function, that drops in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        p = 0.2 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        made: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return made


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: Heads(dropout=0.1),
    "weights": lambda: Heads(dropout=0.1, need=True),
    "causal": lambda: Heads(causal=True),
    "function": Function,
}


def prepared(name: str, asked: bool) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    example = (sequences(),)
    overrides = OPEN if asked else None
    made = fxquant.prepare(model, mode="qat", example_inputs=example, overrides=overrides)
    return model, made


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_deployed_is_what_was_trained(name: str, asked: bool) -> None:
    _, made = prepared(name, asked)
    trained(made, sequences)
    for backend in ("reference", "x86"):
        quantized = fxquant.convert(made, backend=backend)
        products = [op for op in fxquant.report(quantized).ops if op.op == "matmul" and op.int8]
        assert len(products) == 2 * asked
        assert fxquant.verify(made, quantized, [sequences(9)]).ok
        x = sequences(10)
        with torch.no_grad():
            wanted = made.eval()(x)
            assert float((quantized(x) - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())
        made.train()


@pytest.mark.parametrize("asked", [False, True])
def test_weights_drop_in_training_and_only_then(asked: bool) -> None:
    model, made = prepared("dropout", asked)
    switch(made, False)
    x = sequences()
    with torch.no_grad():
        assert not torch.equal(made(x), made(x))
        one, other = made.eval()(x), made(x)
        assert torch.equal(one, other)
        torch.testing.assert_close(one, model.eval()(x), rtol=0, atol=1e-6)
    drops = [m.p for m in made.fake_quant.modules() if hasattr(m, "p")]
    assert drops == [0.1]
