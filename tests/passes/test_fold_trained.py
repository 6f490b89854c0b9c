"""Fold trained: what training left becomes what static mode would have observed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import module_of
from fxquant.passes.fold_trained import FoldTrained
from fxquant.spec import PRESETS, QConfig, QSpec
from tests.helpers import One, close_share, names, node_of, nodes, run
from tests.passes.trainees import inserted, watched

X = torch.randn(2, 4, 6, 6)
TENSOR = QConfig(weight=QSpec("int8", symmetric=True, observer="minmax"))
FOUR = QConfig(
    weight=QSpec("int8", bits=4, symmetric=True, granularity="channel", observer="minmax")
)
CONFIGS = {"channel": QConfig(), "tensor": TENSOR, "four bits": FOUR}


def net(layer: nn.Module | None = None, bn: nn.Module | None = None) -> One:
    def body(m: Any, x: Tensor) -> Tensor:
        made: Tensor = m.b(F.relu(m.bn(m.a(x))))
        return made

    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, padding=1) if layer is None else layer
    norm = nn.BatchNorm2d(4) if bn is None else bn
    if isinstance(norm, nn.BatchNorm2d) and norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.5, -0.5, 1.0, 0.1]))
            norm.bias.copy_(torch.tensor([0.5, 0.2, -0.3, 0.0]))
    return One(body, a=layer, bn=norm, b=nn.Conv2d(4, 4, 1)).train()


def both(model: nn.Module, **options: Any) -> tuple[Tensor, GraphModule]:
    """What the trained graph computes in evaluation, and the graph after the pass."""
    module = watched(inserted(model, X, **options), X, 2 * X).eval()
    with torch.no_grad():
        wanted = module(X)
    return wanted, run(module, FoldTrained())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("affine", [True, False])
def test_norms_go_into_the_layers_and_the_results_stay(config: QConfig, affine: bool) -> None:
    wanted, module = both(net(bn=nn.BatchNorm2d(4, affine=affine)), config=config)
    assert "batch_norm" not in names(module) and "FakeQuantizeWeight" not in names(module)
    with torch.no_grad():
        # Multiplied before instead of after the sum: float32 roundings, now and then one code.
        assert close_share(module(X), wanted) <= 0.02
        assert float((module(X) - wanted).abs().median()) <= 1e-6


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_the_weight_lies_on_the_grid_of_the_scales_that_are_noted(config: QConfig) -> None:
    _, module = both(net(), config=config)
    for name in ("a", "b"):
        node = next(n for n in nodes(module) if n.target == name)
        record = info(node)
        assert record.weight_scales is not None and record.config is not None
        spec: Any = record.config.weight
        scale = torch.tensor(record.weight_scales).view(-1, 1, 1, 1)
        steps = module_of(node).get_parameter("weight").detach() / scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert int(steps.round().abs().max()) <= spec.quant_max
        assert len(record.weight_scales) == (1 if spec.granularity == "tensor" else 4)


def test_transposed_layers_and_linears_fold_too() -> None:
    wanted, module = both(net(nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2)))
    assert "batch_norm" not in names(module)
    with torch.no_grad():
        assert close_share(module(X), wanted) <= 0.02


def test_a_norm_that_was_trained_apart_stays_apart() -> None:
    wanted, module = both(net(), overrides=(("bn", None),))
    assert names(module).count("batch_norm") == 1
    with torch.no_grad():
        torch.testing.assert_close(module(X), wanted, rtol=0, atol=1e-6)


def test_beside_a_layer_in_float_a_norm_folds_as_ever() -> None:
    wanted, module = both(net(), overrides=(("a", None), ("bn", None)))
    assert "batch_norm" not in names(module)
    node = next(n for n in nodes(module) if n.target == "a")
    assert info(node).weight_scales is None
    with torch.no_grad():
        assert close_share(module(X), wanted) <= 0.02


def test_nothing_drops_any_more() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        made: Tensor = m.b(m.drop(m.a(x)))
        return made

    model = One(body, a=nn.Conv2d(4, 4, 1), drop=nn.Dropout(0.5), b=nn.Conv2d(4, 4, 1)).train()
    wanted, module = both(model)
    assert "Dropout" not in names(module) and "dropout" not in names(module)
    with torch.no_grad():
        assert torch.equal(module(X), wanted)


def test_recurrent_layers_are_torchs_own_again() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        made: Tensor = m.rnn(x)[0]
        return made

    x = torch.randn(3, 2, 4)
    module = inserted(One(body, rnn=nn.LSTM(4, 5)).train(), x, overrides=(
        (nn.LSTM, PRESETS["dynamic"]),
    ))  # fmt: skip
    run(watched(module, x), FoldTrained())
    node = next(n for n in nodes(module) if n.target == "rnn")
    layer: Any = module_of(node)
    assert type(layer) is nn.LSTM and not node.kwargs
    scales = dict(info(node).matrix_scales)
    assert list(scales) == ["weight_ih_l0", "weight_hh_l0"]
    for name, scale in scales.items():
        steps = layer.get_parameter(name) / torch.tensor(scale).view(-1, 1)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))


def test_it_is_idempotent() -> None:
    _, module = both(net())
    again = Editor(module)
    FoldTrained().run(again)
    assert again.log == []
    assert node_of(module, "conv2d").kwargs == {}
