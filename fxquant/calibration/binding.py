"""One batch, bound to the arguments of ``forward``, or refused in words.

Knows tensors, containers and signatures, and nothing of observers or graphs.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fxquant.errors import CalibrationError

Batch = Any


def bind_batch(
    model: nn.Module, batch: Batch, index: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn a batch into the arguments ``forward`` takes.

    A Tensor is fed as ``m(x)``, a mapping or dataclass as ``m(**batch)``, a tuple or list as
    ``m(*batch)``, each only where the signature of ``forward`` takes it; a dataclass whose fields
    it does not take is fed as it is. Class labels that would
    land in an *optional* argument are refused: see :func:`_refuse_labels`.

    Args:
        model: the model whose ``forward`` is called.
        batch: one batch, after ``transform``.
        index: its number, for the error.

    Raises:
        CalibrationError: ``forward`` cannot take the batch; says which ``transform`` would help.

    Example:
        >>> bind_batch(torch.nn.Linear(3, 2), [torch.zeros(5, 3)], 0)[0][0].shape
        torch.Size([5, 3])
    """
    args, kwargs = spread(batch, index)
    signature = inspect.signature(model.forward)
    if (
        _is_record(batch)
        and not _takes(signature, args, kwargs)
        and _takes(signature, (batch,), {})
    ):
        return (batch,), {}  # forward takes the object, not its fields
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        advice = _by_name(signature, kwargs) if kwargs else _by_place(signature, len(args))
        raise CalibrationError(
            f"batch {index} is {describe(batch)}, which forward{_names(signature)} cannot take "
            f"({error}): {advice}"
        ) from error
    _refuse_labels(signature, args, batch, index)
    return args, kwargs


def _takes(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def describe(value: Any) -> str:
    """A value in a few words: ``tuple of 2 (float32[8, 3], int64[8])``."""
    if isinstance(value, PackedSequence):
        return f"PackedSequence of {describe(value.data)}"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        shown = [f"{name!r}: {describe(item)}" for name, item in list(value.items())[:6]]
    elif isinstance(value, (tuple, list)):
        shown = [describe(item) for item in value[:6]]
    else:
        return type(value).__name__
    more = ", ..." if len(value) > 6 else ""
    return f"{type(value).__name__} of {len(value)} ({', '.join(shown)}{more})"


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif _is_record(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name, None))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def _is_record(value: Any) -> bool:
    """Whether it is a dataclass that is no mapping besides."""
    plain = not isinstance(value, type | Mapping)
    return plain and dataclasses.is_dataclass(value)


def moved(value: Any, device: torch.device | None) -> Any:
    """``value`` with its tensors on ``device``; the very object where they are there already."""
    if device is None or all(tensor.device == device for tensor in tensors(value)):
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, PackedSequence):
        # Their sizes stay on the CPU.
        return value.to(device)  # type: ignore[arg-type]  # its hints know of dtypes only
    if _is_record(value):
        twin = copy.copy(value)
        for field in dataclasses.fields(value):
            # Frozen ones too: the copy is nobody else's yet.
            object.__setattr__(twin, field.name, moved(getattr(value, field.name), device))
        return twin
    if isinstance(value, Mapping):
        return {name: moved(item, device) for name, item in value.items()}
    items = [moved(item, device) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def spread(batch: Batch, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as arguments, before anyone asks whether ``forward`` takes them."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
    elif isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        args = tuple(batch)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        kwargs = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    else:
        args = (batch,)
    if not any(True for _ in tensors((args, kwargs))):
        array = " (torch.from_numpy makes one of an array)" if hasattr(batch, "__array__") else ""
        raise CalibrationError(
            f"batch {index} is {describe(batch)}, in which there is no tensor{array}: pass "
            "transform= to turn what the data yields into tensors"
        )
    if not all(isinstance(name, str) for name in kwargs):
        raise CalibrationError(
            f"batch {index} is a mapping whose keys are not all names: {list(kwargs)!r:.80}"
        )
    return args, kwargs


def _refuse_labels(
    signature: inspect.Signature, args: tuple[Any, ...], batch: Batch, index: int
) -> None:
    """Refuse ``(image, label)`` where ``label`` would land in an optional argument.

    ``forward(x, mask=None)`` takes an ``(image, label)`` pair without complaint and then
    calibrates on nonsense. So one integer per sample (1-D, as long as the batch), beside an
    input of two or more dimensions, in an argument that has a default, is refused. An argument
    without a default (a time step), a mask ``[batch, tokens]`` and whatever is passed by name
    are left alone; a real ``lengths=None`` has to be passed by name, which the message says.
    """
    first = args[0] if args else None
    if not isinstance(first, Tensor) or first.dim() < 2:
        return
    place = 0
    for name, value in signature.bind(*args).arguments.items():
        parameter = signature.parameters[name]
        starred = parameter.kind is parameter.VAR_POSITIONAL
        optional = starred or parameter.default is not parameter.empty
        for item in value if starred else (value,):
            if place and optional and _is_label(item, len(first)):
                raise CalibrationError(_label_advice(signature, batch, index, place, name))
            place += 1


def _label_advice(
    signature: inspect.Signature, batch: Batch, index: int, place: int, name: str
) -> str:
    text = (
        f"batch {index} is {describe(batch)}: item {place} looks like one label per sample, and "
        f"forward{_names(signature)} would take it as {name!r}. Leave it out with "
        "transform=lambda b: b[0]"
    )
    if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
        return text
    first = next(iter(signature.parameters))
    by_name = f"{{{first!r}: b[0], {name!r}: b[{place}]}}"
    return f"{text}; to feed it on purpose, transform=lambda b: {by_name}"


def _is_label(item: Any, batch_size: int) -> bool:
    if not isinstance(item, Tensor) or tuple(item.shape) != (batch_size,):
        return False
    return not (item.is_floating_point() or item.is_complex() or item.dtype is torch.bool)


def _by_place(signature: inspect.Signature, given: int) -> str:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes = [p for p in signature.parameters.values() if p.kind in kinds]
    counts = f"batch has {given} item{'s' * (given != 1)}, model takes {len(takes)}; "
    if given <= len(takes):
        return counts + "give every input that has no default, as a tuple or by name in a dict"
    kept = "b[0]" if len(takes) == 1 else f"b[:{len(takes)}]"
    return counts + f"if the rest are labels, pass transform=lambda b: {kept}"


def _by_name(signature: inspect.Signature, kwargs: Mapping[str, Any]) -> str:
    known = [name for name in kwargs if name in signature.parameters]
    if known:
        kept = ", ".join(f"{name!r}: b[{name!r}]" for name in known)
        return f"keep what the model takes, and add what it lacks: transform=lambda b: {{{kept}}}"
    name = next(name for name, value in kwargs.items() if any(True for _ in tensors(value)))
    return (
        f"none of its names is an argument: pass transform=lambda b: b[{name!r}] to feed that "
        "alone, or transform=lambda b: (b,) if forward takes the mapping itself"
    )


def _names(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})"
