"""Configure: write into every op's record the configuration that applies to it.

Overrides are ordered and the last match wins. A selector is a module path (the module and all
inside it), a glob over paths, ``"re:..."``, a module class, or a function such as ``torch.add``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Final

from torch import nn
from torch.fx import Node

from fxquant.errors import ConfigError
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import class_op, function_spelling, module_of, op_of
from fxquant.graph.text import names_near, shown
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass
from fxquant.spec import QConfig

Selector = str | type | Callable[..., object]
Predicate = Callable[[Node], bool]
_LINE: Final = 120


@dataclass(frozen=True)
class Configure(Pass):
    """Resolve the default configuration and the overrides.

    Args:
        default: what applies where no override does.
        overrides: selector and configuration (``None`` is float), in the user's order.
        must_match: whether a selector that matches nothing is an error; in one of the parts of a
            model it is none.
    """

    name: ClassVar[str] = "configure"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    default: QConfig = field(default_factory=QConfig)
    overrides: tuple[tuple[Selector, QConfig | None], ...] = ()
    must_match: bool = True

    def run(self, editor: Editor) -> None:
        """Every op gets the last override that matches it, or the default.

        Raises:
            ConfigError: a selector matches nothing.
        """
        nodes = [
            n for n in editor.graph.nodes if n.op in ("call_module", "call_function", "call_method")
        ]
        chosen: dict[Node, tuple[QConfig | None, str]] = {}
        for selector, config in self.overrides:
            matches = predicate(selector)
            hits = [node for node in nodes if matches(node)]
            if not hits and self.must_match:
                raise ConfigError(nothing_matches(selector, nodes))
            for node in hits:
                chosen[node] = (config, f"override {_name(selector)}")
        with editor.rule("configure"):
            for node, (config, by) in chosen.items():
                editor.annotate(node, config=config, configured_by=by)
        for node in nodes:
            if node not in chosen:
                editor.note_values(node, config=self.default, configured_by="the default")


def predicate(selector: Selector) -> Predicate:
    """Whether a node is meant by ``selector``.

    Raises:
        ConfigError: it is no selector.
    """
    if isinstance(selector, str):
        return _by_path(selector)
    if isinstance(selector, type) and issubclass(selector, nn.Module):
        return _by_class(selector)
    if callable(selector):
        found = function_spelling(selector)
        return lambda node: _calls(node, selector, found[0].name if found else None)
    raise ConfigError(
        f"the override selector {selector!r} is none: use a module path, a glob, 're:...', an "
        "nn.Module class, or a function such as torch.add"
    )


def _by_path(text: str) -> Predicate:
    if text.startswith("re:"):
        try:
            pattern = re.compile(text[3:])
        except re.error as error:
            raise ConfigError(
                f"the override selector {text!r} is no regular expression: {error}"
            ) from error
        return lambda node: any(pattern.fullmatch(path) for path in _paths(node))
    if any(sign in text for sign in "*?["):
        return lambda node: any(fnmatch.fnmatchcase(path, text) for path in _paths(node))
    return lambda node: text in _paths(node)


def _by_class(cls: type[nn.Module]) -> Predicate:
    spelled = class_op(cls)
    op = spelled.name if spelled is not None else None

    def matches(node: Node) -> bool:
        if any(issubclass(owner, cls) for _, owner in info(node).owners):
            return True
        if node.op == "call_module" and isinstance(module_of(node), cls):
            return True
        found = op_of(node)
        return op is not None and found is not None and found.name == op

    return matches


def _calls(node: Node, function: Callable[..., object], op_name: str | None) -> bool:
    if node.target is function:
        return True
    found = op_of(node)
    return op_name is not None and found is not None and found.name == op_name


def _paths(node: Node) -> tuple[str, ...]:
    """The op's own path and those of the modules around it."""
    record = info(node)
    owners = tuple(path for path, _ in record.owners)
    target = (str(node.target),) if node.op == "call_module" else ()
    return (record.path, *target, *owners)


def _name(selector: Selector) -> str:
    return (
        repr(selector)
        if isinstance(selector, str)
        else getattr(selector, "__name__", str(selector))
    )


def nothing_matches(selector: Selector, nodes: Iterable[Node]) -> str:
    """The message for a selector that matches none of ``nodes``."""
    hint = names_near(selector, (path for node in nodes for path in _paths(node)))
    return f"the override {shown(_name(selector), _LINE)} matches nothing in this model: {hint}"
