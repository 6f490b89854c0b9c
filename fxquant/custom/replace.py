"""Replacing what a pattern matches by something else that computes the same in float."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from fxquant.custom.bound import bound_values
from fxquant.custom.compile import Compiled
from fxquant.custom.inline import Inline
from fxquant.custom.parameters import Parameter
from fxquant.custom.samples import samples
from fxquant.custom.trace import canonicalize, rooted
from fxquant.errors import FxQuantWarning, PatternError, TraceError, warn_user
from fxquant.graph.capture import capture, trace
from fxquant.graph.edit import Editor
from fxquant.graph.extract import extract
from fxquant.graph.info import info
from fxquant.graph.op_table import op_of
from fxquant.graph.signature import bind_example
from fxquant.graph.tracer import Tracer
from fxquant.graph.trained_units import CalledOp
from fxquant.patterns.match import Match, Reject

_AGREE: Final = 1e-4
"""Share of the largest value by which two ways of computing one thing may differ in float32."""


class Replacement:
    """The rewrite of a pattern with ``replacement=``.

    Args:
        given: a function, a module or a module class.
        definition: the canonical graph of the pattern.
        parameters: of the pattern.
        compiled: what the matcher looks for.
        name: of the pattern.
        line: where the pattern is written.

    Raises:
        PatternError: it cannot be called with what the pattern has.
    """

    def __init__(
        self,
        given: Any,
        definition: GraphModule,
        parameters: tuple[Parameter, ...],
        compiled: Compiled,
        name: str,
        line: str,
    ) -> None:
        self._given, self._parameters, self._compiled = given, parameters, compiled
        self._name, self._line = name, line
        self._is_class = isinstance(given, type) and issubclass(given, nn.Module)
        if not callable(given):
            raise PatternError(
                f"{line}: replacement is {given!r}: pass a function of the pattern's parameters, "
                "a module, or a module class"
            )
        self._check_signature()

    @property
    def _inputs(self) -> tuple[str, ...]:
        return tuple(p.name for p in self._parameters if p.kind in ("tensor", "constant"))

    def _check_signature(self) -> None:
        names = [p.name for p in self._parameters]
        if isinstance(self._given, nn.Module):
            return self._check_forward(self._given.forward)
        function = self._given.__init__ if self._is_class else self._given
        skip = 1 if self._is_class else 0
        for parameter in list(inspect.signature(function).parameters.values())[skip:]:
            fixed = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.name in names or fixed or parameter.default is not parameter.empty:
                continue
            raise PatternError(
                f"{self._line}: the replacement takes {parameter.name!r}, which is no parameter of "
                f"the pattern: there are {names}"
            )
        if self._is_class:
            self._check_forward(functools.partial(self._given.forward, None))
        return None

    def _check_forward(self, forward: Callable[..., Any]) -> None:
        try:
            inspect.signature(forward).bind(*self._inputs)
        except TypeError as error:
            raise PatternError(
                f"{self._line}: the replacement is called with the pattern's inputs "
                f"{list(self._inputs)}, which its forward does not take: {error}"
            ) from error

    def is_new(self, match: Match) -> Reject | None:
        """A replacement that holds its own pattern is not replaced again."""
        if any(self._name in info(node).rules for node in match.nodes):
            return Reject(f"pattern {self._name!r} made it", match.root)
        return None

    def __call__(self, match: Match, editor: Editor) -> None:
        """Put the replacement in the place of a match.

        Raises:
            PatternError: it computes something else, or cannot be called.
        """
        made = self._traced(match)
        self._compare(match, made)
        Inline(match, made, self._compiled.names.outputs(match), self._inputs, editor).write()

    def _traced(self, match: Match) -> GraphModule:
        bound = bound_values(match, self._parameters)
        modules = {
            p.name: self._callable(match, p, bound[p.name])
            for p in self._parameters
            if p.kind == "module" and bound[p.name] is not None
        }
        rest = [p.name for p in self._parameters if p.kind in ("number", "module")]
        others = {name: bound[name] for name in rest if name not in modules}
        try:
            if isinstance(self._given, nn.Module):
                return self._module(copy.deepcopy(self._given))
            if self._is_class:
                return self._module(self._given(**_wanted(self._given.__init__, modules | others)))
            return self._function(modules, others)
        except (TraceError, PatternError):
            raise
        # The replacement is the user's own code and may fail in any way.
        except Exception as error:
            place = info(match.root).path or match.root.name
            raise PatternError(
                f"{self._line}: the replacement of pattern {self._name!r} cannot be made at "
                f"{place}: {type(error).__name__}: {error}"
            ) from error

    @staticmethod
    def _callable(match: Match, parameter: Parameter, value: Any) -> nn.Module:
        if isinstance(value, nn.Module):
            return value
        found = op_of(match.node(parameter.name))
        options = {k: v for k, v in vars(value).items() if k != "op"}
        if found is None or found.target is None:
            raise PatternError(f"{parameter.name} is no op that a replacement can call")
        return CalledOp(found.target, options)

    def _module(self, module: nn.Module) -> GraphModule:
        root = nn.Module()
        root.add_module("inner", module.eval())
        try:
            made = capture(module.eval())
        except TraceError:
            return self._whole(module)
        return canonicalize(made.module)

    def _whole(self, module: nn.Module) -> GraphModule:
        """A module that cannot be traced is called as it is, and stays float."""
        graph = fx.Graph()
        inputs = tuple(graph.placeholder(name) for name in self._inputs)
        graph.output(graph.call_module("inner", inputs))
        root = nn.Module()
        root.add_module("inner", module)
        return canonicalize(GraphModule(root, graph))

    def _function(self, modules: dict[str, nn.Module], others: dict[str, Any]) -> GraphModule:
        wanted = inspect.signature(self._given).parameters
        held = {name: module for name, module in modules.items() if name in wanted}
        fixed = {name: value for name, value in others.items() if name in wanted}
        inputs = [name for name in self._inputs if name in wanted]
        root = rooted(functools.partial(self._given, **fixed), held, inputs).eval()
        binding = bind_example(root, (), {})
        tracer = Tracer(binding, Replacement._function.__code__)
        return canonicalize(trace(root, binding, tracer, "Replacement"))

    def _compare(self, match: Match, made: GraphModule) -> None:
        """Run both on random inputs.

        Raises:
            PatternError: they differ.
        """
        entries: dict[Node, str] = {}
        for name in self._inputs:
            if isinstance(node := match.bound.get(name), Node):
                entries.setdefault(node, name)
        original = extract(self._compiled.names.outputs(match), entries)
        for given in samples(match, tuple(entries.values())):
            try:
                with torch.no_grad():
                    wanted = _flat(original(*(x.clone() for x in given)))
            except (RuntimeError, ValueError, IndexError, TypeError):
                continue  # these shapes do not fit the match
            fed = dict(zip(entries, given, strict=True))
            named = {name: fed[match.bound[name]] for name in self._inputs}
            places = [str(n.target) for n in made.graph.nodes if n.op == "placeholder"]
            args = [named[name] if name in named else given[i] for i, name in enumerate(places)]
            with torch.no_grad():
                found = _flat(made(*(x.clone() for x in args)))
            self._agree(match, found, wanted)
            return
        place = info(match.root).path or match.root.name
        warn_user(
            f"the replacement of pattern {self._name!r} at {place} was not compared with what it "
            "replaces: no shape of random inputs that was tried fits",
            FxQuantWarning,
        )

    def _agree(self, match: Match, found: list[Tensor], wanted: list[Tensor]) -> None:
        place = info(match.root).path or match.root.name
        start = f"{self._line}: the replacement of pattern {self._name!r} at {place} "
        if len(found) != len(wanted):
            raise PatternError(f"{start}returns {len(found)} tensors, the pattern {len(wanted)}")
        for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
            if a.shape != b.shape:
                raise PatternError(f"{start}returns {tuple(a.shape)}, the pattern {tuple(b.shape)}")
            off = float((a - b).abs().max()) if a.numel() else 0.0
            size = float(b.abs().max()) if b.numel() else 0.0
            if not off <= _AGREE * max(size, 1e-6):
                raise PatternError(
                    f"{start}computes something else: output {number} differs by {off:.3g}, where "
                    f"the largest value is {size:.3g}"
                )


def _wanted(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in names.values())
    return {name: value for name, value in given.items() if takes_all or name in names}


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [each for part in parts for each in _flat(part)]
