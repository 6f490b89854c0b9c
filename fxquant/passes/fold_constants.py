"""Fold constants: what is computed from the model's own tensors alone is computed once.

    linear(x, self.weight * self.mask)   ->   linear(x, folded)

Only results no larger than the tensors they are made from: an expanded table stays a view.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from fxquant.graph.edit import Editor
from fxquant.graph.held import held_tensor
from fxquant.graph.info import info
from fxquant.graph.op_table import function_spelling, module_of
from fxquant.graph.rehearsal import rehearse
from fxquant.graph.verify import Stage
from fxquant.graph.view import flat_nodes
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace computed constants by their values."""

    name: ClassVar[str] = "fold-constants"
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, editor: Editor) -> None:
        """Evaluate in graph order; then keep the results that something else reads."""
        values: dict[Node, Any] = {}
        for node in editor.graph.nodes:
            if node.op == "get_attr":
                held = held_tensor(node)
                if held is not None and not held.is_meta and not info(node).pinned:
                    values[node] = held
            elif _foldable(node, values) and rehearse(node, values):
                values[node] = _evaluate(node, values)
        for node, value in list(values.items()):
            outside = [user for user in node.users if user not in values]
            if node.op != "get_attr" and outside and _worth(node, value, values):
                # What is made from it reads the folded value from now on.
                values[self._put(editor, node, value)] = value

    @staticmethod
    def _put(editor: Editor, node: Node, value: Tensor) -> Node:
        with editor.rule("fold-constant"):
            # A view of a part would keep the whole in memory and in files.
            whole = value.untyped_storage().nbytes() <= value.numel() * value.element_size()
            held = nn.Parameter(
                value.detach() if whole else value.detach().clone(), requires_grad=False
            )
            path = editor.add_buffer(f"{info(node).path or node.name}_folded", held)
            made = editor.get_attr(path, like=node, before=node)
            sources = list(flat_nodes((node.args, dict(node.kwargs))))
            editor.replace(node, made)
            _erase_unread(editor, sources)
        return made


def _erase_unread(editor: Editor, nodes: list[Node]) -> None:
    """Take out what was computed for the folded value alone."""
    todo = list(dict.fromkeys(nodes))
    while todo:
        node = todo.pop()
        if node.users or node.op == "placeholder" or node.graph is not editor.graph:
            continue
        more = dict.fromkeys(flat_nodes((node.args, dict(node.kwargs))))
        editor.erase(node)
        todo.extend(source for source in more if source not in todo)


_PURE_MODULES: Final = ("torch", "_operator", "math", "builtins", "fxquant.graph")
"""Where functions come from whose calls may be made ahead of time."""


def _foldable(node: Node, values: Mapping[Node, Any]) -> bool:
    """Whether the call depends on constants alone, and on nothing that may change."""
    sources = list(flat_nodes((node.args, dict(node.kwargs))))
    if info(node).pinned or not all(source in values for source in sources):
        return False
    if node.op == "call_method":
        name = str(node.target)
        return not name.endswith("_") or name.endswith("__")
    if node.op == "call_module":
        module = module_of(node)
        standard = type(module).__module__.startswith("torch.nn.modules.")
        hooked = module._forward_hooks or module._forward_pre_hooks
        return bool(sources) and standard and not hooked and not module.training
    if node.op != "call_function":
        return False
    if node.target is builtins.getattr:
        return bool(sources)
    found = function_spelling(node.target)
    if found is not None and (found[1].inplace or node.kwargs.get("inplace")):
        return False
    home = str(getattr(node.target, "__module__", None) or "torch")
    return any(home == name or home.startswith(f"{name}.") for name in _PURE_MODULES)


def _evaluate(node: Node, values: Mapping[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        called = module_of(node) if node.op == "call_module" else node.target
        return called(*args, **kwargs)  # type: ignore[operator]  # a function or a module


def _worth(node: Node, value: Any, values: Mapping[Node, Any]) -> bool:
    """A tensor that is no larger than what it is made from, directly or not."""
    if not isinstance(value, Tensor):
        return False
    given: int = sum(values[leaf].numel() for leaf in _leaves(node, values))
    return value.numel() <= given


def _leaves(node: Node, values: Mapping[Node, Any]) -> Iterator[Node]:
    """The tensors that a value is made from: the model's own, and those made of nothing."""
    todo, seen = [node], {node: None}
    while todo:
        each = todo.pop()
        sources = dict.fromkeys(flat_nodes((each.args, dict(each.kwargs))))
        if not sources and isinstance(values[each], Tensor):
            yield each
        fresh = [source for source in sources if source not in seen]
        seen.update(dict.fromkeys(fresh))
        todo.extend(fresh)
