"""One backend's ops against the reference's, each fed exactly the codes the reference has there.

Both models come from one calibrated model, so their Q/DQ graphs are the same; the log of the
lowering says which op took the place of which ``quantize``. Errors of one op therefore never
reach the next, and every op can be held to one code.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

import fxquant
from fxquant import recipes
from fxquant.backends.reference import Reference
from fxquant.graph.view import what

FLOAT_TOLERANCE = 1e-4
"""Of the largest value, for ops that write float: sums of a few thousand float32 products in the
reference, exact integer sums in the kernel."""


@dataclass(frozen=True)
class Compared:
    """One op of the backend beside the reference's.

    Args:
        name: the node.
        kernel: what runs it.
        equal: the share of equal codes; of float results, 1.0 if within the tolerance.
        worst: the largest difference, in codes; of float results, 0 if within the tolerance.
        count: how many codes.
    """

    name: str
    kernel: str
    equal: float
    worst: int
    count: int


class _Values(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = _cloned(value)
        return value


class _Step(fx.Interpreter):
    """Runs each node on the reference's values."""

    def __init__(
        self, module: GraphModule, twins: dict[str, str], reference: GraphModule, values: _Values
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.like, self.reference = twins, values.values
        self.targets = {node.name: node.target for node in reference.graph.nodes}
        self.found: list[Compared] = []

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        twin = self.like.get(n.name)
        if twin is None:
            return _cloned(value) if isinstance(value, Tensor) else value
        wanted = self.reference[twin]
        changed = twin != n.name or n.target != self.targets[twin]
        if changed and isinstance(value, Tensor):
            self.found.append(_compare(n, value, wanted))
        return _cloned(wanted)


def _cloned(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)


def _kernel(node: Node) -> str:
    module = node.graph.owning_module
    if node.op == "call_module" and module is not None:
        return type(module.get_submodule(str(node.target))).__name__
    return what(node)


def _compare(node: Node, got: Tensor, wanted: Tensor) -> Compared:
    assert got.dtype == wanted.dtype, f"{node}: {got.dtype}, not {wanted.dtype}"
    assert got.shape == wanted.shape, f"{node}: {got.shape}, not {wanted.shape}"
    count = got.numel()
    if got.is_floating_point():
        limit = FLOAT_TOLERANCE * float(wanted.abs().max()) if count else 0.0
        close = bool(((got - wanted).abs() <= limit).all())
        return Compared(node.name, _kernel(node), float(close), int(not close), count)
    difference = (got.int() - wanted.int()).abs()
    equal = float((difference == 0).double().mean()) if count else 1.0
    worst = int(difference.max()) if count else 0
    return Compared(node.name, _kernel(node), equal, worst, count)


def _twins(lowered: GraphModule, reference: GraphModule) -> dict[str, str]:
    """For each node of ``lowered`` the node of ``reference`` with the same value."""
    passes = fxquant.history(lowered)
    assert passes["convert"].state == fxquant.history(reference)["convert"].state
    names = {node.name for node in reference.graph.nodes}
    twins = {name: name for name in names}
    for edit in passes["lower"].edits:
        if edit.added and edit.removed:
            twins[edit.added[-1]] = twins[edit.removed[0]]
    return twins


def lockstep(lowered: GraphModule, reference: GraphModule, *inputs: Any) -> list[Compared]:
    """Compare every lowered op of ``lowered`` with ``reference``, both fed ``inputs``."""
    with torch.no_grad():
        truth = _Values(reference)
        truth.run(*_cloned(inputs))
        step = _Step(lowered, _twins(lowered, reference), reference, truth)
        step.run(*_cloned(inputs))
    return step.found


def reference_of(prepared: GraphModule) -> GraphModule:
    """The reference model with the integer weights and float ops that the x86 model has here."""
    made, like = recipes._BACKENDS["reference"](), recipes._BACKENDS["x86"]()
    assert isinstance(made, Reference)
    pairs, unsigned, costs = like.saturates_pairs, like.reads_unsigned, like.costs
    twin = dataclasses.replace(made, saturates_pairs=pairs, reads_unsigned=unsigned, costs=costs)
    with mock.patch.dict(recipes._BACKENDS, reference=lambda: twin):
        return fxquant.convert(prepared, backend="reference")


def both(model: nn.Module, *batches: Any, **options: Any) -> tuple[GraphModule, GraphModule]:
    """The x86 and the reference model of one calibration."""
    first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    prepared = fxquant.prepare(model, example_inputs=first, **options)
    fxquant.calibrate(prepared, list(batches))
    return fxquant.convert(prepared, backend="x86"), reference_of(prepared)


@dataclass(frozen=True)
class Checked:
    """A pair of models whose ops agree.

    Args:
        kernels: what ran in the lowered model, by kernel.
        lowered: the x86 model.
        reference: the reference model.
    """

    kernels: dict[str, list[Compared]]
    lowered: GraphModule
    reference: GraphModule


def check_ops(model: nn.Module, *batches: Any, **options: Any) -> Checked:
    """Hold every op of the x86 model to one code, and 99.9 % of its codes to none."""
    lowered, reference = both(model, *batches, **options)
    first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    found = lockstep(lowered, reference, *first)
    kernels: dict[str, list[Compared]] = {}
    for one in found:
        assert one.worst <= 1, one
        # One code in a thousand, and one in all where there are fewer.
        assert one.equal >= 0.999 or one.equal * one.count >= one.count - 1, one
        kernels.setdefault(one.kernel, []).append(one)
    return Checked(kernels, lowered, reference)
