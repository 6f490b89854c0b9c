"""Train units: what users' patterns say is to be trained in their place stands there.

    silu(conv(x, weight=fq(w)))   ->   unit(x)

The user's module is made from the modules of the unit, and trains their parameters. Layers come to
it as copies that round their weights, so that it computes what will be deployed.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.fx import Node

from fxquant.errors import PatternError
from fxquant.graph.edit import Editor
from fxquant.graph.flow import wanted_int8
from fxquant.graph.info import CustomUnit, info
from fxquant.graph.op_table import argument, is_op, module_of, op_of
from fxquant.graph.trained_layers import rounding_copy
from fxquant.graph.trained_units import CalledOp, TrainedUnit, given_to
from fxquant.graph.verify import Stage
from fxquant.graph.view import Unit, flat_nodes, units
from fxquant.numerics.fake_weights import FakeQuantizeWeight, Rounding
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class TrainUnits(Pass):
    """Call users' modules in the place of their units.

    Args:
        home: where what is added to the user's modules stands.
    """

    name: ClassVar[str] = "train-units"
    needs: ClassVar[Stage] = Stage.OBSERVED
    gives: ClassVar[Stage] = Stage.OBSERVED
    home: str = "fake_quant"

    def run(self, editor: Editor) -> None:
        """Unit by unit; those that stay in float are trained as they are.

        Raises:
            PatternError: a user's module cannot be made.
        """
        for unit in units(editor.graph):
            custom = unit.custom
            if custom is not None and custom.qat is not None and wanted_int8(unit.output):
                _train(editor, unit, custom, custom.qat, self.home)


def _train(
    editor: Editor, unit: Unit, custom: CustomUnit, make: Callable[..., Any], home: str
) -> None:
    place = info(unit.head).path or unit.head.name
    if " of " in custom.name.rpartition(" (")[2]:
        raise PatternError(
            f"{custom.line}: pattern {custom.name!r} has qat=, and at {place} one of its layers "
            "reads what another one makes: those are deployed as several int8 units, and one "
            "module cannot be trained for them; write one pattern for each layer"
        )
    weights = {node: given_to(node) for node in unit.nodes}
    added = {
        str(n.target): module_of(n)
        for made in weights.values()
        for n in made
        if n.op == "call_module"
    }
    module = _made(custom, make, _roles(unit, weights), place)
    sources, outputs = _sources(unit, custom, place), _outputs(unit)
    nodes = sorted([*unit.nodes, *(n for made in weights.values() for n in made)])
    trained = TrainedUnit(module, nodes, sources, outputs, added)
    with editor.rule(f"train {custom.name}", line=custom.line):
        path = editor.add_module(f"{home}.{unit.output.name}_unit", trained)
        last = max(sources)
        while last.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        call = editor.call_module(path, tuple(sources), like=unit.head, after=last)
        several = len(outputs) > 1
        # What it is found by again stands first: it has the value of its result.
        origins = dict.fromkeys(o for n in (unit.output, *unit.nodes) for o in info(n).origins)
        editor.annotate(
            call,
            unit=None,
            part=None,
            value="tensors" if several else "tensor",
            origins=tuple(origins),
        )
        before = call.next
        for number, output in enumerate(outputs):
            result = call
            if several:
                picked = (call, number)
                result = editor.call(operator.getitem, picked, like=output, before=before)
                editor.annotate(result, unit=None, part=None)
            editor.reuse(output, result)
        for node in reversed(nodes):
            if not node.users:
                editor.erase(node)
    editor.drop_unused_modules()


def _made(
    custom: CustomUnit, make: Callable[..., Any], roles: dict[str, nn.Module], place: str
) -> nn.Module:
    takes = inspect.signature(make).parameters
    rest = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    try:
        made = make(**{name: m for name, m in roles.items() if rest or name in takes})
    # The user's own code may fail in any way.
    except Exception as error:
        raise PatternError(
            f"{custom.line}: qat= of pattern {custom.name!r} failed at {place}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise PatternError(
            f"{custom.line}: qat= of pattern {custom.name!r} returned a {type(made).__name__}: it "
            "makes the module to be trained, from the modules of the pattern"
        )
    return made


def _roles(unit: Unit, weights: dict[Node, list[Node]]) -> dict[str, nn.Module]:
    """The modules of a unit by the names that the pattern has for them."""
    found: dict[str, nn.Module] = {}
    for node in unit.nodes:
        part = info(node).part
        if part is None or not part.role:
            continue
        fake = next((n for n in weights[node] if n is node.kwargs.get("weight")), None)
        if fake is not None:
            found[part.role] = _with_norm(node, _rounding(node, fake))
        elif node.op == "call_module":
            found[part.role] = _with_norm(node, module_of(node))
        else:
            op = op_of(node)
            names = op.options if op is not None else ()
            options = {name: argument(node, name) for name in names}
            found[part.role] = CalledOp(node.target, options)  # type: ignore[arg-type]  # a function
    return found


def _with_norm(node: Node, layer: nn.Module) -> nn.Module:
    """A layer with the batch norm that the pattern takes for a part of it, if there is one."""
    for user in node.users:
        part = info(user).part
        ours = info(user).unit == info(node).unit and part is not None and not part.role
        if ours and is_op(user, "batch_norm"):
            return nn.Sequential(layer, module_of(user))
    return layer


def _rounding(node: Node, fake: Node) -> nn.Module:
    module = module_of(fake)
    if not isinstance(module, FakeQuantizeWeight):
        return module_of(node)
    label = info(node).unit
    norms = [u for u in node.users if info(u).unit == label and len(fake.args) > 1]
    norm = next((module_of(n) for n in norms if n.op == "call_module"), None)
    return rounding_copy(module_of(node), Rounding(module, norm))


def _sources(unit: Unit, custom: CustomUnit, place: str) -> list[Node]:
    """What the unit reads, in the order of the pattern's inputs."""
    found: dict[str, Node] = {}
    for node in unit.nodes:
        part = info(node).part
        flat = list(flat_nodes(node.args))
        for at, name in part.reads if part is not None else ():
            found.setdefault(name, flat[at])
    lost = [name for name in custom.inputs if name not in found]
    if lost:
        raise PatternError(
            f"{custom.line}: qat= of pattern {custom.name!r} cannot be given {lost[0]!r}: at "
            f"{place} it is an option, not an operand"
        )
    return [found[name] for name in custom.inputs]


def _outputs(unit: Unit) -> list[Node]:
    """What others read of the unit, in the pattern's order."""
    given = [
        (part.gives[0], node)
        for node in unit.nodes
        if (part := info(node).part) is not None and part.gives
    ]
    return [node for _, node in sorted(given, key=lambda pair: pair[0])]
