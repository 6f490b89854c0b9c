"""Call kernels: units of users' patterns with an int8 kernel become calls of it, on any backend.

    quantize(f(dequantize(x), w))   ->   kernel(x, w)

Each kernel is first compared with what it stands for, on random codes; one code of difference is
what rounding at another place may cost.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, fx
from torch.fx import Node

from fxquant.errors import PatternError
from fxquant.graph.edit import Editor
from fxquant.graph.extract import extract
from fxquant.graph.flow import wanted_int8
from fxquant.graph.held import held_tensor
from fxquant.graph.info import CustomUnit, QType, info
from fxquant.graph.kernel_unit import IntegerLayer, KernelUnit
from fxquant.graph.op_table import (
    DEQUANTIZE,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    argument,
    is_op,
    module_of,
    op_of,
)
from fxquant.graph.ops import Kind
from fxquant.graph.verify import Stage
from fxquant.graph.view import Unit, flat_nodes, units, what
from fxquant.passes.base import Pass

_MOST: Final = 1
"""How many codes a kernel may be off."""


@dataclass(frozen=True)
class CallKernels(Pass):
    """Put calls of users' kernels in the place of their units."""

    name: ClassVar[str] = "call-kernels"
    needs: ClassVar[Stage] = Stage.QDQ
    gives: ClassVar[Stage] = Stage.QDQ

    def run(self, editor: Editor) -> None:
        """Unit by unit.

        Raises:
            PatternError: a kernel computes something else than its pattern.
        """
        if all(info(node).custom is None for node in editor.graph.nodes):
            return
        found = [u for u in units(editor.graph) if u.custom is not None and wanted_int8(u.output)]
        for unit in found:
            if unit.custom is not None and unit.custom.kernel is not None:
                site = _Site(editor, unit, unit.custom)
                site.compare()
                site.write()
        if found:
            with editor.rule("drop-dead"):
                editor.clean()


class _Site:
    """One unit that a kernel is called for."""

    def __init__(self, editor: Editor, unit: Unit, custom: CustomUnit) -> None:
        self._editor, self._unit, self._custom = editor, unit, custom
        self._sources = self._read_sources()
        self._results = self._read_results()
        self._module = self._make()

    def _read_sources(self) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for node in self._unit.nodes:
            part = info(node).part
            flat = list(flat_nodes(node.args))
            for place, name in part.reads if part is not None else ():
                found.setdefault(name, flat[place])
        lost = [name for name in self._custom.inputs if name not in found]
        if lost:
            raise PatternError(
                f"{self._custom.line}: the kernel of pattern {self._custom.name!r} cannot be given "
                f"{lost[0]!r}: at {self._unit.head.name} it is an option, not an operand"
            )
        return {name: found[name] for name in self._custom.inputs}

    def _read_results(self) -> list[tuple[Node, Node]]:
        """Each output in the pattern's order, with the node that quantizes it."""
        given = [(part.gives[0], n) for n in self._unit.nodes if (part := info(n).part) is not None
                 and part.gives]  # fmt: skip
        return [
            (node, next(user for user in node.users if is_op(user, QUANTIZE)))
            for _, node in sorted(given, key=lambda pair: pair[0])
        ]

    def _make(self) -> KernelUnit:
        layers: dict[str, IntegerLayer] = {}
        constants: dict[str, Any] = {}
        for node in self._unit.nodes:
            part = info(node).part
            if part is None:
                continue
            constants.update(part.numbers)
            if part.role:
                held = _layer(node)
                (layers if isinstance(held, IntegerLayer) else constants)[part.role] = held
        inputs = tuple((name, _type(source)) for name, source in self._sources.items())
        outputs = tuple(q for _, q in self._results)
        types = tuple(_written(q) for q in outputs)
        return KernelUnit(self._custom.kernel, inputs, types, layers, constants)  # type: ignore[arg-type]  # asked for by the pass

    def _codes(self) -> tuple[Node, ...]:
        """What the kernel reads: codes, or a float tensor where there are none."""
        read = []
        for source in self._sources.values():
            codes = source.args[0] if is_op(source, DEQUANTIZE) else source
            read.append(codes if isinstance(codes, Node) else source)
        return tuple(read)

    def write(self) -> None:
        """Call the kernel where the unit stood."""
        editor, head = self._editor, self._unit.head
        codes = self._codes()
        with editor.rule(f"kernel {self._custom.name}", line=self._custom.line):
            path = self._put()
            before = _first_free(editor, codes)
            made = editor.call_module(path, codes, like=head, before=before)
            reads = tuple(info(source).writes for source in codes)
            several = len(self._results) > 1
            editor.annotate(
                made,
                reads=reads,
                unit=None,
                part=None,
                value="tensors" if several else "tensor",
                decision=info(head).decision,
                origins=tuple(dict.fromkeys(o for n in self._unit.nodes for o in info(n).origins)),
            )
            for place, (node, q) in enumerate(self._results):
                result = made
                if several:
                    result = editor.call(operator.getitem, (made, place), like=node, before=before)
                editor.annotate(
                    result, writes=info(q).writes, unit=None, part=None, shape=info(q).shape
                )
                editor.replace(q, result, *reversed(self._unit.nodes))

    def _put(self) -> str:
        """Where the kernel's module stands: in the place of its layer, where it has one."""
        weights = [n.args[1] for n in self._unit.nodes if isinstance(_layer(n), IntegerLayer)]
        codes = [n.args[0] for n in weights if isinstance(n, Node)]
        if len(codes) == 1 and isinstance(codes[0], Node):
            path = str(codes[0].target).rpartition(".")[0]
            self._editor.set_module(path, self._module)
            return path
        head = self._unit.head
        return self._editor.add_module(info(head).path or head.name, self._module)

    def compare(self) -> None:
        """Run kernel and unit on random codes.

        Raises:
            PatternError: they differ by more than a code, or the kernel fails.
        """
        generator = torch.Generator().manual_seed(0)
        drawn: dict[Node, Tensor] = {}
        for source, codes in zip(self._sources.values(), self._codes(), strict=True):
            held = _constant(source)
            shape = info(source).shape
            if held is None and shape is None:
                return  # nothing is known of what it is fed; calibration never came here
            if codes not in drawn:
                drawn[codes] = _draw(source, shape or (), generator) if held is None else held
        wanted = self._reference()(*drawn.values())
        given = [drawn[codes] for codes in self._codes()]
        wanted = wanted if isinstance(wanted, tuple | list) else (wanted,)
        with torch.no_grad():
            try:
                found = self._module(*given)
            # The kernel is the user's own code and may fail in any way.
            except Exception as error:
                raise PatternError(self._failed(f"{type(error).__name__}: {error}")) from error
        found = found if isinstance(found, tuple | list) else (found,)
        for place, (a, b) in enumerate(zip(found, wanted, strict=True)):
            self._agree(place, a, b)

    def _failed(self, why: str) -> str:
        place = info(self._unit.head).path or self._unit.head.name
        return (
            f"{self._custom.line}: the kernel {self._module.kernel_name} of pattern "
            f"{self._custom.name!r} failed on random codes, at {place}: {why}"
        )

    def _agree(self, place: int, found: Tensor, wanted: Tensor) -> None:
        if found.shape != wanted.shape:
            raise PatternError(
                self._failed(f"it returns {tuple(found.shape)}, not {tuple(wanted.shape)}")
            )
        off = (found.to(torch.int32) - wanted.to(torch.int32)).abs()
        if off.numel() and int(off.max()) > _MOST:
            worst = int(off.argmax())
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), off.shape))
            share = float((off > _MOST).float().mean())
            raise PatternError(
                self._failed(
                    f"output {place} is up to {int(off.max())} codes off ({share:.1%} of it by "
                    f"more than one): at {index} the kernel gives {int(found.flatten()[worst])}, "
                    f"the pattern {int(wanted.flatten()[worst])}"
                )
            )

    def _reference(self) -> fx.GraphModule:
        """The unit alone, between codes and codes."""
        entries = dict(zip(self._codes(), self._sources, strict=True))
        return extract([q for _, q in self._results], entries)


def _first_free(editor: Editor, sources: tuple[Node, ...]) -> Node:
    """The first place behind all of ``sources``."""
    last = max(sources)
    while last.op == "placeholder" and last.next.op == "placeholder":
        last = last.next
    return last.next


def _layer(node: Node) -> Any:
    """What a kernel gets for a module of its pattern."""
    found = op_of(node)
    if found is not None and found.kind is Kind.CONTRACT and len(node.args) > 1:
        weight = node.args[1]
        if is_op(weight, DEQUANTIZE_WEIGHT) and isinstance(weight, Node):
            codes, scale, axis = weight.args
            bias = node.args[2] if len(node.args) > 2 else None
            options = {name: argument(node, name) for name in found.options}
            held = [_constant(n) if isinstance(n, Node) else None for n in (codes, scale, bias)]
            return IntegerLayer(held[0], held[1], axis, held[2], options)  # type: ignore[arg-type]  # the convert pass wrote these
    if node.op == "call_module":
        return module_of(node)
    options = {name: argument(node, name) for name in found.options} if found is not None else {}
    return SimpleNamespace(op=what(node), **options)


def _constant(node: Node) -> Tensor | None:
    found = held_tensor(node)
    return None if found is None else found.detach()


def _type(source: Node) -> QType | None:
    codes = source.args[0] if is_op(source, DEQUANTIZE) else None
    return info(codes).writes if isinstance(codes, Node) else None


def _written(q: Node) -> QType:
    found = info(q).writes
    if found is None:
        raise TypeError(f"%{q.name} writes no codes")
    return found


def _draw(source: Node, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    qtype = _type(source)
    if qtype is None:
        return torch.randn(shape, generator=generator)
    ends = (qtype.quant_min, qtype.quant_max + 1)
    return torch.randint(*ends, shape, generator=generator, dtype=torch.int32).to(qtype.dtype)
