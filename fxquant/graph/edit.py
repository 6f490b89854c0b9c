"""The only code that changes a graph: every edit goes through an :class:`Editor` and is logged."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.info import NodeInfo, info, write_info
from fxquant.graph.op_table import op_of
from fxquant.graph.ops import Kind, Op
from fxquant.graph.places import UsedPlaces


@dataclass(frozen=True)
class Edit:
    """One change of a graph.

    Args:
        rule: name of the rule or pass step that made it.
        removed: names of the nodes it took out.
        added: names of the nodes it put in.
        changed: names of the nodes whose arguments or record it changed.
        origins: names of the captured nodes concerned.
        path: module path of the place.
        line: where the rule stands in fxquant or in the user's code, ``file.py:12``.
        note: a sentence, where there is more to say.
    """

    rule: str
    removed: tuple[str, ...]
    added: tuple[str, ...]
    changed: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    path: str = ""
    line: str = ""
    note: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Edit:
        # Immutable all the way down; a copied model shares the edits of its history.
        return self


@dataclass
class _Draft:
    rule: str
    line: str
    note: str
    removed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    changed: dict[str, None] = field(default_factory=dict)
    origins: dict[str, None] = field(default_factory=dict)
    path: str = ""

    def touch(self, record: NodeInfo) -> None:
        self.origins.update(dict.fromkeys(record.origins))
        self.path = self.path or record.path

    def finish(self) -> Edit:
        added = set(self.added)
        return Edit(
            self.rule,
            tuple(self.removed),
            tuple(self.added),
            tuple(name for name in self.changed if name not in added),
            tuple(self.origins),
            self.path,
            self.line,
            self.note,
        )


_UNSET: Final = object()


def _caller_line() -> str:
    # Two frames up from contextmanager machinery stands the rule that opened the edit.
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, "contextlib"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"


class Editor:
    """Writes one graph, and logs what it writes.

    Args:
        module: the graph module to change.

    Example:
        >>> import torch, torch.fx
        >>> gm = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.ReLU()))
        >>> editor = Editor(gm)
        >>> relu = next(n for n in gm.graph.nodes if n.op == "call_module")
        >>> with editor.rule("drop"):
        ...     editor.replace(relu, relu.args[0])
        >>> editor.log[0].removed
        ('_0',)
    """

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self.log: list[Edit] = []
        self.misses: list[tuple[str, str, str]] = []
        self.fits: list[int] = []
        self._draft: _Draft | None = None
        self._fresh: dict[str, int] = {}

    @contextlib.contextmanager
    def rule(self, name: str, *, line: str = "", note: str = "") -> Iterator[None]:
        """Group the edits made inside into one log record; an empty group is not logged."""
        outer, self._draft = self._draft, _Draft(name, line or _caller_line(), note)
        try:
            yield
            draft = self._draft
            if draft.removed or draft.added or draft.changed:
                self.log.append(draft.finish())
        finally:
            self._draft = outer

    def miss(self, rule: str, place: str, reason: str, matched: int = 2) -> None:
        """Remember that ``rule`` nearly fitted at the node called ``place``.

        Args:
            rule: its name.
            place: the name of a node.
            reason: what stood in the way.
            matched: how far it got, in ops; the first one alone is hardly a near miss.
        """
        self.misses.append((rule, place, reason))
        self.fits.append(matched)

    @property
    def _open(self) -> _Draft:
        if self._draft is None:
            raise RuntimeError("a graph may only be changed inside `with editor.rule(name):`")
        return self._draft

    def call(
        self,
        target: Op | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        like: Node,
        before: Node | None = None,
        after: Node | None = None,
        name: str | None = None,
    ) -> Node:
        """Add a ``call_function``; it takes path, source and provenance from ``like``."""
        function = target.target if isinstance(target, Op) else target
        if function is None:
            raise ValueError(f"{target} is called as a module: use call_module")
        return self._add("call_function", function, args, kwargs, like, before, after, name)

    def call_module(
        self,
        path: str,
        args: tuple[Any, ...],
        *,
        like: Node,
        before: Node | None = None,
        after: Node | None = None,
        name: str | None = None,
    ) -> Node:
        """Add a ``call_module`` of the module that already stands at ``path``."""
        return self._add("call_module", path, args, None, like, before, after, name)

    def get_attr(self, path: str, *, like: Node, before: Node, name: str | None = None) -> Node:
        """Add a ``get_attr`` of the tensor that already stands at ``path``."""
        return self._add("get_attr", path, (), None, like, before, None, name)

    def _add(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
        like: Node,
        before: Node | None,
        after: Node | None,
        name: str | None,
    ) -> Node:
        draft = self._open
        if (before is None) == (after is None):
            raise ValueError("say either before= or after=")
        place = (
            self.graph.inserting_before(before)
            if before is not None
            else self.graph.inserting_after(after)
        )
        with place:
            node = self.graph.create_node(op, target, args, kwargs or {}, name=name)
        record = info(like)
        node.meta = {key: value for key, value in like.meta.items() if key != "example_value"}
        write_info(
            node,
            rules=(*record.rules, draft.rule),
            opaque="",  # that was said of the call it stands beside
            integral=False,
            qtype=None,
            macs=None,
            weight_scales=None,
            matrix_scales=(),
            reads=None,
            writes=None,
        )
        draft.added.append(node.name)
        draft.touch(record)
        return node

    def erase(self, node: Node) -> None:
        """Take out a node that nobody uses."""
        draft = self._open
        draft.removed.append(node.name)
        draft.touch(info(node))
        self.graph.erase_node(node)

    def reuse(self, node: Node, new: Node) -> None:
        """Let every user of ``node`` read ``new`` instead; ``node`` stays."""
        self._open.changed.update(dict.fromkeys(user.name for user in node.users))
        node.replace_all_uses_with(new, propagate_meta=False)

    def replace(self, old: Node, new: Node, *also: Node) -> None:
        """Let users of ``old`` read ``new``, then take out ``old`` and ``also``, users first.

        ``new`` inherits the provenance of all that goes, but for conversions between float and
        codes: those belong to the value that was converted.
        """
        _ = self._open  # refuses before anything has changed
        gone = (old, *also)
        origins: dict[str, None] = dict.fromkeys(info(new).origins)
        for node in gone:
            op = op_of(node)
            if op is None or op.kind is not Kind.BOUNDARY:
                origins.update(dict.fromkeys(info(node).origins))
        old.replace_all_uses_with(new, propagate_meta=False)
        write_info(new, origins=tuple(origins))
        # A pattern may meet one node twice: x + conv(x) reads one dequantize from both sides.
        for node in dict.fromkeys(gone):
            if not node.users:
                self.erase(node)

    def replace_use(self, user: Node, old: Node, new: Node) -> None:
        """Let one user read ``new`` where it read ``old``."""
        draft = self._open
        user.replace_input_with(old, new)
        draft.changed[user.name] = None
        draft.touch(info(user))

    def set_call(
        self, node: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Respell a node where it stands: same name, same users."""
        draft = self._open
        node.op = "call_module" if isinstance(target, str) else "call_function"
        node.target = target
        node.args = args
        node.kwargs = kwargs
        draft.changed[node.name] = None
        draft.touch(info(node))

    def set_args(self, node: Node, args: tuple[Any, ...]) -> None:
        """Change the positional arguments of a node."""
        draft = self._open
        node.args = args
        draft.changed[node.name] = None

    def annotate(self, node: Node, **changes: Any) -> None:
        """Change the record of a node; logged as a change of the node."""
        draft = self._open
        record = info(node)
        changes = {k: v for k, v in changes.items() if getattr(record, k, _UNSET) != v}
        if not changes:
            return
        write_info(node, **changes)
        draft.changed[node.name] = None
        draft.touch(record)

    def note_values(self, node: Node, **changes: Any) -> None:
        """Write facts into a record without logging them as an edit (value kinds, shapes)."""
        write_info(node, **changes)

    def add_module(self, path: str, module: nn.Module) -> str:
        """Put ``module`` at ``path``, or at the nearest free path; returns where it stands."""
        free = self.free_path(path)
        self.module.add_submodule(free, module)
        return free

    def set_module(self, path: str, module: nn.Module) -> None:
        """Put ``module`` in the place of the module at ``path``."""
        parent, _, leaf = path.rpartition(".")
        setattr(self.module.get_submodule(parent), leaf, module)

    def add_buffer(self, path: str, tensor: torch.Tensor) -> str:
        """Put a tensor at ``path``, making empty parents as needed; returns where it stands.

        A parameter stays one.
        """
        free = self.free_path(path)
        parent, _, leaf = free.rpartition(".")
        owner: nn.Module = self.module
        for part in parent.split(".") if parent else ():
            if not isinstance(getattr(owner, part, None), nn.Module):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
        return free

    def free_path(self, path: str) -> str:
        """``path`` itself if nothing stands there, else ``path_1``, ``path_2``, ..."""
        if not _stands(self.module, path):
            return path
        count = self._fresh.get(path, 0)
        while True:
            count += 1
            if not _stands(self.module, f"{path}_{count}"):
                self._fresh[path] = count
                return f"{path}_{count}"

    def clean(self) -> None:
        """Take out nodes nobody uses, submodules nobody calls and tensors nobody reads."""
        for node in reversed(self.graph.nodes):
            if not node.users and is_removable(node):
                self.erase(node)
        used = self._used()
        self._drop_modules(used)
        _drop_unread_tensors(self.module, used)

    def drop_unused_modules(self) -> None:
        """Take out submodules that no node calls or reads from, as torch.fx would.

        :meth:`torch.fx.GraphModule.delete_all_unused_submodules` looks every name up in a list,
        which takes seconds where there are thousands.
        """
        self._drop_modules(self._used())

    def _used(self) -> UsedPlaces:
        """The places that nodes name."""
        nodes = (node for node in self.graph.nodes if node.op in _NAMES_A_PLACE)
        return UsedPlaces(str(node.target) for node in nodes)

    def _drop_modules(self, used: UsedPlaces) -> None:
        for name in [n for n, _ in self.module.named_modules() if not used.has(n)]:
            self.module.delete_submodule(name)


def _drop_unread_tensors(module: GraphModule, used: UsedPlaces) -> None:
    """A weight given to ``F.linear`` stays where the user keeps it after a layer has taken it."""
    for path, owner in module.named_modules():
        if used.inside(path):
            continue
        for registry in (owner._parameters, owner._buffers):
            held = [name for name, tensor in registry.items() if tensor is not None]
            prefix = f"{path}." if path else ""
            for name in [n for n in held if f"{prefix}{n}" not in used.named]:
                delattr(owner, name)


_NAMES_A_PLACE: Final = ("call_module", "get_attr")


def _stands(module: nn.Module, path: str) -> bool:
    owner: Any = module
    for part in path.split("."):
        if not hasattr(owner, part):
            # Owners yet to be made will have the methods of every module, such as "to".
            return hasattr(nn.Module, path.rpartition(".")[2])
        owner = getattr(owner, part)
    return True


def is_removable(node: Node) -> bool:
    """Whether dropping an unused ``node`` changes nothing a user can see."""
    if node.op in ("placeholder", "output"):
        return False
    if node.op == "get_attr":
        return True
    return op_of(node) is not None and not info(node).opaque
