"""The parameters of a pattern function: modules by their class, numbers, tensors."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, Union

from torch import Tensor, nn

from fxquant.errors import PatternError
from fxquant.graph.op_table import OPS, class_op

_NUMBERS: Final = (int, float, bool)
ParameterKind = Literal["tensor", "constant", "number", "module"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a pattern function.

    Args:
        name: its name.
        kind: ``tensor``, ``constant`` (an ``nn.Parameter`` of the model), ``number``, ``module``.
        classes: of a module, the classes that will do.
        optional: of a module, whether it may be missing.
        functions: ops that will do beside those of the classes.
    """

    name: str
    kind: ParameterKind
    classes: tuple[type[nn.Module], ...] = ()
    optional: bool = False
    functions: tuple[str, ...] = ()

    @property
    def ops(self) -> tuple[str, ...]:
        """The canonical ops that will do."""
        found = [class_op(cls) for cls in self.classes]
        spelled = tuple(op.name for op in found if op is not None)
        return tuple(dict.fromkeys((*spelled, *self.functions)))


def read_parameters(function: Callable[..., Any], line: str) -> tuple[Parameter, ...]:
    """What each parameter of a pattern function stands for; one with a default is that constant.

    Args:
        function: the pattern.
        line: where it is written, for messages.

    Raises:
        PatternError: an annotation that says nothing a pattern can look for.
    """
    try:
        hints = inspect.get_annotations(function, eval_str=True)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise PatternError(f"{line}: its annotations cannot be read: {error}") from error
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError) as error:
        name = getattr(function, "__name__", function)
        raise PatternError(
            f"{line}: {name} tells nothing of its parameters: write a function that calls it, or "
            f"a list: fxquant.Pattern([{name}])"
        ) from error
    found = []
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise PatternError(
                f"{line}: it takes *{name}, and a pattern has a fixed number of inputs: name each"
            )
        hint = hints.get(name, Tensor)
        if parameter.default is not parameter.empty and not _classes(hint):
            continue  # traced as the constant it is
        found.append(_parameter(name, hint, line))
    return tuple(found)


def _classes(hint: Any) -> tuple[Any, ...]:
    """The module classes an annotation names; ``None`` among them says that it is optional."""
    if isinstance(hint, tuple | list):
        return tuple(each for part in hint for each in _classes(part))
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = typing.get_args(hint)
        found = [each for part in parts for each in _classes(part)]
        return tuple(found) + ((None,) if type(None) in parts and found else ())
    is_module = isinstance(hint, type) and issubclass(hint, nn.Module)
    return (hint,) if is_module else ()


def _parameter(name: str, hint: Any, line: str) -> Parameter:
    classes = _classes(hint)
    if classes:
        real = tuple(cls for cls in classes if cls is not None)
        check_classes(real, f"{line}: {name}")
        return Parameter(name, "module", real, None in classes)
    parts = typing.get_args(hint) if typing.get_origin(hint) is not None else (hint,)
    if all(part in _NUMBERS for part in parts):
        return Parameter(name, "number")
    if hint is nn.Parameter:
        return Parameter(name, "constant")
    if hint in (Tensor, Any, inspect.Parameter.empty):
        return Parameter(name, "tensor")
    raise PatternError(
        f"{line}: {name} is annotated {hint!r}, which a pattern cannot look for: use an nn.Module "
        "class such as nn.Conv2d (or a union of some), float, int, nn.Parameter, or nothing for "
        "a tensor"
    )


def check_classes(classes: Iterable[type[nn.Module]], where: str) -> None:
    """Refuse module classes that are no op.

    Raises:
        PatternError: fxquant traces into such a module, so that it never stands in a graph.
    """
    for cls in classes:
        if class_op(cls) is None and not issubclass(cls, nn.Identity):
            known = {known.__name__ for op in OPS for known in op.modules}
            near = difflib.get_close_matches(cls.__name__, known, n=2)
            hint = f"; the nearest that are one: {', '.join(near)}" if near else ""
            raise PatternError(
                f"{where} is a {cls.__name__}, which is no op of fxquant{hint}. Models are traced "
                "into such modules: write what its forward does"
            )
