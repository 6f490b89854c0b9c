"""``fxquant.pattern`` and ``fxquant.Pattern``: fusion patterns of one's own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, overload

from torch import nn

from fxquant.custom.bound import bound_values
from fxquant.custom.chains import chain_function
from fxquant.custom.compile import Compiled, compile_graph
from fxquant.custom.dry_run import Matches, look_for
from fxquant.custom.kernels import check_kernel_signature
from fxquant.custom.parameters import Parameter, read_parameters
from fxquant.custom.replace import Replacement
from fxquant.custom.trace import trace_definition
from fxquant.errors import FxQuantError, PatternError
from fxquant.graph.info import CustomUnit
from fxquant.patterns.custom_units import (
    can_be_a_unit,
    group_custom,
    is_closed,
    is_convex,
    is_free,
)
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Check, Rewrite, Rule
from fxquant.patterns.units import memory_is_free, one_wish

Where = Callable[..., "str | bool | None"]
_PACKAGE: Final = "fxquant"


class Pattern:
    """Ops that belong together: found in every spelling, and run as one.

    Args:
        definition: a function written like model code, or a list of ops in forward order, each an
            ``nn.Module`` class, a function such as ``torch.sigmoid``, or a tuple of alternatives
            (``None`` among them: it may be missing). Parameters of a function stand for modules if
            they are annotated with a module class (``nn.ReLU | nn.SiLU``: either; ``... | None``:
            it may be missing), for any number if with ``float`` or ``int``, for a parameter or
            buffer of the model if with ``nn.Parameter``, and for tensors otherwise. One with a
            default is that constant. What is returned may be read by others; what is not, may not.
        name: what reports call it; by default the function's name, or the ops of the list.
        commutes: whether the operands of sums and products may stand the other way round.
        where: a further condition: called with those of the pattern's parameters that it names, it
            returns ``None`` or ``True``, or a reason why not (``False``: no reason given). Modules
            are given as they are, ops without weights as their options (``act.negative_slope``),
            numbers as numbers, parameters of the model as tensors, other tensors as graph nodes.
        replacement: what to put in the place of a match before it is quantized: a function of the
            same parameters, a module, or a module class that is given those of the pattern's
            modules and numbers that its ``__init__`` names and called with the tensors. It is
            compared with the original in float on random inputs.
        qat: makes the module that is trained in the place of the unit: a class or function that is
            given those of the pattern's modules that it names, and whose result is called with the
            pattern's tensors. Layers come as copies that share their parameters and round their
            weights, those with a batch norm that the pattern does not name as ``nn.Sequential`` of
            both; what is deployed is the unit, with the parameters that were trained.
        kernel: an int8 implementation: called with the pattern's parameters, tensors as
            :class:`~fxquant.custom.kernels.Codes` and layers as
            :class:`~fxquant.custom.kernels.IntegerLayer`, and with ``output``, the type of the
            codes to return (``outputs`` where there are several). It is compared with the pattern
            itself on random codes and may be one code off.
        priority: where patterns overlap, the highest priority takes the ops, then the largest
            match, then the first name.

    Raises:
        PatternError: it can never match, or an option does not fit; names the line that wrote it.

    Example:
        >>> import torch, fxquant
        >>> from torch import nn
        >>> unit = fxquant.Pattern([nn.Conv2d, nn.BatchNorm2d, (nn.ReLU, nn.SiLU)])
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU()).eval()
        >>> len(unit.match(net).hits)
        1
    """

    def __init__(
        self,
        definition: Callable[..., Any] | Sequence[Any],
        *,
        name: str | None = None,
        commutes: bool = True,
        where: Where | None = None,
        replacement: nn.Module | Callable[..., Any] | None = None,
        qat: Callable[..., nn.Module] | None = None,
        kernel: Callable[..., Any] | None = None,
        priority: int = 0,
    ) -> None:
        self.line = _line_of(definition)
        function, parameters, default = self._read(definition)
        self.name = default if name is None else name
        self.definition = function
        self.priority = priority
        self.__doc__ = getattr(definition, "__doc__", None) if callable(definition) else None
        self._check_options(kernel, qat, replacement, priority)
        module = trace_definition(function, parameters, self.line)
        self._compiled = compile_graph(
            module, parameters, self.line, ordered=not commutes, whole=replacement is not None
        )
        self._parameters = parameters
        self._where = where
        names = tuple(p.name for p in parameters)
        if where is not None:
            _check_names(where, names, f"{self.line}: where=")
        if qat is not None:
            _check_names(qat, names, f"{self.line}: qat=")
        if kernel is not None:
            check_kernel_signature(kernel, names, len(self._compiled.names.ops), self.line)
        unit = CustomUnit(self.name, self.line, kernel, qat, self._compiled.names.inputs)
        self.unit = unit
        self._replacement = (
            None
            if replacement is None
            else Replacement(replacement, module, parameters, self._compiled, self.name, self.line)
        )
        self.rule = self._rule()

    def _read(self, definition: Any) -> tuple[Callable[..., Any], tuple[Parameter, ...], str]:
        if isinstance(definition, tuple | list):
            return chain_function(definition, self.line)
        if isinstance(definition, type) or not callable(definition):
            raise PatternError(
                f"{self.line}: a pattern is a function written like model code, or a list such as "
                f"[nn.Conv2d, nn.SiLU]; this is {definition!r}"
            )
        default = str(getattr(definition, "__name__", type(definition).__name__))
        function: Any = definition
        if not inspect.isroutine(function):
            function = function.__call__
        return function, read_parameters(function, self.line), default

    def _check_options(self, kernel: Any, qat: Any, replacement: Any, priority: Any) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PatternError(f"{self.line}: name is {self.name!r}: it must be a string")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise PatternError(f"{self.line}: priority is {priority!r}: it must be an integer")
        for option, value in (("kernel", kernel), ("qat", qat)):
            if value is not None and not callable(value):
                raise PatternError(f"{self.line}: {option} is {value!r}: it must be callable")
            if value is not None and replacement is not None:
                raise PatternError(
                    f"{self.line}: it has replacement= and {option}=: what replaces a match is "
                    "quantized as any other part of the model; give the replacement a pattern of "
                    "its own"
                )

    def _rule(self) -> Rule:
        compiled = self._compiled
        checks: list[Check] = [is_free, is_closed(compiled.names), is_convex]
        checks += [one_wish, memory_is_free]
        rewrite: Rewrite
        if self._replacement is None:
            checks.append(can_be_a_unit)
            rewrite = group_custom(self.unit, compiled.names)
        else:
            checks.append(self._replacement.is_new)
            rewrite = self._replacement
        if self._where is not None:
            checks.append(self._refused)
        return Rule(
            self.name,
            compiled.root,
            rewrite,
            tuple(checks),
            self.priority,
            self.line,
            compiled.also,
            early=True,
        )

    def _refused(self, match: Match) -> Reject | None:
        where = self._where
        if where is None:
            return None
        bound = bound_values(match, self._parameters)
        wanted = inspect.signature(where).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in wanted.values())
        try:
            said = where(**{k: v for k, v in bound.items() if takes_all or k in wanted})
        except FxQuantError:
            raise
        # The user's own code may fail in any way; say which condition, and where.
        except Exception as error:
            raise PatternError(
                f"{self.line}: where= of pattern {self.name!r} failed at "
                f"{match.root.name}: {type(error).__name__}: {error}"
            ) from error
        if said is None or said is True:
            return None
        return Reject(said if isinstance(said, str) else "where= refuses it", match.root)

    @property
    def compiled(self) -> Compiled:
        """What the matcher looks for."""
        return self._compiled

    def match(self, model: nn.Module, example_inputs: Any = None) -> Matches:
        """Where the pattern fits in ``model``, and where it nearly does; nothing is changed.

        Args:
            model: a float model.
            example_inputs: one batch, for models that are traced with one.

        Returns:
            Hits and near misses; ``str()`` of it is for people.

        Raises:
            TraceError: the model cannot be captured.
        """
        return look_for(self.rule, self._compiled, self._parameters, model, example_inputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the definition computes: a decorated function can still be called."""
        return self.definition(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Pattern({self.name!r}, {self.line})"


@overload
def pattern(definition: Callable[..., Any], /) -> Pattern: ...


@overload
def pattern(
    *,
    name: str | None = None,
    commutes: bool = True,
    where: Where | None = None,
    replacement: nn.Module | Callable[..., Any] | None = None,
    qat: Callable[..., nn.Module] | None = None,
    kernel: Callable[..., Any] | None = None,
    priority: int = 0,
) -> Callable[[Callable[..., Any]], Pattern]: ...


def pattern(
    definition: Callable[..., Any] | None = None, /, **options: Any
) -> Pattern | Callable[[Callable[..., Any]], Pattern]:
    """Make a :class:`Pattern` of a function written like model code.

    Args:
        definition: the function, where the decorator stands without parentheses.
        options: those of :class:`Pattern`.

    Raises:
        PatternError: the pattern can never match, or an option does not fit.

    Example:
        >>> import torch, fxquant
        >>> from torch import nn
        >>> @fxquant.pattern
        ... def gated(x, conv: nn.Conv2d):
        ...     y = conv(x)
        ...     return y * torch.sigmoid(y)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU()).eval()
        >>> batch = torch.randn(4, 3, 8, 8)
        >>> q = fxquant.quantize(net, [batch], patterns=[gated], backend="reference")
        >>> fxquant.report(q).ops[0].op
        'gated'
    """
    if definition is not None:
        return Pattern(definition, **options)
    return lambda function: Pattern(function, **options)


def _line_of(definition: Any) -> str:
    code = getattr(inspect.unwrap(definition) if callable(definition) else None, "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _check_names(function: Callable[..., Any], known: tuple[str, ...], what: str) -> None:
    wanted = inspect.signature(function).parameters.values()
    unknown = [
        p.name
        for p in wanted
        if p.name not in known and p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    if unknown:
        raise PatternError(
            f"{what} takes {unknown[0]!r}, which is no parameter of the pattern: there are "
            f"{list(known)}"
        )
