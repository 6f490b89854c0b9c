"""Where the nodes of an exported program come from: module paths and source lines."""

from __future__ import annotations

import os
import re
from typing import Any, Final

import torch
from torch import fx, nn
from torch._ops import OpOverload

from fxquant.graph.info import KEY, NodeInfo
from fxquant.graph.op_table import function_spelling, module_op

_TORCH_DIR: Final = os.path.join(str(torch.__path__[0]), "")
_OWN_DIR: Final = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+)')


class Places:
    """Reads module paths and lines from the metadata of exported nodes.

    Args:
        root: the exported model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._calls: dict[str, int] = {}

    def note(self, node: fx.Node, like: fx.Node | None) -> None:
        """Write the record of ``node``, which does what ``like`` did in the exported program."""
        owners = self._owners(like) if like is not None else ()
        node.meta[KEY] = NodeInfo(
            path=self._path(node, owners) if node.op == "call_function" else str(node.target),
            source=_user_line(like) if like is not None else "",
            origins=(node.name,),
            owners=owners,
        )

    def tensor(self, path: str) -> torch.Tensor | None:
        """What stands at ``path`` of the model, if that is a tensor."""
        parent, _, leaf = path.rpartition(".")
        found = getattr(self._modules.get(parent), leaf, None)
        return found if isinstance(found, torch.Tensor) else None

    def _owners(self, node: fx.Node) -> tuple[tuple[str, type], ...]:
        stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        # The second call of a module is recorded as "conv@1".
        paths = [path.partition("@")[0] for path, _ in stack.values()]
        return tuple((p, type(self._modules[p])) for p in paths if p and p in self._modules)

    def _path(self, node: fx.Node, owners: tuple[tuple[str, type], ...]) -> str:
        path = owners[-1][0] if owners else ""
        if path:
            op, spelled = module_op(self._modules[path]), function_spelling(node.target)
            if op is not None and spelled is not None and spelled[0].name == op.name:
                return path  # the one op of an nn.Conv2d is called as the module is
        return self._numbered(f"{path}.{_leaf(node)}" if path else _leaf(node))

    def _numbered(self, path: str) -> str:
        """The second ``add`` of a module is ``add_1``: a path names one op."""
        count = self._calls.get(path, 0)
        self._calls[path] = count + 1
        return f"{path}_{count}" if count else path


def _leaf(node: fx.Node) -> str:
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.rpartition("::")[2].rstrip("_")
    return str(getattr(node.target, "__name__", node.target))


def _user_line(node: fx.Node) -> str:
    """The innermost line of the user's own code that ran the op."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for filename, line in reversed(frames):
        if not filename.startswith((_TORCH_DIR, _OWN_DIR, "<")):
            return f"{filename}:{line}"
    return ""
