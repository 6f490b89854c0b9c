"""A user's module that is trained in place of a few nodes, and those nodes, to be put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node
from torch.fx.node import map_aggregate

from fxquant.graph.edit import Editor
from fxquant.graph.info import NodeInfo, info, write_info
from fxquant.graph.op_table import is_op, module_of


@dataclass(frozen=True)
class _Ref:
    """Stands for a node that is not in the graph."""

    name: str


def _ref(value: Any) -> Any:
    return _Ref(value.name) if isinstance(value, Node) else value


@dataclass(frozen=True)
class _Kept:
    """One node that was taken out, as plain data."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    record: NodeInfo


class CalledOp(nn.Module):
    """An op without weights, as a module.

    Args:
        function: what it calls.
        options: its constant arguments.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *args: Any) -> Any:
        """The op on any tensors."""
        return self.function(*args, **self.options)


class TrainedUnit(nn.Module):
    """Runs the module that a user's pattern is trained as; keeps what stood in its place.

    Args:
        module: the user's.
        nodes: what it stands for, in graph order.
        sources: what it reads, in the order of its arguments.
        outputs: those of ``nodes`` that others read, in the order of its results.
        added: modules beside the user's that the nodes call, by path: they belong to this one.

    Raises:
        TypeError: the nodes stand in no module.
    """

    def __init__(
        self,
        module: nn.Module,
        nodes: Sequence[Node],
        sources: Sequence[Node],
        outputs: Sequence[Node],
        added: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.module = module
        self.added = nn.ModuleList(added.values())
        self._added = tuple(added)
        self._sources = tuple(node.name for node in sources)
        self._outputs = tuple(node.name for node in outputs)
        self._kept = tuple(
            _Kept(
                node.name,
                node.op,
                node.target,
                *map_aggregate((node.args, dict(node.kwargs)), _ref),
                info(node),
            )
            for node in nodes
        )
        # Not as submodules: most stand in the user's model, and have their names there.
        self._held = {
            str(node.target): module_of(node)
            for node in nodes
            if node.op == "call_module" and str(node.target) not in added
        }
        self._norms = tuple(str(node.target) for node in nodes if is_op(node, "batch_norm"))

    def forward(self, *args: Any) -> Any:
        """As the user's module."""
        return self.module(*args)

    def norms(self, model: nn.Module) -> Iterator[str]:
        """The paths of its batch norms in the model that it stands in."""
        names = {id(module): path for path, module in model.named_modules()}
        for path in self._norms:
            yield names.get(id(self._held[path]), path)

    def put_back(self, editor: Editor, node: Node) -> None:
        """Put the nodes back in the place of the call of this unit.

        Args:
            editor: the graph.
            node: the call.
        """
        moved = self._modules_of(editor, str(node.target))
        known: dict[str, Any] = dict(zip(self._sources, node.args, strict=True))
        with editor.rule("put-back"):
            for kept in self._kept:
                known[kept.name] = _copy(editor, kept, known, moved, node)
            made = [known[name] for name in self._outputs]
            if len(made) == 1:
                editor.replace(node, made[0])
                return
            for user in list(node.users):
                editor.replace(user, made[user.args[1]])  # type: ignore[index]  # the place it picks
            if not node.users:
                editor.erase(node)

    def _modules_of(self, editor: Editor, own: str) -> dict[str, str]:
        """Where the modules stand that the nodes call, by where they stood."""
        moved = {path: f"{own}.added.{place}" for place, path in enumerate(self._added)}
        there = dict(editor.module.named_modules())
        names = {id(module): path for path, module in there.items()}
        for path, module in self._held.items():
            if there.get(path) is not module:
                found = names.get(id(module))
                moved[path] = editor.add_module(path, module) if found is None else found
        return moved


def _copy(
    editor: Editor, kept: _Kept, known: dict[str, Any], moved: dict[str, str], before: Node
) -> Node:
    args, kwargs = map_aggregate(
        (kept.args, kept.kwargs), lambda a: known[a.name] if isinstance(a, _Ref) else a
    )
    target = kept.target
    if kept.op == "call_module":
        target = moved.get(target, target)
        made = editor.call_module(target, args, like=before, before=before)
        editor.set_call(made, target, args, dict(kwargs))
    elif kept.op == "get_attr":
        owner, _, name = str(target).rpartition(".")
        made = editor.get_attr(f"{moved.get(owner, owner)}.{name}", like=before, before=before)
    else:
        made = editor.call(target, args, dict(kwargs), like=before, before=before)
    write_info(made, **vars(kept.record))
    return made


def given_to(node: Node) -> list[Node]:
    """What makes the weight that a layer is given with the call, in graph order.

    Args:
        node: a call of a layer.
    """
    found: dict[Node, None] = {}
    todo = [node.kwargs["weight"]] if isinstance(node.kwargs.get("weight"), Node) else []
    while todo:
        source = todo.pop()
        if isinstance(source, Node) and source not in found:
            found[source] = None
            todo.extend(source.all_input_nodes)
    return sorted(found)
