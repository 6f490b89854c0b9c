"""A pattern function as a canonical graph: it goes through the passes that models go through."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxquant.custom.parameters import Parameter
from fxquant.errors import PatternError
from fxquant.graph.capture import trace
from fxquant.graph.edit import Editor
from fxquant.graph.signature import bind_example
from fxquant.graph.tracer import Tracer
from fxquant.graph.verify import verify
from fxquant.passes.base import Pass
from fxquant.patterns.rule import RuleSet
from fxquant.patterns.unary import WRITTEN_OUT
from fxquant.recipes import prepare_recipe
from fxquant.spec import QConfig


class Stand(nn.Module):
    """Stands for a module of the model, in the graph of a pattern.

    Args:
        parameter: the parameter that it is.
    """

    def __init__(self, parameter: Parameter) -> None:
        super().__init__()
        self.parameter = parameter

    def forward(self, *args: Any) -> Any:
        """Never run: it is a leaf of the trace."""
        raise NotImplementedError("a pattern is looked for, not run")


def rooted(
    function: Callable[..., Any], modules: dict[str, nn.Module], inputs: Iterable[str]
) -> nn.Module:
    """A module that calls ``function`` with modules of its own and with its inputs, by name.

    Args:
        function: the user's function.
        modules: what it is given as modules, by parameter name.
        inputs: names of what it is given as inputs.
    """
    names = tuple(inputs)

    class Definition(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, module in modules.items():
                self.add_module(name, module)

        def forward(self, *args: Any) -> Any:
            held = {name: self._modules[name] for name in modules}
            return function(**dict(zip(names, args, strict=True)), **held)

    shape = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    shape += [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    Definition.forward.__signature__ = inspect.Signature(shape)  # type: ignore[attr-defined]  # what inspect reads
    Definition.__name__ = Definition.__qualname__ = getattr(function, "__name__", "pattern")
    return Definition()


def canonical_passes() -> tuple[Pass, ...]:
    """The passes of every recipe up to the configuration: they decide on spelling alone."""
    recipe = prepare_recipe(QConfig(), (), (), {})
    return tuple(takewhile(lambda step: step.name != "configure", recipe.passes))


def canonicalize(module: GraphModule, *, known: bool = False) -> GraphModule:
    """Run the passes of spelling over ``module``, in place.

    Args:
        module: a captured graph.
        known: whether ops written out by hand are named too, as users' patterns want it.
    """
    for step in canonical_passes():
        step.run(Editor(module))
        verify(module, step.gives, step.name)
    if known:
        RuleSet(WRITTEN_OUT).apply(Editor(module))
    return module


def trace_definition(
    function: Callable[..., Any], parameters: tuple[Parameter, ...], line: str
) -> GraphModule:
    """The canonical graph of a pattern function; its modules are :class:`Stand`.

    Args:
        function: the pattern.
        parameters: its parameters.
        line: where it is written, for messages.

    Raises:
        PatternError: it cannot be traced: it branches on values, or asks a module what it holds.
    """
    stands: dict[str, nn.Module] = {p.name: Stand(p) for p in parameters if p.kind == "module"}
    root = rooted(function, stands, [p.name for p in parameters if p.kind != "module"])
    binding = bind_example(root, (), {})
    tracer = Tracer(binding, trace_definition.__code__, frozenset(stands))
    try:
        module = trace(root, binding, tracer, type(root).__name__)
    # The user's function may fail in any way when it is fed proxies; all of it means the same.
    except Exception as error:
        at = tracer.line() or line
        raise PatternError(
            f"{line}: this pattern cannot be traced: {type(error).__name__}: {error} (at {at}). A "
            "pattern computes on its inputs and calls its modules, without branches on values; "
            "what a module must hold is asked in where="
        ) from error
    numbers = {p.name for p in parameters if p.kind == "number"}
    editor = Editor(module)
    with editor.rule("read-definition"):
        for node in module.graph.nodes:
            if node.op == "placeholder" and node.target in numbers:
                # What has a default is a number, for the op table too.
                editor.set_args(node, (0.0,))
            if node.op == "call_module":
                editor.note_values(node, held="tensor")
    return canonicalize(module, known=True)
