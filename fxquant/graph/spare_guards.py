"""Guards that nothing depends on: both answers lead through the model the same way.

    if batch != ids.shape[0]:               a guard: ne(a, b) was True
        ids = ids.expand(batch, -1)         expand(ids, a, -1)

A second trace, of an example that gets the other answer, shows what the other way computes. Where
both graphs are the same, op by op, given what that answer says (here that ``a`` is ``b``, so that
``expand`` changes nothing), one of them is right in both cases, and its guard goes. All else stays
guarded: a graph is never run for a case in which it was not shown to be right.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxquant.graph.edit import Editor
from fxquant.graph.guards import GUARDS, check_answer, check_cases, check_input
from fxquant.graph.info import info
from fxquant.graph.op_table import function_spellings, method_spellings
from fxquant.graph.operands import settle
from fxquant.graph.ops import Call, read_call

_NUMBERS: Final = ("scalar", "sizes")
_MANY: Final = 64
"""More answers than this that differ are no single question asked in several places."""
_COMPARED: Final = 1 << 16
"""The size in bytes up to which constants are compared by what they hold."""
_RESHAPES: Final = (
    "resize_", "resize_as_", "unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_",
    "swapdims_", "as_strided_", "set_",
)  # fmt: skip
"""Methods that change the sizes of the tensor they are called on."""
_HASHABLE: Final = (
    bool, int, float, complex, str, bytes, type(None), type(...),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


@dataclass(frozen=True)
class Traced:
    """One trace of a model.

    Args:
        module: its graph; the nodes are as they were recorded.
        root: the copy of the model that was traced.
        rank_of: the number of dimensions of a node's value, where no call can change it.
    """

    module: fx.GraphModule
    root: nn.Module
    rank_of: Callable[[Node], int | None]


def asks_batch(graph: fx.Graph) -> bool:
    """Whether a branch was decided by how many samples there are.

    Args:
        graph: as it was captured.
    """
    conditions = [node.args[0] for node in graph.nodes if node.target is check_answer
                  and type(node.args[1]) is bool]  # fmt: skip
    seen: set[Node] = set()
    todo = [node for node in conditions if isinstance(node, Node)]
    while todo:
        node = todo.pop()
        if node in seen or info(node).held not in _NUMBERS:
            continue
        seen.add(node)
        if _reads_size(node):
            users = [use for use in node.users if use.target is operator.getitem]
            places = [use.args[1] for use in users if use in seen] or [0]
            if len(node.args) > 1 and node.target == "size":
                places = [node.args[1]]
            if 0 in places:
                return True
            continue
        todo += node.all_input_nodes
    return False


def _reads_size(node: Node) -> bool:
    return node.target == "size" or (node.target is getattr and node.args[1] == "shape")


def _is_number(node: Node) -> bool:
    """Whether it is computed from sizes and numbers alone, and so is the same whenever asked."""
    if info(node).held not in _NUMBERS or not node.op.startswith("call"):
        return False
    return _reads_size(node) or all(info(n).held in _NUMBERS for n in node.all_input_nodes)


def other_batches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The example with other numbers of samples: one, where it has several; one more.

    Args:
        args: positional example inputs.
        kwargs: keyword example inputs.
    """
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    batch = next((leaf.shape[0] for leaf in leaves if leaf.dim()), 0)
    for rows in ([0], [*range(batch), 0]):
        if not 0 < batch != len(rows):
            continue

        def taken(tensor: Tensor, rows: list[int] = rows) -> Tensor:
            batched = tensor.dim() > 0 and tensor.shape[0] == batch
            return tensor.detach()[rows] if batched else tensor

        yield pytree.tree_map_only(Tensor, taken, (args, kwargs))


def merged(first: Traced, other: Traced) -> Traced | None:
    """The one of two traces whose graph is right in both cases, with its guards fitted to that.

    Args:
        first: a trace.
        other: a trace in which questions about sizes were answered otherwise.

    Returns:
        ``first`` or ``other``; ``None`` where neither was shown to be right in both cases.
    """
    for keep, rest in ((first, other), (other, first)):
        flips = _flips(keep, rest)
        if flips:
            _fit(keep, rest, flips)
            return keep
    return None


def _flips(keep: Traced, rest: Traced) -> list[int]:
    """Which guards differ, by their place, if ``keep`` computes what ``rest`` does in its case."""
    flips: list[int] = []
    while len(flips) < _MANY:
        table: dict[Any, int] = {}
        mine, theirs = (_Reader(each, table, rest, flips).read() for each in (keep, rest))
        differs = [i for i, (a, b) in enumerate(zip(mine.guards, theirs.guards, strict=False))
                   if a != b and i not in flips]  # fmt: skip
        if not differs:
            same = (mine.effects, mine.result) == (theirs.effects, theirs.result)
            return flips if same and len(mine.guards) == len(theirs.guards) else []
        (key, answer), (their_key, theirs_answer) = (r.guards[differs[0]] for r in (mine, theirs))
        if key != their_key or type(answer) is not bool or type(theirs_answer) is not bool:
            return []
        flips.append(differs[0])
    return []


def _fit(keep: Traced, rest: Traced, flips: list[int]) -> None:
    """Drop a guard that differs; of several, both ways of answering all of them are right."""
    mine, theirs = ([_guards(each)[place] for place in sorted(flips)] for each in (keep, rest))
    *others, last = mine
    editor = Editor(keep.module)
    with editor.rule("spare-guard"):
        if others:
            conditions = tuple(node.args[0] for node in mine)
            cases = tuple(tuple(node.args[1] for node in each) for each in (mine, theirs))
            editor.set_call(last, check_cases, (conditions, cases, mine[0].args[2]), {})
        else:
            editor.erase(last)
        for node in others:
            editor.erase(node)
    keep.module.recompile()


def _guards(traced: Traced) -> list[Node]:
    return [node for node in traced.module.graph.nodes if node.target is check_answer]


@dataclass(frozen=True)
class _Reading:
    """What a graph does: equal for two graphs that do the same.

    Args:
        guards: condition and answer of each guard, in order.
        effects: each op on tensors, in order, so that writes in place stay where they are.
        result: what it returns.
    """

    guards: list[tuple[int, Any]]
    effects: list[Any]
    result: Any


class _Reader:
    """Reads a graph, given the answers that another trace got to some of its guards.

    Numbers are known by how they are computed, and equal numbers have one name.

    Args:
        traced: the graph.
        table: names; shared by the two graphs that are compared.
        case: the trace whose answers hold.
        known: the places of the guards whose answers are relied on.
    """

    def __init__(self, traced: Traced, table: dict[Any, int], case: Traced, known: list[int]):
        self._traced, self._table = traced, table
        self._answers = {place: _guards(case)[place].args[1] for place in known}
        self._names: dict[Node, int] = {}
        self._same: dict[int, int] = {}
        self._opposite: dict[int, int] = {}
        self._sides: dict[int, tuple[int, int]] = {}
        self._guards: list[tuple[int, Any]] = []
        self._effects: list[Any] = []
        self._reshaped = 0

    def read(self) -> _Reading:
        """Node by node, in order."""
        result: Any = None
        for node in self._traced.module.graph.nodes:
            if node.op == "output":
                result = self._value(node.args)
            elif node.target is check_answer:
                self._guard(node)
            elif _is_number(node):
                self._names[node] = self._number(node)
            else:
                self._tensor(node)
        return _Reading(self._guards, self._effects, result)

    def _tensor(self, node: Node) -> None:
        source = self._unchanged(node)
        # From here on, asking the same tensor for its sizes is another question.
        self._reshaped += str(node.target) in _RESHAPES
        if source is None:
            self._effects.append(self._effect(node))
            self._names[node] = self._name(("made", len(self._effects)))
        else:
            self._names[node] = self._names[source]

    def _name(self, key: Any) -> int:
        """One name for equal keys, and for what is known to be equal."""
        name = self._table.setdefault(key, len(self._table))
        while name in self._same:
            name = self._same[name]
        return name

    def _value(self, value: Any) -> Any:
        """An argument, nodes replaced by their names."""
        if isinstance(value, Node):
            name = self._names[value]
            while name in self._same:
                name = self._same[name]
            return ("%", name)
        if type(value) in (bool, int, float):
            return ("%", self._name((type(value), repr(value))))
        if isinstance(value, tuple | list):
            return ("items", tuple(self._value(item) for item in value))
        if isinstance(value, dict):
            return ("dict", tuple((key, self._value(item)) for key, item in value.items()))
        if isinstance(value, slice):
            return ("slice", self._value((value.start, value.stop, value.step)))
        if isinstance(value, _HASHABLE):
            return (type(value), repr(value))
        return ("object", id(value))

    def _number(self, node: Node) -> int:
        """Every way to ask for a size is one; what is computed from numbers is known by that."""
        first = node.args[0] if node.args else None
        if _reads_size(node) and not node.kwargs:
            whole = self._sizes(first)
            one = node.op == "call_method" and len(node.args) > 1
            return self._part(whole, node.args[1]) if one else whole
        if node.op == "call_function":
            if node.target is operator.getitem and isinstance(first, Node):
                return self._part(self._value(first)[1], node.args[1])
            if node.target in (operator.eq, operator.ne):
                return self._comparison(node)
        target = node.target if callable(node.target) else (node.op, node.target)
        return self._name((target, self._value(node.args), self._value(node.kwargs)))

    def _sizes(self, tensor: Any) -> int:
        return self._name(("size", self._value(tensor), self._reshaped))

    def _part(self, whole: int, place: Any) -> int:
        return self._name(("at", whole, self._value(place)))

    def _comparison(self, node: Node) -> int:
        sides = [self._value(side) for side in node.args]
        equal = self._name(("eq", *sorted(sides, key=repr)))
        if all(side[0] == "%" for side in sides):
            self._sides[equal] = (sides[0][1], sides[1][1])
        if node.target is operator.eq:
            return equal
        made = self._name(("ne", equal))
        self._opposite[made] = equal
        return made

    def _guard(self, node: Node) -> None:
        """Note it; from here on its answer is known."""
        name: int = self._value(node.args[0])[1]
        answer = self._answers.get(len(self._guards), node.args[1])
        self._guards.append((name, node.args[1]))
        if type(answer) is not bool:
            return
        equal = self._opposite.get(name)
        self._know(name, answer)
        if equal is not None:
            self._know(equal, not answer)
        if answer is (equal is None):
            first, second = self._sides.get(name if equal is None else equal, (0, 0))
            if first != second:
                self._same[max(first, second)] = min(first, second)

    def _know(self, name: int, answer: bool) -> None:
        told = self._name((bool, repr(answer)))
        if name != told:
            self._same[name] = told

    def _unchanged(self, node: Node) -> Node | None:
        """What ``x.expand(x.size(0), -1)`` is: ``x``, if it has two dimensions in every call."""
        call = self._call(node)
        if call is None or call.op.name != "expand":
            return None
        source, sizes = call.arguments["input"], call.arguments["size"]
        if not isinstance(source, Node) or not isinstance(sizes, tuple | list):
            return None
        whole = self._sizes(source)
        kept = all(
            size == -1 or self._value(size) == ("%", self._part(whole, place))
            for place, size in enumerate(sizes)
        )
        return source if kept and self._traced.rank_of(source) == len(sizes) else None

    def _call(self, node: Node) -> Call | None:
        if node.op == "call_function":
            found = function_spellings(node.target)
        elif node.op == "call_method":
            found = method_spellings(str(node.target))
        else:
            return None
        call = read_call(found, tuple(node.args), node.kwargs) if found else None
        call = settle(call) if isinstance(call, Call) else None
        return call if isinstance(call, Call) else None

    def _effect(self, node: Node) -> Any:
        if node.op == "get_attr":
            return ("read", self._held(str(node.target)))
        call = self._call(node)
        if call is not None:
            return (call.op.name, call.inplace, self._value(dict(call.arguments)))
        args = node.args
        if node.target in GUARDS and node.target is check_input:
            args = args[:-1]  # the line that asked
        return (node.op, node.target, self._value(args), self._value(node.kwargs))

    def _held(self, path: str) -> Any:
        """A tensor that was made while tracing is known by what it holds, others by their place."""
        if not path.startswith("_tensor_constant"):
            return path
        found = getattr(self._traced.root, path, None)
        if not isinstance(found, Tensor) or found.nbytes > _COMPARED:
            return ("object", id(found))
        data = found.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (str(found.dtype), tuple(found.shape), hashlib.sha256(data).digest())
