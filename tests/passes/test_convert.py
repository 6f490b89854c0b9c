"""Convert: the Q/DQ graph, its weights, and what goes back to float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

import fxquant
from fxquant.graph.info import info
from fxquant.graph.op_table import argument
from fxquant.numerics.affine import dequantize, dequantize_weight, quantize
from fxquant.numerics.integer import pair_saturates
from fxquant.passes.convert import Convert, QuantizedWeight
from fxquant.passes.place import Place
from fxquant.passes.share_scales import ShareScales
from fxquant.spec import QConfig, QSpec
from tests.helpers import One, Overrides, decisions, measured, names, node_of, nodes, run

Body = Callable[[Any, Any], Any]
X = torch.randn(2, 4, 6, 6)


def converted(
    model: nn.Module, *batches: Any, overrides: Overrides = (), **more: Any
) -> GraphModule:
    module = measured(model.eval(), *(batches or (X,)), overrides=overrides)
    return run(module, ShareScales(), Place(), Convert(**more))


def weight_of(module: GraphModule, path: str) -> torch.Tensor:
    return module.get_submodule(path).get_buffer("weight").detach()


def test_the_shape_of_the_graph() -> None:
    module = converted(nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1)))
    assert names(module) == [
        *("quantize", "dequantize"),
        *("dequantize_weight", "conv2d", "relu"),
        *("quantize", "dequantize"),
        *("dequantize_weight", "conv2d"),
    ]
    conv = node_of(module, "conv2d")
    assert conv.target is F.conv2d
    assert argument(conv, "stride") == (1, 1)


def test_it_computes_what_the_formulas_say() -> None:
    conv = nn.Conv2d(4, 5, 3, stride=2, padding=1)
    module = converted(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)))
    types = [info(n).writes for n in nodes(module) if info(n).writes is not None]

    def through(x: torch.Tensor, place: int) -> torch.Tensor:
        t = types[place]
        assert t is not None
        codes = quantize(x, t.scale, t.zero_point, t.quant_min, t.quant_max, t.dtype)
        return dequantize(codes, t.scale, t.zero_point)

    def weight(path: str) -> torch.Tensor:
        held = module.get_submodule(path)
        return dequantize_weight(weight_of(module, path), held.get_buffer("weight_scale"), 0)

    with torch.no_grad():
        y = torch.relu(F.conv2d(through(X, 0), weight("0"), conv.bias, 2, 1))
        y = F.linear(through(y, 1).flatten(1), weight("3"), module.get_buffer("3.bias"))
        assert torch.equal(module(X), y)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_weights_are_int8_and_near(granularity: Any) -> None:
    spec = QSpec("int8", symmetric=True, granularity=granularity, observer="minmax")
    config = QConfig(weight=spec)
    conv = nn.Conv2d(4, 5, 3)
    module = converted(nn.Sequential(conv), overrides=(("*", config),))
    codes, scale = weight_of(module, "0"), module.get_buffer("0.weight_scale")
    assert codes.dtype == torch.int8
    assert scale.numel() == (5 if granularity == "channel" else 1)
    assert int(codes.min()) >= -127
    per = scale.detach().view(-1, 1, 1, 1)
    # To the nearest code, where the range is not cut: half a step, and the cut by MSE a bit more.
    error = (codes * per - conv.weight).abs().detach() / per
    assert float(error.mean()) <= 0.3
    assert "int8" in repr(module.get_submodule("0"))


def test_no_float_weight_is_left() -> None:
    layers = (nn.Conv2d(4, 5, 3), nn.Conv2d(5, 4, 1), nn.Flatten(), nn.Linear(64, 9))
    module = converted(nn.Sequential(*layers))
    kinds = {type(m) for m in module.modules()} - {type(module)}
    assert kinds == {QuantizedWeight}
    floats = [name for name, p in module.named_buffers() if p.dtype == torch.float32]
    assert {name.rpartition(".")[2] for name in floats} == {"bias", "weight_scale"}
    assert not list(module.parameters())


def test_transposed_weights_have_their_scales_on_axis_one() -> None:
    module = converted(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 1)))
    held = module.get_submodule("0")
    assert held.get_buffer("weight").shape == (4, 3, 3, 3)
    assert held.get_buffer("weight_scale").numel() == 3
    assert argument(node_of(module, "dequantize_weight"), "axis") == 1


def test_a_shared_weight_is_quantized_once() -> None:
    model = One(lambda m, x: m.conv(m.conv(x).relu()), conv=nn.Conv2d(4, 4, 1))
    module = converted(model)
    named = module.named_buffers(remove_duplicate=False)
    weights = [p for n, p in named if n.endswith("weight")]
    assert len(weights) == 2
    assert weights[0].data_ptr() == weights[1].data_ptr()


def test_a_value_is_quantized_once_for_all_its_readers() -> None:
    parts = {name: nn.Conv2d(4, 4, 1) for name in "abc"}
    module = converted(One(lambda m, x: m.a(x) + m.b(x) + m.c(x), **parts))
    made = [str(n.args[0]) for n in nodes(module) if n.target is quantize]
    assert made.count("x") == 1
    assert len(made) == len(set(made))


def test_float_readers_of_a_float_value_read_the_float() -> None:
    module = converted(One(lambda m, x: (m.a(x), torch.cumsum(x, 1)), a=nn.Conv2d(4, 4, 1)))
    assert str(node_of(module, "cumsum").args[0]) == "x"


def test_float_readers_of_codes_read_them_through_dequantize() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.a(x)
        return m.b(y), torch.cumsum(y, 1)

    module = converted(One(body, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)))
    source = node_of(module, "cumsum").args[0]
    assert getattr(source, "target", None) is dequantize


def test_an_accumulator_that_could_overflow_sends_the_unit_to_float() -> None:
    wide = nn.Linear(70_000, 2)  # 255 * 127 * 70,000 is more than 2**31
    conv = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        wide.weight.fill_(0.01)
        conv.weight.fill_(1.0)
    model = nn.Sequential(conv, nn.Flatten(), wide, nn.ReLU())
    module = converted(model, torch.rand(1, 1, 7, 10_000))
    found = decisions(module)
    assert found["_2"] == (False, "the sum of its products could pass 32 bits")
    assert found["_3"] == (False, "the sum of its products could pass 32 bits")
    assert found["_0"][0]
    assert isinstance(module.get_submodule("2"), nn.Linear)
    x = torch.rand(1, 1, 7, 10_000)
    with torch.no_grad():
        error = float((module(x) - model(x)).abs().max())
    # The conv reads and writes codes of 1 / 255 each, off by half at most; 70,000 of them times
    # 0.01 are summed in float.
    assert error < 700 / 255


def test_a_coarser_scale_only_where_pairs_may_saturate() -> None:
    risky, mixed = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    deep, across = nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 2, 1)
    with torch.no_grad():
        risky.weight.fill_(0.5)  # two neighbours of 127 * 255 each pass 2**15
        mixed.weight.zero_()
        mixed.weight[:, 0] = 0.5  # one large weight, the others none
        mixed.weight[3, 1] = 0.25
        deep.weight.fill_(0.5)  # many, of one input channel
        across.weight.zero_()
        across.weight[:, 0] = 0.5  # of one output, which is the second dimension here
        across.weight[0, 1] = 0.5
    model = nn.Sequential(risky, mixed, deep, across)
    narrow, full = (converted(model, saturates_pairs=flag) for flag in (True, False))
    largest = [
        weight_of(narrow, str(i)).abs().transpose(0, int(i == 3)).flatten(1) for i in range(4)
    ]
    assert [int(m) for m in largest[0].amax(1)] == [64] * 4
    assert [int(m) for m in largest[1].amax(1)] == [127, 127, 127, 85]
    assert [int(m) for m in largest[2].amax(1)] == [127] * 4
    assert [int(m) for m in largest[3].amax(1)] == [64, 127]
    for path in "01":
        assert not bool(pair_saturates(weight_of(narrow, path)).any())
    assert not bool(pair_saturates(weight_of(narrow, "3"), axis=1).any())
    for path in "0123":
        assert int(weight_of(full, path).abs().max()) == 127


def test_codes_that_only_move_stay_codes() -> None:
    def body(m: Any, x: Any) -> Any:
        return m.b(F.max_pool2d(m.a(x).flip(1), 2).reshape(x.size(0), 4, 3, 3))

    module = converted(One(body, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)))
    types = {info(n).writes for n in nodes(module) if info(n).writes is not None}
    assert len(types) == 2, "the input's, and one for all that a's codes go through"


def test_asking_for_a_shape_needs_no_float() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.a(x)
        return m.b(y.view(y.size(0), -1, 6, 6))

    module = converted(One(body, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)))
    with torch.no_grad():
        assert module(torch.randn(5, 4, 6, 6)).shape == (5, 4, 6, 6)
    assert info(node_of(module, "size").args[0]).writes is not None  # type: ignore[arg-type]


def test_a_layer_without_bias() -> None:
    module = converted(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False)))
    assert argument(node_of(module, "conv2d"), "bias") is None
    assert "bias=False" in repr(module.get_submodule("0"))


def test_the_float_model_is_not_touched() -> None:
    conv = nn.Conv2d(4, 4, 1)
    before = conv.weight.detach().clone()
    converted(nn.Sequential(conv))
    assert torch.equal(conv.weight, before)
    assert conv.weight.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "x86"])
def test_weights_that_lie_in_memory_in_another_order(backend: str) -> None:
    """A transposed linear and a convolution in channels-last order are packed as they lie."""
    linear, image = nn.Linear(6, 6), nn.Conv2d(4, 6, 3)
    linear.weight = nn.Parameter(linear.weight.detach().t())
    weight = image.weight.detach().contiguous(memory_format=torch.channels_last)
    image.weight = nn.Parameter(weight)
    assert not linear.weight.is_contiguous() and not image.weight.is_contiguous()
    model = nn.Sequential(image, nn.ReLU(), nn.Flatten(2), nn.Linear(16, 6), linear).eval()
    data = [torch.randn(8, 4, 6, 6) for _ in range(2)]
    quantized = fxquant.quantize(model, data, backend=backend)
    with torch.no_grad():
        wanted, found = model(data[0]), quantized(data[0])
    # Three layers of 8 bits: some percent; a weight read in the wrong order gives 100.
    assert float((wanted - found).norm() / wanted.norm()) < 0.05
