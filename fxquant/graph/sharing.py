"""Every call its own module, so that changing one call cannot change another."""

from __future__ import annotations

from fxquant.graph.copies import share_parameters
from fxquant.graph.edit import Editor


def unshare(editor: Editor) -> None:
    """Give the second and later calls of a module copies that share its parameters and buffers.

    Args:
        editor: the graph; calls are walked in order, and the first of a module keeps it.
    """
    seen: dict[int, str] = {}
    for node in editor.graph.nodes:
        if node.op != "call_module":
            continue
        path = str(node.target)
        module = editor.module.get_submodule(path)
        if id(module) not in seen:
            seen[id(module)] = path
            continue
        if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
            continue
        with editor.rule("unshare", note=f"{path} is called again"):
            free = editor.add_module(path, share_parameters(module))
            editor.set_call(node, free, node.args, dict(node.kwargs))
