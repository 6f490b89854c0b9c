"""Measures a quantized model against its float original, value by value, batch by batch.

Three walks a batch and one backward pass. With ``f`` a float op and ``q`` what became of it:

1. float: every value ``v``;
2. quantized: every value ``z``, which has all errors so far: the *accumulated* error;
3. float, every op reading ``z``. The difference ``q(z) - f(z)`` is what the op adds *by itself*:
   its rounded weight, its arithmetic, its rounded result. (Where others read the result in float,
   and codes are made of it on the way to this op, the rounding is this op's.)

To first order the error of the output is the sum of the latter, each carried on by the Jacobian of
what follows. So ``<J e, error> / <error, error>`` is an op's share of the output error, and the
shares add up to one; ``J`` transposed times the error is one backward pass through the float model.
(On exact inputs the rounding of ``q`` would be another one, which has little to do with the error
at the output: shares would not add up.)
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxquant.calibration.binding import tensors
from fxquant.graph.counterparts import Counterpart, as_float_readers_see, counterparts
from fxquant.graph.held_state import state_kept
from fxquant.graph.info import QType
from fxquant.graph.walk import Walk, bind_inputs
from fxquant.numerics.affine import dequantize
from fxquant.numerics.agreement import Agreement, AgreementSums

_FAILURES = (RuntimeError, TypeError, ValueError)
"""What code that was never meant to be differentiated may raise when it is."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one value.

    Args:
        accumulated: against float, with all errors made before it.
        own: what the op adds by itself; ``None`` where that could not be told apart.
        share: its share of the error of the output, 1.0 is all of it; ``None`` if not known.
    """

    accumulated: Agreement
    own: Agreement | None
    share: float | None


class Meter:
    """Compares two graphs on batches.

    Args:
        captured: the float model's graph; its parameters are taken out of autograd.
        made: the quantized model's graph.
        results: the nodes of ``captured`` to compare.
    """

    def __init__(self, captured: GraphModule, made: GraphModule, results: Collection[Node]) -> None:
        self._captured, self._made = captured, made
        found = counterparts(captured.graph, made.graph, results)
        self._pairs = {pair.real: as_float_readers_see(pair) for pair in found}
        self._accumulated = {real: AgreementSums() for real in self._pairs}
        self._own = {real: AgreementSums() for real in self._pairs}
        self._shares = dict.fromkeys(self._pairs, 0.0)
        self._output = AgreementSums()
        self._error = 0.0
        self.batches = 0
        self.differentiable = True
        captured.requires_grad_(False)

    def feed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run both models on one batch; sums are all that stays of it."""
        _Batch(self, args, kwargs).run()
        self.batches += 1

    @property
    def output(self) -> Agreement:
        """How the outputs agree."""
        return self._output.agreement

    def counterpart(self, real: Node) -> Counterpart | None:
        """What stands for a value."""
        return self._pairs.get(real)

    def measured(self, real: Node) -> Measured | None:
        """What was measured of a value; ``None`` where nothing stands for it."""
        if real not in self._pairs or not self._accumulated[real].elements:
            return None
        own = self._own[real]
        known = self.differentiable and 0 < self._error < math.inf
        return Measured(
            self._accumulated[real].agreement,
            own.agreement if own.elements else None,
            self._shares[real] / self._error if known else None,
        )

    def noise(self) -> dict[str, float]:
        """SQNR in decibels of everything measured, by the names of nodes of the quantized graph."""
        return {
            pair.node.name: self._accumulated[real].agreement.sqnr
            for real, pair in self._pairs.items()
            if self._accumulated[real].elements
        }

    def _drop(self, pair: Counterpart) -> None:
        self._pairs.pop(pair.real, None)


class _Batch:
    """The walks of one batch."""

    def __init__(self, meter: Meter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._meter = meter
        self._call = (args, kwargs)
        self._real: dict[Node, list[Tensor]] = {}
        self._errors: dict[Node, list[Tensor]] = {}
        self._by_node = {pair.node: pair for pair in meter._pairs.values()}

    def run(self) -> None:
        """All walks, then the backward pass."""
        meter = self._meter
        output = self._float_output()
        with torch.no_grad():
            made = self._walk(meter._made, self._accumulate)
            gap = self._gap(output, made)
            self._walk(meter._captured, self._rounded)
        if gap and meter.differentiable:
            self._attribute(gap)

    def _walk(self, module: GraphModule, changed: Any) -> Any:
        args, kwargs = self._call
        torch.manual_seed(0)  # what draws random numbers draws the same ones in every walk
        with state_kept(module):
            return Walk(module, bind_inputs(module, *_copies(args, kwargs)), changed).run()

    def _float_output(self) -> Any:
        meter = self._meter
        if meter.differentiable:
            try:
                with torch.enable_grad():
                    return self._walk(meter._captured, self._watch)
            except _FAILURES:
                meter.differentiable = False
                self._real.clear()
        with torch.no_grad():
            return self._walk(meter._captured, self._watch)

    def _watch(self, node: Node, value: Any) -> Any:
        if node not in self._meter._pairs:
            return value
        # A copy: what follows may write into the value.
        self._real[node] = [each.detach().clone() for each in tensors(value)]
        if not torch.is_grad_enabled():
            return value
        leaves, spec = pytree.tree_flatten(value)
        place = 0
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[index] = self._hooked(node, place, leaf)
                place += 1
        return pytree.tree_unflatten(leaves, spec)

    def _hooked(self, node: Node, place: int, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        if not value.requires_grad:
            # A clone is no leaf, so that in-place ops may follow.
            value = value.detach().requires_grad_().clone()

        def book(gradient: Tensor) -> None:
            errors = self._errors.get(node)
            if errors is not None:
                share = (gradient * errors[place]).sum(dtype=torch.float64).item()
                self._meter._shares[node] += share

        value.register_hook(book)
        return value

    def _accumulate(self, node: Node, value: Any) -> Any:
        pair = self._by_node.get(node)
        if pair is None or pair.real not in self._real:
            return value
        reals = self._real[pair.real]
        made = [_plain(each, pair.qtype) for each in tensors(value)]
        if [each.shape for each in reals] != [each.shape for each in made]:
            self._forget(pair)
            return value
        for real, other in zip(reals, made, strict=True):
            if real.is_floating_point():
                self._meter._accumulated[pair.real].add(real, other)
        # What follows may write into it.
        self._errors[pair.real] = [each.clone() for each in made]
        return value

    def _forget(self, pair: Counterpart) -> None:
        self._meter._drop(pair)
        self._by_node.pop(pair.node)
        self._real.pop(pair.real)

    def _rounded(self, node: Node, value: Any) -> Any:
        """Compare the op with what became of it on the same inputs, and pass on the latter."""
        made = self._errors.get(node)
        if made is None:
            return value
        reals, read = list(tensors(value)), list(made)
        for place, (real, other) in enumerate(zip(reals, read, strict=True)):
            if real.is_floating_point():
                # Laid out in memory as in the float model: views depend on it.
                read[place] = torch.empty_like(real).copy_(other)
                self._meter._own[node].add(real, read[place])
                made[place] = read[place] - real
        leaves, spec = pytree.tree_flatten(value)
        rest = iter(read)
        return pytree.tree_unflatten(
            [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        )

    def _gap(self, output: Any, made: Any) -> list[tuple[Tensor, Tensor]]:
        """Each output with the error of its counterpart."""
        found = []
        for real, other in zip(tensors(output), tensors(made), strict=False):
            if real.is_floating_point() and real.shape == other.shape:
                self._meter._output.add(real, other)
                error = other.to(real.dtype) - real.detach()
                found.append((real, torch.where(error.isfinite(), error, 0.0)))
        return found

    def _attribute(self, gap: list[tuple[Tensor, Tensor]]) -> None:
        power = sum(error.square().sum(dtype=torch.float64).item() for _, error in gap)
        way = [(real, error) for real, error in gap if real.requires_grad]
        if not way:
            self._meter.differentiable = False
            return
        try:
            torch.autograd.backward([real for real, _ in way], [error for _, error in way])
        except _FAILURES:
            self._meter.differentiable = False
            return
        self._meter._error += power


def _copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The batch for one walk: a model that writes into its input writes into a copy."""
    return pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))


def _plain(value: Tensor, qtype: QType | None) -> Tensor:
    if qtype is None or value.dtype != qtype.dtype:
        return value
    return dequantize(value, qtype.scale, qtype.zero_point)
