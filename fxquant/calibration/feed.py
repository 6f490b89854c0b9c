"""Calibration: feed batches through a prepared model so that its observers see them.

Edits no graph, and leaves the model's mode, the grad mode and the random state as it found them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxquant.calibration.binding import Batch, bind_batch, describe, moved, tensors
from fxquant.calibration.data import (
    USER_FAILURES,
    Transform,
    as_batches,
    check_options,
    is_function,
    length,
    refuse_empty,
    transformed,
)
from fxquant.calibration.together import Counted, watched_together
from fxquant.errors import (
    CalibrationError,
    CalibrationWarning,
    ConfigError,
    FxQuantError,
    warn_user,
)
from fxquant.graph.held import device_of
from fxquant.graph.held_state import random_kept, state_kept
from fxquant.numerics.fake_quantizer import FakeQuantize
from fxquant.numerics.observers import NonFiniteError, Observer
from fxquant.numerics.ranks import is_distributed

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class CalibrationResult:
    """What one calibration fed, in all processes together.

    Args:
        batches: how many batches the model ran on.
        samples: how many samples those held (the sum of their first dimensions); ``None`` where
            that is not known, as for a function ``f(model)``.
        seconds: how long it took.
        unseen: paths of the observers that no value reached; those sites stay float.
    """

    batches: int
    samples: int | None
    seconds: float
    unseen: tuple[str, ...]


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    transform: Transform | None = None,
    max_batches: int | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Run the data through a prepared model once, so that its observers see the activations.

    Under ``torch.distributed`` every process calls it with its share of the data, which may be
    empty, and all end with the ranges of one process that saw everything.

    Args:
        model: what ``prepare(..., mode="static")`` returned; its observers are filled in place.
        data: a DataLoader; any iterable or one-shot generator of Tensor, tuple, list, mapping or
            dataclass batches; one Tensor or mapping by itself, which is *one* batch; or a function
            ``f(model)`` that runs the model. Tensors on another device than the model are moved
            to it. NumPy arrays are refused: they are float64 by default, which no model takes.
        transform: turns what ``data`` yields into a batch, such as ``lambda b: b[0]``.
        max_batches: stop after so many; none is drawn beyond them.
        progress: called as ``progress(done, total)`` after each batch, ``total`` ``None`` where
            it is not known.

    Raises:
        CalibrationError: no batch, a batch ``forward`` cannot take, a batch the model fails on,
            NaN or infinity (names the site and the batch), or a model without observers.
        ConfigError: an option that cannot work.

    Example:
        >>> from fxquant.numerics.observers import make_observer
        >>> from fxquant.spec import QSpec
        >>> model = nn.Sequential(make_observer(QSpec(), "input"))
        >>> labelled = [(torch.randn(8, 3), torch.zeros(8)) for _ in range(4)]
        >>> result = calibrate(model, labelled, transform=lambda b: b[0])
        >>> result.batches, result.samples, result.unseen
        (4, 32, ())
    """
    observers = _observers(model)
    check_options(data, transform, max_batches)
    if progress is not None and not callable(progress):
        raise ConfigError(
            f"progress is a {type(progress).__name__}: pass a function f(done, total) or None"
        )
    started = time.perf_counter()

    def run() -> Counted:
        if is_function(data):
            return _run_function(model, data, progress), None
        return _feed(model, data, transform, max_batches, progress)

    with _calibrating(model, observers):
        batches, samples = watched_together(model, run)
    fakes = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    watchers: list[Observer | FakeQuantize] = [*observers, *fakes]
    if watchers and not any(watcher.seen for watcher in watchers):
        raise CalibrationError(
            f"{batches} batch{'es' * (batches != 1)} ran and no value reached any of the "
            f"{len(watchers)} observers: are the batches empty (a dimension of size 0)?"
        )
    # A site that turned out to carry integers was reached; it is no candidate for int8.
    unseen = tuple(each.path for each in watchers if each.floating and not each.seen)
    _warn_unseen(unseen, len(watchers))
    return CalibrationResult(batches, samples, time.perf_counter() - started, unseen)


def _feed(
    model: nn.Module,
    data: Any,
    transform: Transform | None,
    max_batches: int | None,
    progress: Progress | None,
) -> Counted:
    """Draw, bind and run each batch; return how many batches and samples there were."""
    batches = as_batches(data)
    total = length(batches)
    if total is not None and max_batches is not None:
        total = min(total, max_batches)
    iterator, device = iter(batches), device_of(model)
    done, samples = 0, _Samples()
    while max_batches is None or done < max_batches:
        try:
            batch = next(iterator)
        except StopIteration:
            break
        batch = transformed(transform, batch, done)
        args, kwargs = moved(bind_batch(model, batch, done), device)
        samples.add((args, kwargs))
        _run(model, args, kwargs, done)
        # The batch has to be gone before the next one is drawn, or two are in memory at a time.
        del batch, args, kwargs
        done += 1
        if progress is not None:
            progress(done, total)
    if not done and not is_distributed():
        refuse_empty(data)
    return done, samples.total


class _Samples:
    """Counts samples until a batch turns up that does not show how many it holds."""

    def __init__(self) -> None:
        self.total: int | None = 0

    def add(self, batch: Batch) -> None:
        first = next(tensors(batch))
        known = self.total is not None and first.dim() > 0
        self.total = (self.total or 0) + len(first) if known else None


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
    """One forward, its output dropped; an error says which batch and what was in it."""
    try:
        with torch.no_grad():
            # Not model(...): a GraphModule's own __call__ prints to stderr and cuts the traceback.
            nn.Module.__call__(model, *args, **kwargs)
    except NonFiniteError as error:
        in_batch = sum(int((~torch.isfinite(t)).sum()) for t in tensors((args, kwargs)))
        raise CalibrationError(_nonfinite(error, index, in_batch)) from error
    except FxQuantError:
        raise
    except USER_FAILURES as error:
        fed = describe(kwargs if kwargs else args[0] if len(args) == 1 else args)
        raise CalibrationError(
            f"the model failed on batch {index}, {fed}: {type(error).__name__}: {error}. "
            "Check that shape and dtype are those the model is made for; transform= can change "
            "a batch before it is fed"
        ) from error


def _run_function(model: nn.Module, function: Any, progress: Progress | None) -> int:
    """Let the user's function run the model; return how many times it did."""
    calls = 0

    def count(_module: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal calls
        calls += 1
        if progress is not None:
            progress(calls, None)

    handle = model.register_forward_hook(count)
    try:
        with torch.no_grad():
            function(model)
    except NonFiniteError as error:
        raise CalibrationError(_nonfinite(error, calls, None)) from error
    finally:
        handle.remove()
    if not calls and not is_distributed():
        raise CalibrationError(
            "0 batches: the calibration function returned without running the model it was given. "
            "Call model(...) in it; if it is a generator function, pass what it returns"
        )
    return calls


@contextmanager
def _calibrating(model: nn.Module, observers: list[Observer]) -> Generator[None]:
    """Observers on; at the end, or on failure, all else is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    grad = torch.is_grad_enabled()
    # Data is drawn in the caller's grad mode (a generator may optimise its batches), never in
    # inference mode: what observers keep would be inference tensors, which nothing can update.
    with (
        random_kept(model),
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        state_kept(model),
    ):
        fakes = [m for m in model.modules() if isinstance(m, FakeQuantize)]
        try:
            # A model that is to be trained is watched as it is: not trained, in float.
            if fakes:
                model.eval()
            for observer in observers:
                observer.enabled = True
            for fake in fakes:
                fake.calibrating = True
            yield
        finally:
            for observer in observers:
                observer.enabled = False
            for fake in fakes:
                fake.calibrating = False
            for module, training in modes:
                module.training = training


def _observers(model: nn.Module) -> list[Observer]:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model is a {type(model).__name__}, not an nn.Module: call calibrate(model, data)"
        )
    observers = [module for module in model.modules() if isinstance(module, Observer)]
    # Without an observer shapes may still be recorded: reports count work.
    if not any(getattr(module, "is_observer", False) for module in model.modules()):
        raise CalibrationError(
            f"this {type(model).__name__} has no observer, so calibration would record nothing: "
            "either it does not come from prepare(model, mode='static'), or none of its ops is "
            "to become int8 (look at overrides and qconfig)"
        )
    return observers


def _nonfinite(error: NonFiniteError, index: int, in_batch: int | None) -> str:
    where = ""
    if in_batch is not None:
        where = (
            f" The batch itself holds {in_batch} such values: clean the data."
            if in_batch
            else " The batch itself is finite, the model makes them: look for a log(0), a "
            "division by 0 or an overflow."
        )
    return (
        f"{error.nan} NaN and {error.inf} infinite values reached the observer at {error.path!r} "
        f"in batch {index}: no range can be chosen from them.{where}"
    )


def _warn_unseen(unseen: tuple[str, ...], observers: int) -> None:
    if not unseen:
        return
    more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
    warn_user(
        f"calibration never reached {len(unseen)} of {observers} sites, which stay float: "
        f"{', '.join(unseen[:5])}{more}. Add data that takes those paths through the model",
        CalibrationWarning,
    )
