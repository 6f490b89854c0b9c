"""Writes recorded calls of operators as graphs of TorchScript's interpreter.

Nothing is compiled from source, and nothing optimised: the interpreter makes the calls one after
another, as recorded. (Its optimiser is told of what oneDNN's sums write to by nobody.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from fxquant.backends.programs.recording import Recording, Step, Value, values_in

Registers: TypeAlias = dict[Value, Any]
"""Tensors, and answers."""
Part: TypeAlias = Callable[[Registers], None]

_FORMATS: Final = {
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
}
"""Memory formats as TorchScript knows them, which takes no object for them."""
_LITERALS: Final = (*(type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout),)
_NO_SCHEMA: Final = "(no schema)"


def parts_of(recording: Recording) -> tuple[Part, ...]:
    """Functions that make the calls of a recording: as few as there can be.

    Operators that the interpreter does not know (``view`` as another type) are called from Python,
    between two parts.

    Args:
        recording: of a call.

    Returns:
        Each reads tensors from registers, writes others there, and takes out what none reads later.
    """
    held = dict(zip(recording.held, recording.tensors, strict=True))
    later = {*values_in(recording.results), *recording.answers}
    made: list[Part] = []
    for known, steps in reversed(_runs(recording.steps)):
        reads = {value for step in steps for value in step.reads}
        done = tuple(value for value in reads - later if value not in held)
        part = _scripted(steps, held, later) if known else functools.partial(_call, steps, held)
        made.append(functools.partial(_tidied, part, done))
        later |= reads
    return tuple(reversed(made))


def _runs(steps: Sequence[Step]) -> list[tuple[bool, list[Step]]]:
    """Steps in turns: those that the interpreter knows, and those that it does not."""
    runs: list[tuple[bool, list[Step]]] = []
    found: dict[Any, bool] = {}
    for step in steps:
        kind = (step.op, _kinds(step.args), _kinds(tuple(step.kwargs.items())))
        if kind not in found:
            found[kind] = _Graph(step.reads).add(step)
        if not runs or runs[-1][0] is not found[kind]:
            runs.append((found[kind], []))
        runs[-1][1].append(step)
    return runs


def _kinds(nest: Any) -> Any:
    """The types of arguments, by which the interpreter finds an operator."""
    return tuple(map(_kinds, nest)) if isinstance(nest, tuple) else type(nest)


def _tidied(part: Part, done: tuple[Value, ...], registers: Registers) -> None:
    part(registers)
    for value in done:
        registers.pop(value, None)  # what a part makes for itself was never there


def _scripted(steps: list[Step], held: dict[Value, Tensor], later: set[Value]) -> Part:
    """Steps as one function of TorchScript, which hands over what is read later."""
    made: dict[Value, None] = {}
    reads: dict[Value, None] = {}
    for step in steps:
        # What is written to in place is read, and a result, and not made here.
        reads |= dict.fromkeys(value for value in step.reads if value not in made)
        made |= dict.fromkeys(step.results)
    fixed = tuple(value for value in reads if value in held)
    given = tuple(value for value in reads if value not in held)
    results = tuple(value for value in made if value in later)
    graph = _Graph(given, fixed)
    for step in steps:
        graph.add(step)
    run = graph.finished(results)
    return functools.partial(_run, run, [held[value] for value in fixed], given, results)


def _run(
    run: Callable[..., Any],
    held: list[Tensor],
    given: tuple[Value, ...],
    results: tuple[Value, ...],
    registers: Registers,
) -> None:
    """One part: ``run`` is of TorchScript."""
    made = run(*[registers[value] for value in given], held)
    if len(results) == 1:
        registers[results[0]] = made
    else:
        registers.update(zip(results, made, strict=True))


def _call(steps: list[Step], held: dict[Value, Tensor], registers: Registers) -> None:
    """Steps one by one, from Python."""

    def given(nest: Any) -> Any:
        if isinstance(nest, Value):
            return held[nest] if nest in held else registers[nest]
        if isinstance(nest, tuple):
            return tuple(map(given, nest))
        return nest

    for step in steps:
        named = {name: given(value) for name, value in step.kwargs.items()}
        made = step.op(*given(step.args), **named)
        registers.update(zip(step.results, made if step.several else (made,), strict=True))


class _Graph:
    """A graph of TorchScript, being written.

    Args:
        given: tensors that it is called with, one by one.
        held: tensors that it is called with in a list, which comes last.
    """

    def __init__(self, given: Iterable[Value], held: Sequence[Value] = ()) -> None:
        self._graph: Any = torch._C.Graph()
        self._values: dict[Value, Any] = {}
        self._literals: dict[tuple[type, str], Any] = {}
        for value in dict.fromkeys(given):
            self._values[value] = self._input(_tensor())
        tensors = self._input(torch._C.ListType(_tensor()))
        if held:
            unpacked = list(self._node("prim::ListUnpack", [tensors], len(held)).outputs())
            for output in unpacked:
                output.setType(_tensor())
            self._name(held, unpacked)

    def add(self, step: Step) -> bool:
        """Write one call; false if the interpreter knows no such operator."""
        schema = step.op._schema
        given: list[Any] = []
        for place, argument in enumerate(schema.arguments):
            here = place < len(step.args)
            value = step.args[place] if here else step.kwargs.get(argument.name, argument)
            value = argument.default_value if value is argument else value
            written = self._written(value, argument.type)
            if written is None:
                return False
            given.append(written)
        node = self._node(schema.name, given, len(schema.returns))
        outputs = list(node.outputs())
        for output, returned in zip(outputs, schema.returns, strict=True):
            output.setType(returned.type)
        if node.schema() == _NO_SCHEMA:
            return False
        if step.several and len(schema.returns) == 1:
            outputs = list(self._node("prim::ListUnpack", outputs, len(step.results)).outputs())
            for output in outputs:
                output.setType(_tensor())
        self._name(step.results, outputs)
        return True

    def finished(self, results: tuple[Value, ...]) -> Callable[..., Any]:
        """The graph as a function that returns ``results``: a tensor if it is one, else a tuple."""
        made = [self._values[value] for value in results]
        if len(made) != 1:
            packed = self._node("prim::TupleConstruct", made, 1).output()
            packed.setType(torch._C.TupleType([each.type() for each in made]))
            made = [packed]
        self._graph.registerOutput(made[0])
        run: Callable[..., Any] = torch._C._create_function_from_graph("program", self._graph)
        return run

    def _input(self, kind: Any) -> Any:
        made = self._graph.addInput()
        made.setType(kind)
        return made

    def _node(self, name: str, given: Sequence[Any], results: int) -> Any:
        node = self._graph.create(name, list(given), results)
        self._graph.insertNode(node)
        return node

    def _name(self, values: Iterable[Value], outputs: Iterable[Any]) -> None:
        for value, output in zip(values, outputs, strict=True):
            # What writes to its argument returns that: the first name is as good.
            self._values.setdefault(value, output)

    def _written(self, value: Any, kind: Any) -> Any:
        """An argument of the type ``kind``; ``None`` if the interpreter has none such."""
        if isinstance(value, Value):
            return self._values[value]
        if kind.kind() == "OptionalType" and value is not None:
            return self._written(value, kind.getElementType())
        if kind.kind() == "ListType":
            items = value if isinstance(value, tuple | list) else (value,)
            return self._list(items, kind)
        if kind.kind() == "FloatType" and isinstance(value, int):
            value = float(value)
        if isinstance(value, torch.memory_format):
            value = _FORMATS[value]
        return self._literal(value)

    def _list(self, items: Sequence[Any], kind: Any) -> Any:
        written = [self._written(item, kind.getElementType()) for item in items]
        if any(item is None for item in written):
            return None
        made = self._node("prim::ListConstruct", written, 1).output()
        made.setType(kind)
        return made

    def _literal(self, value: Any) -> Any:
        if not isinstance(value, _LITERALS):
            return None
        key = (type(value), repr(value))
        if key not in self._literals:
            self._literals[key] = self._graph.insertConstant(value)
        return self._literals[key]


def _tensor() -> Any:
    return torch._C.TensorType.get()


@functools.cache
def is_there() -> bool:
    """Whether this torch has the interpreter, and what writes graphs for it."""
    needed = ("Graph", "_create_function_from_graph", "_set_graph_executor_optimize")
    return all(hasattr(torch._C, name) for name in needed)
