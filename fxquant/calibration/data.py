"""Calibration data: every kind users pass, as one stream of batches, or refused in words."""

from __future__ import annotations

import dataclasses
import inspect
import operator
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple, NoReturn

from torch import Tensor, nn

from fxquant.calibration.binding import Batch, bind_batch, describe, spread
from fxquant.errors import CalibrationError, ConfigError

Transform = Callable[[Any], Batch]

KINDS: Final = (
    "a DataLoader, an iterable or generator of batches (Tensor, tuple, list, dict or dataclass), "
    "one Tensor, or a function f(model) that runs the model"
)
# What a model or a user's transform raises when it gets something it cannot work with.
USER_FAILURES: Final = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)


class FirstBatch(NamedTuple):
    """The first batch of some data, and the data with nothing lost.

    Args:
        args: positional arguments of ``forward``; ``None`` where the data is a function
            ``f(model)``, which shows no batch before it runs, or is empty and may be.
        kwargs: keyword arguments of ``forward``.
        replay: what to calibrate with: all batches, the first included, **already transformed**
            (each exactly once), or the function itself.
    """

    args: tuple[Any, ...] | None
    kwargs: dict[str, Any]
    replay: Any


class _Replay(Iterator[Batch]):
    """The peeked batch, then the rest; forgets a batch as soon as it is handed out."""

    def __init__(
        self, first: Batch, rest: Iterator[Any], transform: Transform | None, total: int | None
    ) -> None:
        self._first: list[Batch] = [first]
        self._rest = rest
        self._transform = transform
        self._total = total
        self._drawn = 0

    def __next__(self) -> Batch:
        index = self._drawn
        self._drawn += 1
        if self._first:
            return self._first.pop()
        return transformed(self._transform, next(self._rest), index)

    def __length_hint__(self) -> int:
        if self._total is None:
            raise TypeError("unknown")  # how this protocol says that there is no hint
        return max(self._total - self._drawn, 0)


def first_batch(
    data: Any,
    transform: Transform | None = None,
    *,
    model: nn.Module | None = None,
    may_be_empty: bool = False,
) -> FirstBatch:
    """Look at the first batch without losing it, be the data a one-shot generator or not.

    Args:
        data: any kind of calibration data, see :data:`KINDS`.
        transform: turns what ``data`` yields into a batch; applied here, so do not pass it on.
        model: the model the batch is for; with it the batch is checked against ``forward``.
        may_be_empty: data without a batch is no error: then there are no arguments.

    Raises:
        CalibrationError: there is no batch, or it does not fit ``forward``.
        ConfigError: ``transform`` is not callable, or is given for a function ``f(model)``.

    Example:
        >>> import torch
        >>> args, kwargs, replay = first_batch(iter([torch.zeros(2, 3), torch.ones(2, 3)]))
        >>> args[0].sum().item(), len(list(replay))
        (0.0, 2)
    """
    check_options(data, transform)
    if is_function(data):
        return FirstBatch(None, {}, data)
    batches = as_batches(data)
    rest = iter(batches)
    try:
        drawn = next(rest)
    except StopIteration:
        if may_be_empty:
            return FirstBatch(None, {}, ())
        refuse_empty(data)
    first = transformed(transform, drawn, 0)
    args, kwargs = spread(first, 0) if model is None else bind_batch(model, first, 0)
    return FirstBatch(args, kwargs, _Replay(first, rest, transform, length(batches)))


def check_options(data: Any, transform: object, max_batches: object = None) -> None:
    """Refuse options that cannot work before a batch is drawn.

    Raises:
        ConfigError: a ``transform`` that is no function, a ``max_batches`` that is no count, or
            either of them for a function ``f(model)``, which feeds the model itself.
        CalibrationError: ``max_batches`` is 0.
    """
    if transform is not None and not callable(transform):
        raise ConfigError(f"transform is a {type(transform).__name__}: pass a function of a batch")
    if max_batches is not None:
        if not isinstance(max_batches, int) or isinstance(max_batches, bool) or max_batches < 0:
            raise ConfigError(f"max_batches is {max_batches!r}: pass a positive integer or None")
        if max_batches == 0:
            raise CalibrationError(
                "max_batches=0 asks for 0 batches: calibration needs at least one; None takes all"
            )
    if (transform is not None or max_batches is not None) and is_function(data):
        raise ConfigError(
            "transform and max_batches do nothing where the data is a function f(model), which "
            "feeds the model itself: do both in the function"
        )


def is_function(data: Any) -> bool:
    """Whether ``data`` is the ``f(model)`` form.

    Raises:
        CalibrationError: it is a function, but not one that can be called with a model.
    """
    if isinstance(data, (nn.Module, Iterable)) or not callable(data):
        return False
    try:
        inspect.signature(data).bind(None)
    except TypeError as error:
        raise CalibrationError(
            f"a calibration function is called as f(model), and this one cannot be ({error}): if "
            "it makes the batches, pass what it returns, f(), and not f"
        ) from error
    except ValueError:
        return True  # a builtin that tells no signature: calling it will tell
    return True


def as_batches(data: Any) -> Iterable[Any]:
    """The iterable of batches that ``data`` is; a lone Tensor, mapping or dataclass is one batch.

    Raises:
        CalibrationError: ``data`` is of no kind in :data:`KINDS`.
    """
    kind = type(data)
    alone = dataclasses.is_dataclass(data) and not isinstance(data, (type, Iterable))
    if isinstance(data, (Tensor, Mapping)) or alone:
        return (data,)
    if isinstance(data, nn.Module):
        raise CalibrationError(f"the data is a model, a {kind.__name__}: pass {KINDS}")
    if hasattr(data, "__array__"):
        raise CalibrationError(
            f"the data is a {kind.__module__}.{kind.__name__}: pass tensors, such as "
            "torch.from_numpy(array).float() as one batch, or .split(32) of that as many"
        )
    if not hasattr(kind, "__iter__") and hasattr(kind, "__getitem__"):
        raise CalibrationError(
            f"the data is a {kind.__name__}, which gives single samples by number: wrap it as "
            "DataLoader(data, batch_size=32), or batch_size=None if its items are batches already"
        )
    if isinstance(data, (str, bytes, os.PathLike)) or not isinstance(data, Iterable):
        raise CalibrationError(f"the data is a {kind.__name__}, {data!r:.60}: pass {KINDS}")
    return data


def refuse_empty(data: Any) -> NoReturn:
    """Say that the data gave no batch, and why if it shows."""
    used = isinstance(data, types.GeneratorType) and data.gi_frame is None
    why = "the generator is used up (it can be read only once)" if used else "it is empty"
    raise CalibrationError(
        f"0 batches: the data ({type(data).__name__}) gave nothing, {why}. Pass at least one "
        "batch of inputs; a few hundred samples are usual"
    )


def length(batches: Iterable[Any]) -> int | None:
    """How many batches there are, where the iterable tells."""
    try:
        hint = operator.length_hint(batches, -1)
    except NotImplementedError:
        return None
    return hint if hint >= 0 else None


def transformed(transform: Transform | None, drawn: Any, index: int) -> Batch:
    """Apply the user's transform.

    Raises:
        CalibrationError: it failed; says on what.
    """
    if transform is None:
        return drawn
    try:
        return transform(drawn)
    except USER_FAILURES as error:
        raise CalibrationError(
            f"transform failed on batch {index}, {describe(drawn)}: {type(error).__name__}: {error}"
        ) from error
