"""Bounds of values: no number exceeds one, and where nothing is known there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

import fxquant
from fxquant.graph import bounds
from fxquant.graph.bounds import largest
from tests.helpers import One, canonical

Body = Callable[[Any, Any], Any]
X = torch.randn(2, 3, 8)


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {
        "norm": nn.LayerNorm(8),
        "rms": nn.RMSNorm(8),
        "group": nn.GroupNorm(1, 3),
        "instance": nn.InstanceNorm1d(3, affine=True),
        "tracked": nn.InstanceNorm1d(3, track_running_stats=True),
        "batch": nn.BatchNorm1d(3),
        "layer": nn.Linear(8, 8),
        "bare": nn.Linear(8, 8, bias=False),
        "conv": nn.Conv1d(3, 3, 3, padding=1),
        "turned": nn.ConvTranspose1d(3, 5, 3),
        "table": nn.Embedding(7, 8),
    }
    for module in made.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return made


def returned(body: Body, x: Tensor = X) -> tuple[GraphModule, Node]:
    """A model's canonical graph, and the value that it returns."""
    module = canonical(One(body, **parts()), x)
    (made,) = module.graph.output_node().all_input_nodes
    return module, made


KNOWN: dict[str, Body] = {
    "layer norm": lambda m, x: m.norm(x),
    "rms norm": lambda m, x: m.rms(x),
    "group norm": lambda m, x: m.group(x),
    "instance norm": lambda m, x: m.instance(x),
    "norm without factors": lambda m, x: F.layer_norm(x, (8,)),
    "linear": lambda m, x: m.layer(m.norm(x)),
    "linear without bias": lambda m, x: m.bare(m.norm(x)),
    "convolution": lambda m, x: m.conv(m.norm(x)),
    "transposed convolution": lambda m, x: m.turned(m.norm(x)),
    "residual": lambda m, x: m.norm(x) + m.layer(m.norm(x)),
    "sum with a factor": lambda m, x: torch.add(m.norm(x), m.rms(x), alpha=-3.0),
    "sum with a number": lambda m, x: m.norm(x) - 5.0,
    "sum with a parameter": lambda m, x: m.norm(x) + m.layer.bias,
    "product": lambda m, x: m.norm(x) * m.rms(x),
    "quotient": lambda m, x: m.norm(x) / -0.25,
    "larger of two": lambda m, x: torch.maximum(m.norm(x), m.rms(x)),
    "activation": lambda m, x: F.gelu(m.norm(x)),
    "softmax": lambda m, x: x.softmax(-1),
    "sigmoid": lambda m, x: x.sigmoid(),
    "mean": lambda m, x: m.norm(x).mean(1),
    "view": lambda m, x: m.norm(x).transpose(1, 2).reshape(2, -1)[:, 3:],
    "part": lambda m, x: m.norm(x).chunk(2, dim=-1)[1],
    "join": lambda m, x: torch.cat([m.norm(x), m.layer(m.norm(x)) * 9.0], dim=1),
    "padding": lambda m, x: F.pad(m.norm(x), (1, 2), value=-1e6),
    "fill": lambda m, x: m.norm(x).masked_fill(x > 0, 1e6),
    "one or the other": lambda m, x: torch.where(x > 0, m.norm(x), m.rms(x) * 1e3),
    "picked": lambda m, x: m.norm(x).topk(2, dim=-1)[0],
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, m.norm(x)),
    "attention by hand": lambda m, x: (x @ x.mT).softmax(dim=-1) @ m.norm(x),
    "cast": lambda m, x: m.norm(x).to(torch.bfloat16).float(),
    "rows of a table": lambda m, x: m.table((x > 0).long()),
}


def values(module: GraphModule, x: Tensor) -> dict[Node, Any]:
    """Every value of a graph."""

    class Keeps(fx.Interpreter):
        def __init__(self) -> None:
            super().__init__(module, garbage_collect_values=False)
            self.found: dict[Node, Any] = {}

        def run_node(self, n: Node) -> Any:
            self.found[n] = super().run_node(n)
            return self.found[n]

    keeps = Keeps()
    with torch.no_grad():
        keeps.run(x)
    return keeps.found


def assert_bounded(module: GraphModule, x: Tensor) -> int:
    """No value exceeds its bound; returns how many have one."""
    count = 0
    for node, value in values(module, x).items():
        is_float = isinstance(value, Tensor) and value.is_floating_point() and value.numel()
        bound = largest(node) if is_float else None
        if bound is None:
            continue
        count += 1
        assert math.isfinite(bound)
        # Bounds are those of exact arithmetic; a layer's sums are rounded.
        assert float(value.detach().abs().nan_to_num().max()) <= bound * (1 + 1e-5), node
    return count


@pytest.mark.parametrize("name", KNOWN)
def test_a_bound_holds(name: str) -> None:
    module, made = returned(KNOWN[name])
    assert largest(made) is not None
    for scale in (0.0, 1.0, 1e-20, 1e18):
        assert_bounded(module, X * scale)


UNKNOWN: dict[str, Body] = {
    "the input": lambda m, x: x.relu(),
    "a sum with the input": lambda m, x: m.norm(x) + x,
    "a join with the input": lambda m, x: torch.cat([m.norm(x), x]),
    "a factor of the input": lambda m, x: m.norm(x) * x.mean(),
    "a layer of the input": lambda m, x: m.layer(x),
    "statistics of the training": lambda m, x: m.tracked(x),
    "a batch norm": lambda m, x: m.batch(x),
    "a sum over a dimension": lambda m, x: m.norm(x).sum(-1),
    "an exponential": lambda m, x: m.norm(x).exp(),
    "a quotient by what is computed": lambda m, x: m.norm(x) / m.rms(x),
    "a reciprocal": lambda m, x: 1.0 / m.norm(x),
    "a product of matrices": lambda m, x: m.norm(x) @ m.norm(x).mT,
    "softmax over the other dimension": lambda m, x: (x @ x.mT).softmax(dim=1) @ m.norm(x),
    "weights that were regrouped": lambda m, x: (
        (x @ x.mT).softmax(dim=-1).reshape(2, 1, 9) @ m.norm(x).repeat(1, 3, 1)
    ),
    "attention over the input": lambda m, x: F.scaled_dot_product_attention(m.norm(x), x, x),
    "an infinite fill": lambda m, x: m.norm(x).masked_fill(x > 0, -math.inf),
    "a fill that is computed": lambda m, x: m.norm(x).masked_fill(x > 0, x.max()),
    "float16": lambda m, x: (m.norm(x) * 1e9).to(torch.float16).float(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_nothing_is_known(name: str) -> None:
    _, made = returned(UNKNOWN[name])
    assert largest(made) is None


def test_a_weight_that_is_not_finite_bounds_nothing() -> None:
    module = canonical(One(lambda m, x: m.norm(x), norm=nn.LayerNorm(8)), X)
    (made,) = module.graph.output_node().all_input_nodes
    assert largest(made) is not None
    with torch.no_grad():
        module.get_parameter("norm.weight")[3] = math.nan
    assert largest(made) is None


def test_long_and_branching_graphs_take_no_time() -> None:
    def doubled(m: Any, x: Any) -> Any:
        y = m.norm(x)
        for _ in range(40):
            y = y + y
        return y

    def chained(m: Any, x: Any) -> Any:
        y = m.norm(x)
        for _ in range(bounds._MOST + 1):
            y = y * 0.5
        return y

    _, made = returned(doubled)
    found = largest(made)
    assert found is not None
    assert found >= 2.0**40
    assert largest(returned(chained)[1]) is None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_models_keep_their_bounds(data: st.DataObject) -> None:
    """Chains of ops that read and write [2, 3, 8], some of which know nothing."""
    steps: list[Body] = [
        lambda m, x: m.norm(x),
        lambda m, x: m.layer(x),
        lambda m, x: x + m.bare(m.rms(x)),
        lambda m, x: F.silu(x) * 3.0,
        lambda m, x: x.flip(1) - m.norm(x),
        lambda m, x: torch.maximum(x, m.conv(x)),
        lambda m, x: F.scaled_dot_product_attention(x, x, m.norm(x)),
        lambda m, x: F.pad(x, (0, 1), value=7.0)[..., 1:],
        lambda m, x: torch.where(x > 1, x, 0.5),
    ]
    chosen = data.draw(st.lists(st.sampled_from(steps), min_size=1, max_size=6))

    def body(m: Any, x: Any) -> Any:
        for step in chosen:
            x = step(m, x)
        return x

    module, _ = returned(body)
    assert_bounded(module, X * data.draw(st.sampled_from([1e-6, 1.0, 300.0])))


def test_values_of_quantized_models_keep_their_bounds() -> None:
    """Codes and integer weights: in the Q/DQ graph, where the lowering asks."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(8, 32), block, nn.Linear(32, 5)).eval()
    made = fxquant.quantize(model, [X], mode="static", backend="reference")
    assert assert_bounded(made, X * 50.0) > 20


def test_what_is_too_small_a_bound_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the checks."""
    monkeypatch.setattr(bounds, "_NORMED", 0.5)
    module, _ = returned(KNOWN["linear"])
    with pytest.raises(AssertionError, match="norm"):
        assert_bounded(module, X)
