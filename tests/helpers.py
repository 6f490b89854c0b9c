"""Small tools that the tests of graphs, patterns and passes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.backends.base import INT8_OPS
from fxquant.graph.capture import capture
from fxquant.graph.edit import Editor
from fxquant.graph.info import QType, info
from fxquant.graph.op_table import argument, op_of
from fxquant.graph.verify import verify
from fxquant.graph.view import what
from fxquant.numerics.observers import Observer
from fxquant.passes.annotate import Annotate
from fxquant.passes.base import Pass
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.configure import Configure, Selector
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.fuse import Fuse
from fxquant.passes.observe import Observe
from fxquant.passes.read_ranges import ReadRanges
from fxquant.passes.split_padding import SplitPadding
from fxquant.passes.unshare import Unshare
from fxquant.patterns.builtin import FUSION_RULES
from fxquant.patterns.rule import Rule
from fxquant.spec import QConfig

Overrides = tuple[tuple[Selector, QConfig | None], ...]
_Norm = nn.modules.batchnorm._BatchNorm


def nodes(module: GraphModule) -> list[Node]:
    """The nodes that compute something, in graph order."""
    return [n for n in module.graph.nodes if n.op.startswith("call")]


def names(module: GraphModule) -> list[str]:
    """What each computing node calls: its canonical op, or else its target's own name."""
    return [what(node) for node in nodes(module)]


def node_of(module: GraphModule, op: str, place: int = 0) -> Node:
    """The call of ``op`` that stands at ``place`` among its like."""
    return [node for node in nodes(module) if what(node) == op][place]


def options(node: Node) -> dict[str, Any]:
    """The arguments of a canonical call that are not tensors."""
    op = op_of(node)
    assert op is not None, f"{node} is not canonical: {info(node).opaque}"
    return {name: argument(node, name) for name in op.options}


def reported(module: GraphModule) -> list[tuple[str, str | None]]:
    """Canonical op and unit of every computing node."""
    return [(what(node), info(node).unit) for node in nodes(module)]


def run(module: GraphModule, *passes: Pass) -> GraphModule:
    """Run passes over ``module``, verifying after each as the pipeline does."""
    for step in passes:
        step.run(Editor(module))
        verify(module, step.gives, step.name)
    module.recompile()
    return module


def canonical(model: nn.Module, *args: Any, train: bool = False, **kwargs: Any) -> GraphModule:
    """``model`` captured and canonicalized: all passes before the configuration."""
    module = capture(model, args, kwargs, evaluate=not train).module
    return run(module, Functionalize(), Unshare(), Canonicalize(), SplitPadding())


def ranks_of(*args: Any, model: nn.Module) -> tuple[tuple[str, int], ...]:
    """What the fusion rules are told about the inputs."""
    inputs = [n.target for n in capture(model, args).module.graph.nodes if n.op == "placeholder"]
    given = zip(inputs, args, strict=False)
    return tuple((str(name), a.dim()) for name, a in given if isinstance(a, Tensor))


def fused(
    model: nn.Module,
    *args: Any,
    rules: Sequence[Rule] = FUSION_RULES,
    overrides: Overrides = (),
    train: bool = False,
) -> GraphModule:
    """``model`` canonicalized, configured and fused."""
    module = canonical(model, *args, train=train)
    ranks = ranks_of(*args, model=model)
    return run(module, Configure(overrides=overrides), Fuse(tuple(rules), ranks))


def annotated(model: nn.Module, *args: Any, overrides: Overrides = ()) -> GraphModule:
    """``model`` up to the decisions what may be int8."""
    return run(fused(model, *args, overrides=overrides), Annotate(INT8_OPS))


def observed(model: nn.Module, *batches: Any, overrides: Overrides = ()) -> GraphModule:
    """``model`` with observers that have seen ``batches``, each a tensor or a tuple."""
    calls = [b if isinstance(b, tuple) else (b,) for b in batches]
    module = run(annotated(model, *calls[0], overrides=overrides), Observe())
    with torch.no_grad():
        for call in calls:
            module(*call)
    return module


def measured(model: nn.Module, *batches: Any, overrides: Overrides = ()) -> GraphModule:
    """``model`` with ranges read from ``batches``."""
    return run(observed(model, *batches, overrides=overrides), ReadRanges())


def misses(model: nn.Module, *args: Any, **more: Any) -> list[tuple[str, str, str]]:
    """The near misses of the built-in fusion rules on ``model``."""
    module = canonical(model, *args, train=more.pop("train", False))
    run(module, Configure(overrides=more.pop("overrides", ())))
    editor = Editor(module)
    Fuse(FUSION_RULES, more.pop("ranks", ranks_of(*args, model=model))).run(editor)
    return editor.misses


def decisions(module: GraphModule) -> dict[str, tuple[bool, str]]:
    """For each computing node that has one: whether it is int8, and why."""
    found = {n.name: info(n).decision for n in nodes(module)}
    return {name: (d.int8, d.why) for name, d in found.items() if d is not None}


def observers(module: nn.Module) -> list[Observer]:
    """All observers."""
    return [m for m in module.modules() if isinstance(m, Observer)]


def qtype(scale: float, zero_point: int = 0, dtype: torch.dtype = torch.uint8) -> QType:
    """An edge type that uses the whole range of ``dtype``."""
    limits = torch.iinfo(dtype)
    return QType(scale, zero_point, limits.min, limits.max, dtype)


def trained(model: nn.Module) -> nn.Module:
    """Give every batch norm the statistics and weights of a trained one, and put it in eval.

    A fresh batch norm is nearly the identity: folding it wrongly would go unnoticed.
    """
    generator = torch.Generator().manual_seed(1)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty_like(like).uniform_(low, high, generator=generator)

    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, _Norm)):
            if norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.copy_(draw(norm.running_mean, -1.0, 1.0))
                norm.running_var.copy_(draw(norm.running_var, 0.3, 3.0))
            if norm.affine:
                norm.weight.copy_(draw(norm.weight, -1.5, 1.5))
                norm.bias.copy_(draw(norm.bias, -0.5, 0.5))
    return model.eval()


class Calls(nn.Module):
    """A model with the given submodules and parameters whose forward is ``body(self, *inputs)``."""

    def __init__(self, body: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body


class One(Calls):
    """With one input."""

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


class Two(Calls):
    """With two inputs."""

    def forward(self, x: Any, y: Any) -> Any:
        return self.body(self, x, y)


class Three(Calls):
    """With three inputs."""

    def forward(self, x: Any, y: Any, z: Any) -> Any:
        return self.body(self, x, y, z)


def assert_same(found: Any, wanted: Any) -> None:
    """Bit for bit the same tensors, in the same containers."""
    if isinstance(wanted, tuple | list):
        assert isinstance(found, tuple | list) and len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    elif isinstance(wanted, Tensor):
        assert isinstance(found, Tensor)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert torch.equal(found, wanted)
    else:
        assert found == wanted


def copies(inputs: Iterable[Any]) -> Iterator[Any]:
    """Inputs that a model may overwrite."""
    return (x.clone() if isinstance(x, Tensor) else x for x in inputs)


def check_eager(model: nn.Module, module: GraphModule, *inputs: Any) -> None:
    """Outputs of ``module`` are exactly those of ``model``."""
    with torch.no_grad():
        assert_same(module(*copies(inputs)), model(*copies(inputs)))


FLOAT32: float = 1e-5
"""Rewrites keep float32 outputs to this share of the largest value: eight roundings deep."""
FLOAT64: float = 1e-10
"""The same in float64, where rounding alone explains 1e-14."""


def close_share(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def check_rule(
    model: nn.Module,
    *args: Tensor,
    ops: Sequence[str],
    unit: bool = True,
    rules: Sequence[Rule] = FUSION_RULES,
) -> GraphModule:
    """Fuse ``model`` and check what a rule promises.

    Args:
        model: in eval mode, float32.
        args: its inputs, float32.
        ops: the canonical ops that must be left, in order.
        unit: whether these must be one unit.
        rules: the rules to apply.

    Returns:
        The fused graph.
    """
    module = fused(model, *args, rules=rules)
    assert names(module) == list(ops)
    labels = {info(node).unit for node in nodes(module)}
    if len(ops) > 1:
        assert (len(labels) == 1 and None not in labels) is unit
    with torch.no_grad():
        wanted = model(*args)
        assert close_share(module(*args), wanted) <= FLOAT32
        double = fused(model.double(), *(a.double() for a in args), rules=rules)
        exact = model(*(a.double() for a in args))
        assert close_share(double(*(a.double() for a in args)), exact) <= FLOAT64
        model.float()
    again = Editor(module)
    Fuse(tuple(rules), ranks_of(*args, model=model)).run(again)
    assert again.log == [], "a second run must change nothing"
    return module
