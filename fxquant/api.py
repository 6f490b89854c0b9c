"""The public calls: quantize is prepare, calibrate, convert."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxquant import calibration as feeding
from fxquant.arguments import (
    Examples,
    Overrides,
    check_float_dtypes,
    check_floats,
    check_mode,
    check_model,
    check_share,
    no_ranges,
    on_device_of,
    resolve_overrides,
    split_example,
    tensor_example,
)
from fxquant.backends.base import Availability
from fxquant.building import Wishes, build, let_run, lower
from fxquant.calibration.example import run_example
from fxquant.collector import collector_paused
from fxquant.custom.collect import Patterns, rules_of
from fxquant.errors import (
    ConfigError,
    FxQuantWarning,
    warn_user,
)
from fxquant.graph.held_state import random_kept
from fxquant.graph.settle import unwrapped
from fxquant.graph.user_class import UserModule, with_user_class, with_user_class_of
from fxquant.numerics.fake_quantizer import FakeQuantize
from fxquant.numerics.observers import Observer
from fxquant.progress import Progress, check_progress, showing
from fxquant.recipes import (
    available_backends,
    resolve_backend,
)
from fxquant.record import record_of
from fxquant.report.checks import check_coverage, check_half, check_speed
from fxquant.report.speed import in_order
from fxquant.spec import Mode, QConfig, resolve_qconfig
from fxquant.synthesis import synthesize
from fxquant.trainable import (
    build_from_copy,
    build_trainable,
    check_calibrated,
    check_trained,
    origin_of,
    start_from,
)

_MODES: Final = ("static", "dynamic", "qat", "weight_only", "bfloat16", "float16")
_NEED_DATA: Final = ("static",)
"""Modes that find the ranges of activations on data."""
P = ParamSpec("P")
R = TypeVar("R")


def _apart(function: Callable[P, R]) -> Callable[P, R]:
    """Inference mode would freeze what is made; a default device of another kind misplaces it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), on_device_of((*args, *kwargs.values())):
            return function(*args, **kwargs)

    return call


@_apart
def quantize(  # noqa: PLR0913 - the one call has every option as a keyword
    model: nn.Module,
    calibration: Any = None,
    *,
    mode: Mode = "static",
    example_inputs: Examples | None = None,
    qconfig: QConfig | str | None = None,
    overrides: Overrides | None = None,
    patterns: Patterns = (),
    backend: str = "auto",
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    min_coverage: float | None = None,
    train: Callable[[nn.Module], object] | None = None,
    progress: Progress = None,
    strict: bool = False,
) -> UserModule:
    """Return an int8 version of ``model``; ``model`` itself is never changed.

    Args:
        model: a float32 model.
        calibration: what it will be fed in use, a few hundred samples: a DataLoader, an iterable
            or generator of batches, or a function that runs the model. Without it, inputs are
            synthesised from BatchNorm statistics, with a warning.
        mode: ``"static"``: weights and activations in int8, ranges fixed by calibration;
            ``"dynamic"``: int8 weights, activations quantized row by row at run time, no data;
            ``"qat"``: as static, trained by ``train`` with its rounding errors;
            ``"weight_only"``: linears and embeddings keep their weights in 8 bits (or 4, with
            ``qconfig="weight-only-int4"``) and compute in float, no data;
            ``"bfloat16"`` and ``"float16"``: layers and products in 16 bits, the rest in float32,
            no data.
        example_inputs: one batch, used for shapes; by default the first calibration batch.
        qconfig: the default configuration or the name of a preset.
        overrides: selector to configuration; ``None`` leaves the op in float. The last match wins.
        patterns: fusion patterns of your own: :class:`fxquant.Pattern` objects, in any iterable.
        backend: ``"auto"``, ``"x86"``, ``"cuda"`` or ``"reference"``.
        transform: turns an item of ``calibration`` into what the model is fed.
        max_batches: how many batches to use.
        min_coverage: the least share of ops that must be int8, 0 to 1.
        train: for mode ``"qat"``: a function that trains the model it is given, in place.
        progress: ``None`` shows calibration of more than two seconds where stderr is a terminal,
            ``True`` always, ``False`` never; a function is called with the number of batches
            done and the total, if known.
        strict: raise where a module would have to stay your own code, with its parts quantized.

    Raises:
        ConfigError: an argument cannot be used; before any work starts.
        TraceError: the model cannot be captured.
        CalibrationError: the data is missing, malformed or not finite.
        LoweringError: nothing became int8, or less than ``min_coverage``.

    Example:
        >>> import torch, fxquant
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> q = fxquant.quantize(net, [torch.randn(4, 3, 8, 8)], backend="reference")
        >>> q(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
    """
    resolve_backend(backend)
    check_share(min_coverage)
    check_progress(progress)
    check_mode(mode, _MODES)
    # The prepared model lives no longer than this call: it need not own a copy of the weights.
    wishes = replace(_wishes(mode, qconfig, overrides, patterns, strict), borrow=True)
    _check_train(mode, train)
    model = unwrapped(model)
    check_model(model)
    feed = _Feed(calibration, transform, max_batches, progress)
    with random_kept(model):
        prepared = _prepare_and_calibrate(model, example_inputs, wishes, feed, backend)
        if train is not None:
            prepared.train()
            train(prepared)
        return convert(prepared, backend=backend, min_coverage=min_coverage)


@dataclass(frozen=True)
class _Feed:
    """Calibration data and how it is fed: what :func:`calibrate` takes."""

    data: Any
    transform: Callable[[Any], Any] | None
    max_batches: int | None
    progress: Progress


def _prepare_and_calibrate(
    model: nn.Module,
    example_inputs: Examples | None,
    wishes: Wishes,
    feed: _Feed,
    backend: str,
) -> GraphModule:
    data, transform = feed.data, feed.transform
    if data is None and wishes.mode in _NEED_DATA:
        data, transform = synthesize(model, tensor_example(example_inputs)), None
    args, kwargs = split_example(example_inputs)
    if example_inputs is None and data is not None:
        first = feeding.first_of_all(data, transform, model)
        args, kwargs, data, transform = first.args or (), first.kwargs, first.replay, None
    prepared = _prepare(model, args, kwargs, wishes, backend)
    if wishes.mode == "qat" and data is None:
        return prepared
    watched = [m.path for m in prepared.modules() if isinstance(m, Observer | FakeQuantize)]
    if data is not None and (watched or wishes.mode in _NEED_DATA):
        calibrate(
            prepared,
            data,
            transform=transform,
            max_batches=feed.max_batches,
            progress=feed.progress,
        )
    elif watched:
        raise no_ranges(wishes.qconfig, wishes.mode, watched[0])
    elif feed.data is not None:
        warn_user(
            f"mode {wishes.mode!r} needs no calibration data: what was passed is used as an "
            "example of the inputs only",
            FxQuantWarning,
        )
    if not watched and (args or kwargs):
        _see_shapes(prepared, args, kwargs)
    return prepared


def _see_shapes(prepared: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the example once, for the shapes that reports count work with, and keep it to time."""
    run_example(prepared, args, kwargs)
    record = record_of(prepared)
    if record.mode == "dynamic":
        # Copies: a model may write into what it is fed, and is fed it several times.
        own = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        record.inputs = in_order(prepared, *own)


@_apart
def prepare(
    model: nn.Module,
    *,
    mode: Mode = "static",
    example_inputs: Examples | None = None,
    qconfig: QConfig | str | None = None,
    overrides: Overrides | None = None,
    patterns: Patterns = (),
    backend: str = "auto",
    strict: bool = False,
) -> GraphModule:
    """Return a copy of ``model`` as a graph with fused ops and observers, ready to calibrate.

    Args:
        model: a float32 model; or, in mode ``"qat"``, what :func:`prepare` made of one in mode
            ``"static"`` and :func:`calibrate` has filled: a copy of the float model it was made
            from is prepared for training, with the ranges that were found, and with the arguments
            below as they were given there, where they are not given here.
        mode: ``"static"``, ``"dynamic"``, ``"weight_only"``, or ``"qat"``: then ops are
            fake-quantized and the copy is to be trained; parameters keep the names and the order
            they have, and the copy stays in the mode that ``model`` is in.
        example_inputs: one batch; lets rules see shapes (linear + batch norm needs it).
        qconfig: the default configuration or the name of a preset.
        overrides: selector to configuration; ``None`` leaves the op in float.
        patterns: fusion patterns of your own: :class:`fxquant.Pattern` objects, in any iterable.
        backend: checked now, so that a wrong name fails before calibration.
        strict: raise where a module would have to stay your own code, with its parts quantized.

    Raises:
        ConfigError: an argument cannot be used.
        TraceError: the model cannot be captured.
        CalibrationError: it is one that was prepared in static mode and not calibrated.
    """
    resolve_backend(backend)
    check_mode(mode, _MODES)
    wishes = _wishes(mode, qconfig, overrides, patterns, strict)
    args, kwargs = split_example(example_inputs)
    model = unwrapped(model)
    origin = origin_of(model) if mode == "qat" else None
    if origin is None:
        return _prepare(model, args, kwargs, wishes, backend)
    given = {"qconfig": qconfig, "overrides": overrides, "patterns": patterns or None}
    kept = [name for name, value in given.items() if value is None]
    wishes = replace(wishes, **{name: getattr(origin.wishes, name) for name in kept})
    if example_inputs is None:
        args, kwargs = origin.args, origin.kwargs
    made = _prepare(origin.model, args, kwargs, wishes, backend)
    start_from(made, model)  # type: ignore[arg-type]  # what has an origin is a graph module
    return made


@_apart
def calibrate(
    prepared: nn.Module,
    data: Any,
    *,
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    progress: Progress = None,
) -> None:
    """Let the observers of a prepared model see ``data``, in one pass.

    Under ``torch.distributed`` every process calls it with its own share, which may be empty, and
    all end with the ranges of one process that saw everything.

    Args:
        prepared: what :func:`prepare` returned.
        data: a DataLoader, an iterable or generator of batches, or a function of the model.
        transform: turns an item of ``data`` into what the model is fed.
        max_batches: how many batches to use.
        progress: ``None`` shows calibration of more than two seconds where stderr is a terminal,
            ``True`` always, ``False`` never; a function is called with the number of batches
            done and the total, if known.

    Raises:
        CalibrationError: no batch, a batch that does not fit, NaN or infinity.
    """
    record_of(prepared)
    with showing(progress, "calibrating") as report:
        feeding.calibrate(
            prepared, data, transform=transform, max_batches=max_batches, progress=report
        )


@_apart
def convert(
    prepared: nn.Module, *, backend: str = "auto", min_coverage: float | None = None
) -> UserModule:
    """Return the int8 model of a calibrated one; ``prepared`` is left as it is.

    Args:
        prepared: what :func:`prepare` returned, after :func:`calibrate`.
        backend: ``"auto"``, ``"x86"``, ``"cuda"`` or ``"reference"``.
        min_coverage: the least share of ops that must be int8, 0 to 1.

    Raises:
        ConfigError: ``prepared`` was not made by :func:`prepare`, or the backend cannot run.
        CalibrationError: it was not calibrated.
        LoweringError: nothing became int8, or less than ``min_coverage``.
    """
    resolve_backend(backend)
    check_share(min_coverage)
    prepared = unwrapped(prepared)
    record = record_of(prepared)
    if not isinstance(prepared, GraphModule) or record.backend:
        raise ConfigError("this model is converted already: pass what prepare() returned")
    chosen = resolve_backend(backend, prepared, record.mode)
    check_calibrated(prepared, "convert")
    if record.mode == "qat":
        check_trained(prepared)
    # What is computed from weights is kept in buffers, and those with a history cannot be copied.
    with torch.no_grad(), collector_paused():
        converted = with_user_class_of(lower(prepared, chosen), prepared)
        converted.seal(chosen.name, chosen.cpu_only)
        made = record_of(converted)
        check_coverage(made, min_coverage)
        check_half(made, converted)
        check_speed(prepared, converted, made)
        let_run(converted, chosen)
    return converted


def backends() -> tuple[Availability, ...]:
    """List the backends: what can run here, and why the others cannot.

    Example:
        >>> [b.name for b in backends() if b.name == "reference"]
        ['reference']
    """
    return available_backends()


def _wishes(
    mode: Mode,
    qconfig: QConfig | str | None,
    overrides: Overrides | None,
    patterns: Patterns,
    strict: bool,
) -> Wishes:
    """What the user asked for, checked."""
    default, others = resolve_qconfig(qconfig, mode), resolve_overrides(overrides)
    check_float_dtypes(default, *(config for _, config in others))
    return Wishes(default, others, rules_of(patterns), strict, mode)


def _check_train(mode: Mode, train: object) -> None:
    if mode == "qat" and train is None:
        raise ConfigError(
            "mode 'qat' trains the model, and quantize() does not know how: pass train=, a "
            "function that trains the model it is given; or call fxquant.prepare(model, "
            "mode='qat'), train what that returns in your own loop, and call fxquant.convert"
        )
    if train is not None and (mode != "qat" or not callable(train)):
        raise ConfigError(
            f"train is a {type(train).__name__} with mode {mode!r}: it is a function of the "
            "prepared model, and for mode 'qat' only"
        )


def _prepare(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wishes: Wishes,
    backend: str,
) -> GraphModule:
    check_model(model)
    check_floats(model, args, kwargs)
    if wishes.mode == "qat":
        with random_kept(model), collector_paused():
            return build_trainable(model, args, kwargs, wishes, resolve_backend(backend))
    if model.training:
        warn_user(
            "the model is in training mode; its copy is put in eval mode for quantization",
            FxQuantWarning,
        )
    make = build_from_copy if wishes.mode == "static" and not wishes.borrow else build
    with random_kept(model), collector_paused():
        return with_user_class(make(model, args, kwargs, wishes), model)
