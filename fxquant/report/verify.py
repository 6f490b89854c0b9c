"""Verify: op by op, whether a converted model computes what was trained.

Both models run on the same batches, and every op of the converted model reads what the trained one
has there: errors of one op never reach the next, so that each can be held to one code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.calibration.data import check_options, is_function, refuse_empty
from fxquant.errors import ConfigError
from fxquant.graph.counterparts import Counterpart, as_made, counterparts, last_origins
from fxquant.graph.held_state import random_kept, state_kept
from fxquant.graph.op_table import module_of
from fxquant.graph.walk import Walk, bind_inputs
from fxquant.numerics.affine import quantize
from fxquant.numerics.fake_quantizer import FakeQuantize, FakeQuantizer
from fxquant.record import Record, record_of
from fxquant.report.metered import Feed, calls, evaluating
from fxquant.report.verified import OpVerified, Verification


def verify_models(prepared: nn.Module, converted: nn.Module, feed: Feed) -> Verification:
    """See :func:`fxquant.report.api.verify`."""
    trained, made, record = _pair(prepared, converted)
    check_options(feed.data, feed.transform, feed.max_batches)
    if is_function(feed.data):
        raise ConfigError(
            "verify() feeds the same batches to two models: pass the batches, not a function that "
            "feeds one"
        )
    run = _Lockstep(trained, made, record)
    batches = 0
    with torch.no_grad(), evaluating(trained), state_kept(trained, made):
        for args, kwargs in calls(made, feed):
            with state_kept(trained, made):
                run.feed(args, kwargs)
            batches += 1
    if not batches:
        refuse_empty(feed.data)
    return Verification(run.rows(), batches)


def _pair(prepared: nn.Module, converted: nn.Module) -> tuple[GraphModule, GraphModule, Record]:
    for given, wanted in ((prepared, "what prepare() returned"), (converted, "what convert() did")):
        if not isinstance(given, nn.Module):
            raise ConfigError(f"verify() got a {type(given).__name__}: pass {wanted}")
    before, after = record_of(prepared), record_of(converted)
    if before.mode != "qat" or before.backend or not isinstance(prepared, GraphModule):
        raise ConfigError(
            "verify() compares what was trained with what was made of it: its first argument is "
            "what prepare(model, mode='qat') returned. compare() compares with the float model"
        )
    if not after.backend or not isinstance(converted, GraphModule):
        raise ConfigError(
            "verify() got a model that is not converted: its second argument is what convert() "
            "returned"
        )
    mine, theirs = before.snapshots, after.snapshots
    same = len(mine) <= len(theirs) and all(
        a.state == b.state for a, b in zip(mine, theirs, strict=False)
    )
    if not same:
        raise ConfigError(
            "the converted model was not made from this prepared one: their graphs differ"
        )
    off = [m.path for m in prepared.modules() if isinstance(m, FakeQuantizer) and not m.quantizing]
    if off:
        raise ConfigError(
            f"fake-quant is off at {off[0]} and {len(off) - 1} other places of the prepared model, "
            "which computes in float there: switch it on before verify()"
        )
    return prepared, converted, after


@dataclass
class _Sums:
    """What was found of one value, over all batches."""

    worst: int | None = None
    different: int = 0
    codes: int = 0
    floats: int = 0
    float_error: float = 0.0

    def add_codes(self, made: Tensor, wanted: Tensor) -> None:
        gap = (made.to(torch.int32) - wanted.to(torch.int32)).abs()
        self.worst = max(self.worst or 0, int(gap.max()))
        self.different += int((gap != 0).sum())
        self.codes += gap.numel()

    def add_floats(self, made: Tensor, wanted: Tensor) -> None:
        gap = (made.double() - wanted.double()).abs()
        gap = torch.where((made == wanted) | (made.isnan() & wanted.isnan()), 0.0, gap)
        most = float(wanted.double().abs().nan_to_num(0.0, 0.0, 0.0).max())
        share = float(gap.nan_to_num(math.inf).max()) / max(most, torch.finfo(torch.float32).tiny)
        self.float_error = max(self.float_error, share)
        self.floats += gap.numel()


@dataclass
class _Site:
    """A value of the trained graph, what stands for it, and what was found."""

    row: OpVerified
    pair: Counterpart | None
    value: Node
    sums: _Sums = field(default_factory=_Sums)
    why: str = ""

    def done(self) -> OpVerified:
        made, row = self.sums, self.row
        if not made.codes and not made.floats:
            why = self.why or "nothing came by"
            return OpVerified(row.path, row.op, row.kernel, why=why)
        if made.codes:
            equal = 1.0 - made.different / made.codes
            return OpVerified(row.path, row.op, row.kernel, made.worst, equal, None, made.codes)
        return OpVerified(row.path, row.op, row.kernel, None, None, made.float_error, made.floats)


class _Lockstep:
    """Runs both graphs; the converted one reads the values of the trained one."""

    def __init__(self, trained: GraphModule, made: GraphModule, record: Record) -> None:
        self._trained, self._made = trained, made
        self._sites = _sites(trained, made, record)
        self._by_value = {site.value: site for site in self._sites if site.pair is not None}
        self._by_node = {site.pair.node: site for site in self._sites if site.pair is not None}
        self._truth: dict[int, Tensor] = {}

    def feed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run one batch."""
        self._truth.clear()
        with random_kept(self._trained, self._made):
            for module, changed in ((self._trained, self._watch), (self._made, self._compare)):
                torch.manual_seed(0)
                Walk(module, bind_inputs(module, args, kwargs), changed).run()

    def rows(self) -> tuple[OpVerified, ...]:
        """What was found."""
        return tuple(site.done() for site in self._sites)

    def _watch(self, node: Node, value: Any) -> Any:
        site = self._by_value.get(node)
        if site is not None:
            if isinstance(value, Tensor):
                self._truth[id(site)] = value.clone()
            else:
                site.why = "its result is no tensor"
        return value

    def _compare(self, node: Node, value: Any) -> Any:
        site = self._by_node.get(node)
        wanted = None if site is None else self._truth.pop(id(site), None)
        if site is None or site.pair is None or wanted is None:
            return value
        if not isinstance(value, Tensor) or value.shape != wanted.shape:
            site.why = "nothing in the converted model has the shape of its result"
            return value
        qtype = site.pair.qtype
        if qtype is None or value.dtype != qtype.dtype:
            if value.is_floating_point() and value.numel():
                site.sums.add_floats(value, wanted)
            return torch.empty_like(value).copy_(wanted)
        limits = (qtype.quant_min, qtype.quant_max, qtype.dtype)
        codes = quantize(wanted, qtype.scale, qtype.zero_point, *limits)
        if value.numel():
            site.sums.add_codes(value, codes)
        # Laid out in memory as it is in the converted model: kernels depend on it.
        return torch.empty_like(value).copy_(codes)


def _sites(trained: GraphModule, made: GraphModule, record: Record) -> list[_Site]:
    """Every int8 op, and every value that becomes codes without one."""
    found = last_origins([op.origins for op in record.ops], trained.graph)
    results = as_made(found, trained.graph, made.graph)
    fakes = {
        node.args[0]: node
        for node in trained.graph.find_nodes(op="call_module")
        if isinstance(module_of(node), FakeQuantize)
    }
    # A fake-quant has the origins of what it reads.
    reals = [n.args[0] if n is not None and n in fakes.values() else n for n in results]
    rows: dict[Node, OpVerified] = {}
    for op, real in zip(record.ops, reals, strict=True):
        if not op.int8:
            continue
        if isinstance(real, Node):
            rows[real] = OpVerified(op.path, op.op, op.kernel)
    for value, fake in fakes.items():
        if isinstance(value, Node) and value not in rows:
            rows[value] = OpVerified(str(module_of(fake).path), "quantize", "")
    pairs = {pair.real: pair for pair in counterparts(trained.graph, made.graph, list(rows))}
    taken = {pair.node for real, pair in pairs.items() if rows[real].kernel}
    for real in [real for real, row in rows.items() if not row.kernel]:
        pair = pairs.get(real)
        # A kernel may take float and quantize it itself; and what drops at random in training
        # stands between a value and what is read, which in evaluation are one.
        if pair is None or pair.qtype is None or pair.node in taken:
            del rows[real]
            pairs.pop(real, None)
    order = {node: place for place, node in enumerate(trained.graph.nodes)}
    return [
        _Site(row, pairs.get(real), fakes.get(real, real), why="nothing stands for its result")
        for real, row in sorted(rows.items(), key=lambda item: order[item[0]])
    ]
