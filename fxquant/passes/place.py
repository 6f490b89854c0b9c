"""Place: keep in int8 only what is worth it, by a minimum cut over the graph.

Convolutions and linears are int8 because the user asked for it. Every other op that could be
int8 may also run in float: then codes are converted at its edges. Ops on one side of the cut run
on codes, ops on the other in float; cutting costs what the conversions cost. (Max-flow min-cut:
Ford and Fulkerson 1956; conversions shared by several readers are one edge through a helper node.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final

from torch.fx import Node

from fxquant.backends.base import GATE, GELU_TANH, MEASURED, Costs
from fxquant.graph.edit import Editor
from fxquant.graph.flow import Flow, gates, gives_indices, rescaled_by, root_of, wanted_int8
from fxquant.graph.info import Decision, info
from fxquant.graph.op_table import argument, is_op, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.verify import Stage
from fxquant.graph.view import Unit, tensor_sources, what
from fxquant.lazy import lazy_module
from fxquant.passes.base import Pass

if TYPE_CHECKING:
    import networkx as nx
else:
    nx = lazy_module("networkx")

_CODES: Final = "codes"
_FLOAT: Final = "float"
_UNKNOWN_SIZE: Final = 10_000
"""Elements assumed where no shape was seen; decides nothing but near ties."""


@dataclass(frozen=True)
class Place(Pass):
    """Send units that lose time in int8 back to float.

    Args:
        costs: what ops and conversions cost.
    """

    name: ClassVar[str] = "place"
    needs: ClassVar[Stage] = Stage.MEASURED
    gives: ClassVar[Stage] = Stage.MEASURED
    costs: Costs = field(default_factory=lambda: MEASURED)

    def run(self, editor: Editor) -> None:
        """Cut each region of undecided units by itself: fixed units separate regions."""
        flow = Flow(editor.graph)
        for unit in reversed(list(flow.int8_units())):
            if _is_fixed(unit):
                continue
            if gives_indices(unit.output):
                if any(info(root_of(edge.source)).qtype is None for edge in unit.inputs):
                    self._demote(editor, unit, "its input is float")
            elif all(info(output).qtype is None for output in unit.outputs):
                self._demote(editor, unit, "nothing reads its result as codes")
        free = {unit.output: unit for unit in flow.int8_units() if not _is_fixed(unit)}
        for region in _regions(free, flow):
            cut = _Cut(flow, self.costs, {unit.output: unit for unit in region})
            for unit in cut.float_units():
                why = f"{what(unit.output)} is faster in float here than with its conversions"
                self._demote(editor, unit, f"{why}{cut.figures(unit)}")

    @staticmethod
    def _demote(editor: Editor, unit: Unit, why: str) -> None:
        with editor.rule("leave-float"):
            for node in unit.nodes:
                editor.annotate(node, decision=Decision(False, why, "place"))


def _is_fixed(unit: Unit) -> bool:
    custom = unit.custom
    if custom is not None and custom.kernel is not None:
        return True
    # A user's pattern asks for codes at its edges; where nobody reads them, it gains nothing.
    if custom is not None and any(info(output).qtype is not None for output in unit.outputs):
        return True
    op = op_of(unit.head)
    if op is None or op.name != "matmul":
        return op is not None and op.kind is Kind.CONTRACT
    # Products that the user asked for by their function: override torch.matmul.
    asked = info(unit.head).configured_by
    return asked.startswith("override ") and not asked.startswith("override '")


def _regions(free: dict[Node, Unit], flow: Flow) -> Iterator[list[Unit]]:
    """Connected groups of undecided units; two readers of one value are connected."""
    links: nx.Graph[Node] = nx.Graph()
    links.add_nodes_from(free)
    for output, unit in free.items():
        for edge in unit.inputs:
            maker = flow.unit_of(edge.source)
            if maker is not None and maker.output in free:
                links.add_edge(maker.output, output)
            readers = [u for u in (flow.unit_of(user) for user in edge.source.users) if u]
            links.add_edges_from((output, r.output) for r in readers if r.output in free)
    for component in nx.connected_components(links):
        # Graph order, not set order: the same model must give the same cut every time.
        yield [unit for output, unit in free.items() if output in component]


class _Cut:
    """One minimum cut: source side runs on codes, sink side in float."""

    def __init__(self, flow: Flow, costs: Costs, region: dict[Node, Unit]) -> None:
        self._flow = flow
        self._costs = costs
        self._region = region
        self._net: nx.DiGraph[str] = nx.DiGraph()
        self._net.add_nodes_from((_CODES, _FLOAT))

    def float_units(self) -> list[Unit]:
        """The units of the region that belong in float."""
        values: dict[Node, None] = {}
        for output, unit in self._region.items():
            self._weigh(output, unit)
            values.update(dict.fromkeys([e.source for e in unit.inputs]))
            if not gives_indices(output):
                values.update(dict.fromkeys(unit.outputs))
        for value in values:
            self._convert(value)
        _, (_, sink_side) = nx.minimum_cut(self._net, _CODES, _FLOAT)
        return [u for o, u in self._region.items() if o.name in sink_side]

    def _weigh(self, output: Node, unit: Unit) -> None:
        codes, real = self._both(unit)
        self._edge(output.name, _FLOAT, codes)
        self._edge(_CODES, output.name, real)

    def _both(self, unit: Unit) -> tuple[float, float]:
        """Microseconds of a unit on codes and in float, without conversions."""
        output, name = unit.output, _costed(unit.head)
        size = max((_size(n) for n in (output, *(e.source for e in unit.inputs))), default=0)
        batch = info(output).shape or ()
        work = (size, info(unit.head).macs or 0, math.prod(batch[:-2]))
        rest = [n for n in unit.nodes if n is not unit.head]
        extra = sum(self._costs.real(_costed(n)).of(size) for n in rest)
        # A scaled value has the codes of its source: nothing is computed.
        on_codes = "getitem" if rescaled_by(unit.head) is not None else name
        return self._costs.codes(on_codes).of(*work), self._costs.real(name).of(*work) + extra

    def figures(self, unit: Unit) -> str:
        """The costs behind a decision."""
        codes, real = self._both(unit)
        if what(unit.head) != "matmul":
            made = {edge.source: None for edge in unit.inputs}
            cost = sum(self._costs.quantize.of(_size(value)) for value in made)
            cost += sum(self._costs.dequantize.of(_size(value)) for value in unit.outputs)
            return (
                f": about {real:.0f} us, against {codes:.0f} us on codes and up to {cost:.0f} us "
                "for conversions"
            )
        return f": about {real:.0f} us, against {codes:.0f} us on codes"

    def _convert(self, value: Node) -> None:
        """What it costs if the maker of ``value`` and its readers stand on different sides."""
        maker = self._side(value)
        codes, real = f"{value.name}/codes", f"{value.name}/float"
        size = _size(value)
        op = op_of(value)
        # A kernel can write float itself, so leaving codes there is only the extra memory.
        direct = op is not None and op.kind is Kind.CONTRACT
        leave = self._costs.dequantize.of(size) * (0.5 if direct else 1.0)
        self._edge(codes, maker, self._costs.quantize.of(size))
        self._edge(maker, real, leave)
        for user in value.users:
            if _asks(user):
                continue  # a size is the same on either side
            if gives_indices(user) or (op_of(user) and value not in tensor_sources(user)):
                continue  # indices are read in either form; masks and indices are no codes
            reader = self._reader(user)
            if info(value).value == "tensors" and reader is not None and reader != maker:
                # Nothing can stand between a split and what takes its parts.
                self._edge(reader, maker, math.inf)
                self._edge(maker, reader, math.inf)
            if reader is not None and reader != maker:
                self._edge(reader, codes, math.inf)
                self._edge(real, reader, math.inf)

    def _side(self, value: Node) -> str:
        unit = self._flow.unit_of(value)
        if unit is not None and unit.output in self._region:
            return unit.output.name
        return _CODES if wanted_int8(value) else _FLOAT

    def _reader(self, user: Node) -> str | None:
        unit = self._flow.unit_of(user)
        if unit is not None and unit.output in self._region:
            return unit.output.name
        return _CODES if wanted_int8(user) else _FLOAT

    def _edge(self, source: str, target: str, microseconds: float) -> None:
        if source == target:
            return
        # Whole picoseconds: sums of floats depend on their order, and with them what a tie becomes.
        capacity = math.inf if microseconds == math.inf else round(1e6 * microseconds)
        # networkx reads a missing capacity as infinite.
        if capacity == math.inf:
            self._net.add_edge(source, target)
        elif self._net.has_edge(source, target):
            old = self._net[source][target].get("capacity", math.inf)
            if old != math.inf:
                self._net[source][target]["capacity"] = old + capacity
        else:
            self._net.add_edge(source, target, capacity=capacity)


def _costed(node: Node) -> str:
    """The name under which an op's costs are listed."""
    if is_op(node, "gelu") and argument(node, "approximate") == "tanh":
        return GELU_TANH
    if is_op(node, "mul"):
        shapes = sorted(map(_shape, tensor_sources(node)), key=math.prod, reverse=True)
        return GATE if len(shapes) > 1 and gates(shapes[0], shapes[1]) else "mul"
    return what(node)


def _shape(value: Node) -> tuple[int, ...]:
    return info(value).shape or info(root_of(value)).shape or ()


def _asks(user: Node) -> bool:
    """Whether an op asks for a size, a dtype or a device, and reads no element."""
    op = op_of(user)
    return (op is not None and op.kind is Kind.SHAPE) or user.target is getattr


def _size(value: Node) -> int:
    shape = info(value).shape or info(root_of(value)).shape
    return math.prod(shape) if shape is not None else _UNKNOWN_SIZE
