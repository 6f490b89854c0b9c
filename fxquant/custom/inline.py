"""Writing a traced replacement into the graph of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.fx import GraphModule, Node

from fxquant.errors import PatternError
from fxquant.graph.edit import Editor
from fxquant.graph.held import held_tensor
from fxquant.graph.info import info
from fxquant.graph.op_table import module_of
from fxquant.patterns.match import Match


class Inline:
    """Writes a traced replacement into the graph of the model."""

    def __init__(
        self,
        match: Match,
        made: GraphModule,
        outputs: tuple[Node, ...],
        inputs: tuple[str, ...],
        editor: Editor,
    ) -> None:
        self._match, self._made, self._outputs, self._editor = match, made, outputs, editor
        bound = [match.bound.get(name) for name in inputs]
        self._named = dict(zip(inputs, bound, strict=True))
        self._order = [node for node in bound if isinstance(node, Node)]
        nodes = [node for node in match.nodes if node.op == "call_module"]
        self._own = {id(module_of(node)): node for node in nodes}
        self._new: dict[Node, Any] = {}

    def write(self) -> None:
        """Copy the nodes, let readers of the outputs read them, and take the match out."""
        before = self._place()
        placeholders = 0
        for node in self._made.graph.nodes:
            if node.op == "placeholder":
                named = self._named.get(str(node.target))
                self._new[node] = named if named is not None else self._order[placeholders]
                placeholders += 1
            elif node.op == "output":
                self._finish(node)
            else:
                self._new[node] = self._copy(node, before)

    def _place(self) -> Node:
        last = max(self._order) if self._order else min(self._match.nodes).prev
        while last.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        return last.next

    def _copy(self, node: Node, before: Node) -> Node:
        args = fx.map_arg(node.args, lambda n: self._new[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: self._new[n])
        editor, like = self._editor, self._match.root
        if node.op == "call_module":
            module = module_of(node)
            own = self._own.get(id(module))
            like = own if own is not None else like
            base = info(like).path or like.name
            path = str(own.target) if own is not None else editor.add_module(base, module)
            made = editor.call_module(path, args, like=like, before=before)
        elif node.op == "get_attr":
            held = held_tensor(node)
            if held is None:
                raise PatternError(f"the replacement reads {node.target}, which is no tensor")
            path = editor.add_buffer(f"{like.name}_{str(node.target).replace('.', '_')}", held)
            made = editor.get_attr(path, like=like, before=before)
        else:
            method = node.op == "call_method"
            target: Any = getattr(Tensor, str(node.target)) if method else node.target
            made = editor.call(target, args, dict(kwargs), like=like, before=before)
        record = info(node)
        editor.note_values(
            made, value=record.value, held=record.held, opaque=record.opaque, rank=record.rank,
            pinned=record.pinned,
        )  # fmt: skip
        return made

    def _finish(self, output: Node) -> None:
        found = [self._new[n] for n in _nodes(output.args[0])]
        if len(found) != len(self._outputs):
            raise PatternError(
                f"the replacement returns {len(found)} tensors, the pattern {len(self._outputs)}"
            )
        for old, new in zip(self._outputs, found, strict=True):
            self._editor.reuse(old, new)
        rest = sorted(self._match.nodes, reverse=True)
        first = self._outputs[0]
        self._editor.replace(first, found[0], *(node for node in rest if node is not first))
        for node in rest:
            if not node._erased and not node.users:
                self._editor.erase(node)


def _nodes(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [each for part in parts for each in _nodes(part)]
