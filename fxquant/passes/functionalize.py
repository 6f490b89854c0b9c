"""Functionalize: after an in-place op, later readers of the tensor read the op's result.

    y = relu_(x); return x + y      ->      y = relu(x); return y + y
    x[:, 0] = 1; return x           ->      y = set_item(x, (:, 0), 1); return y
    x[:, 0].mul_(2); return x       ->      y = set_item(x, (:, 0), mul(x[:, 0], 2)); return y

Where another view of the memory is read later, no rewrite of names is right: the op keeps writing
in place, and the memory is pinned so that nothing else moves it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from fxquant.graph.containers import pick
from fxquant.graph.edit import Editor
from fxquant.graph.functions import set_item
from fxquant.graph.info import info
from fxquant.graph.op_table import (
    attribute_spellings,
    function_spelling,
    function_spellings,
    method_spelling,
    method_spellings,
    module_of,
    module_op,
)
from fxquant.graph.operands import settle
from fxquant.graph.ops import Call, read_call
from fxquant.graph.table_aten import may_alias, writes_first
from fxquant.graph.verify import Stage
from fxquant.graph.view import positions
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class Functionalize(Pass):
    """Rewire the readers of overwritten tensors."""

    name: ClassVar[str] = "functionalize"
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, editor: Editor) -> None:
        """Walk the graph in order, following memory through views."""
        nodes = list(editor.graph.nodes)
        writers = [node for node in nodes if overwrites(node)]
        if not writers:
            return
        order: dict[Node, float] = dict(positions(editor.graph))
        memory = _Memory(nodes)
        for node in writers:
            target = node.args[0] if node.args else None
            if not isinstance(target, Node):
                continue
            if not _write_part(editor, node, target, order, memory):
                self._settle(editor, node, target, order, memory)

    @staticmethod
    def _settle(
        editor: Editor, node: Node, target: Node, order: dict[Node, float], memory: _Memory
    ) -> None:
        later = [user for user in target.users if order[user] > order[node]]
        aliases = [n for n in memory.sharing(target) if n is not target]
        earlier = [n for n in aliases if order[n] < order[node]]
        viewed = any(order[user] > order[node] for n in earlier for user in n.users)
        # What is written into a tensor of the model must be there in the next call.
        held = any(n.op == "get_attr" for n in (target, *aliases))
        if node.target is operator.setitem:
            # What is written into an input must be there for the caller.
            held = held or any(_is_given(n) for n in (target, *aliases))
            if not (viewed or held):
                with editor.rule("functionalize"):
                    editor.set_call(node, set_item, tuple(node.args), {})
                    editor.note_values(node, held="tensor")
        if viewed or held:
            why = f"%{node.name} writes into its memory in place"
            with editor.rule("pin-memory"):
                for alias in (target, *aliases):
                    editor.annotate(alias, pinned=why)
            return
        with editor.rule("functionalize"):
            for user in later:
                editor.replace_use(user, target, node)
        memory.separate(node, [n for n in aliases if order[n] > order[node]])


class _Memory:
    """Which values may share memory."""

    def __init__(self, nodes: list[Node]) -> None:
        self._root: dict[Node, Node] = {}
        self._group: dict[Node, list[Node]] = {}
        for node in nodes:
            source = node.args[0] if node.args else None
            shares = isinstance(source, Node) and (_is_view(node) or overwrites(node))
            root = self._root[source] if shares and isinstance(source, Node) else node
            self._root[node] = root
            self._group.setdefault(root, []).append(node)

    def sharing(self, node: Node) -> list[Node]:
        """All values that may share the memory of ``node``, itself among them."""
        return self._group[self._root[node]]

    def separate(self, node: Node, views: list[Node], of: Node | None = None) -> None:
        """From now on ``node`` has memory of its own, and ``views`` share that.

        Args:
            node: what had the memory of others, or is new.
            views: those that read it.
            of: for what is new, a value whose memory the views had.
        """
        apart = dict.fromkeys((node, *views))
        old = self._root[node if of is None else of]
        self._group[old] = [n for n in self._group[old] if n not in apart]
        self._group[node] = list(apart)
        self._root.update(dict.fromkeys(apart, node))


def _write_part(
    editor: Editor, node: Node, part: Node, order: dict[Node, float], memory: _Memory
) -> bool:
    """Write ``part``, which is ``whole[index]``, into a copy of ``whole``, if that is right."""
    whole, index = (*part.args, None, None)[:2]
    if part.target is not operator.getitem or not isinstance(whole, Node):
        return False
    aliases = memory.sharing(part)
    held = any(n.op == "get_attr" or _is_given(n) for n in aliases)
    others = [n for n in aliases if order[n] < order[node] and n not in (whole, part)]
    viewed = any(order[user] > order[node] for n in others for user in n.users)
    if held or viewed or info(whole).held != "tensor" or not _is_readable(node):
        return False
    later = sorted((u for u in whole.users if order[u] > order[node]), key=order.__getitem__)
    # ``x[i] *= 2`` reads the part, multiplies it, and sets it: Python itself writes it back.
    back = [u for u in later[:1] if u.target is operator.setitem and u.args[1:] == (index, node)]
    if not back and not _is_basic(index):
        return False  # such an index copies, and nothing is written to the whole
    after = [n for n in aliases if order[n] > order[node] and n not in back]
    parts = [node, part, *(n for n in after if _over(n, node) or _over(n, part))]
    read = any(order[user] > order[node] and user not in back for n in parts for user in n.users)
    if read and any(overwrites(n) for n in after):
        return False  # a later write to one of them is a write to the other
    with editor.rule("functionalize"):
        for user in [user for user in part.users if order[user] > order[node]]:
            editor.replace_use(user, part, node)
        memory.separate(node, [n for n in aliases if order[n] > order[node] and _over(n, node)])
        if not back:
            made = editor.call(set_item, (whole, index, node), like=node, after=node)
            editor.note_values(made, held="tensor")
            order[made] = order[node] + 0.5
            for user in later:
                editor.replace_use(user, whole, made)
            views = [n for n in memory.sharing(whole) if order[n] > order[node]]
            memory.separate(made, views, of=whole)
    return True


def _over(view: Node, node: Node) -> bool:
    """Whether ``view`` is a view of ``node``, or of a view of it."""
    while view is not node and view.args and isinstance(view.args[0], Node):
        view = view.args[0]
    return view is node


def _is_readable(node: Node) -> bool:
    """Whether the op table has a form of the call that writes nothing."""
    if node.op == "call_module":
        module = module_of(node)
        op, hooks = module_op(module), module._forward_hooks or module._forward_pre_hooks
        return op is not None and op.target is not None and not hooks
    if node.op == "call_function":
        found = function_spellings(node.target)
    else:
        found = method_spellings(str(node.target))
    call = read_call(found, tuple(node.args), node.kwargs) if found else None
    return isinstance(call, Call) and isinstance(settle(call), Call)


def _is_basic(index: Any) -> bool:
    """Whether ``x[index]`` is a view: numbers, slices, ``None`` and ``...``."""
    if isinstance(index, tuple):
        return all(map(_is_basic, index))
    if isinstance(index, Node):
        return info(index).held == "scalar"
    return index is None or index is ... or type(index) in (int, slice)


def _is_given(node: Node) -> bool:
    """Whether it is an input, or part of one."""
    return node.op == "placeholder" or node.target is pick


def _is_view(node: Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        found = next(iter(attribute_spellings(str(node.args[1]))), None)
    elif node.op == "call_function":
        found = function_spelling(node.target)
    elif node.op == "call_method":
        found = method_spelling(str(node.target))
    elif node.op == "call_module":
        op = module_op(module_of(node))
        return op is None or op.alias or op.name == "dropout"
    else:
        return False
    if found is None:
        # An unknown method may return a view; an unknown function makes something new.
        return node.op == "call_method" or may_alias(node.target)
    return found[0].alias or found[0].name == "dropout"


def overwrites(node: Node) -> bool:
    """Whether a captured call writes into its first argument."""
    if node.op == "call_function":
        if node.target is operator.setitem:
            return True
        found = function_spelling(node.target)
        if found is None and writes_first(node.target):
            return True
        return (found is not None and found[1].inplace) or _asked(node, found)
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        return bool(getattr(module_of(node), "inplace", False))
    return False


def _asked(node: Node, found: Any) -> bool:
    """``F.relu(x, True)`` and ``F.relu(x, inplace=True)``."""
    if found is None:
        return node.kwargs.get("inplace") is True
    names = list(found[1].signature.parameters)
    if "inplace" not in names:
        return False
    place = names.index("inplace")
    value = node.args[place] if place < len(node.args) else node.kwargs.get("inplace", False)
    return value is True
