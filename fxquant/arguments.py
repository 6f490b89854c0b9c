"""Reads and checks what callers pass, before any work starts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fxquant.errors import CalibrationError, ConfigError
from fxquant.graph.settle import computes_a_weight
from fxquant.numerics.finite import all_finite
from fxquant.passes.configure import Selector
from fxquant.record import KEY
from fxquant.spec import QConfig, resolve_qconfig

Examples = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
# Mapping is invariant in its keys: with Selector, a dict of functions alone would be no Overrides.
Overrides = Mapping[Any, QConfig | str | None]


def ranks(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """How many dimensions each example input has."""
    names = list(inspect.signature(model.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    return {name: value.dim() for name, value in given.items() if isinstance(value, Tensor)}


def on_device_of(given: Iterable[Any]) -> AbstractContextManager[Any]:
    """What is made for a model on the processor is made there, whatever torch's default device is.

    Args:
        given: the arguments of a call, of which the first model counts.
    """
    if torch.get_default_device().type == "cpu":
        return nullcontext()
    model = next((value for value in given if isinstance(value, nn.Module)), None)
    tensors = () if model is None else (*model.parameters(), *model.buffers())
    here = model is not None and all(tensor.device.type == "cpu" for tensor in tensors)
    return torch.device("cpu") if here else nullcontext()


def check_model(model: nn.Module) -> None:
    """Refuse what is no float model with weights.

    Raises:
        ConfigError: says what to pass instead.
    """
    _check_kind(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ConfigError(f"{name} has no shape yet: run the model once before quantizing it")
        if tensor.device.type == "meta":
            raise ConfigError(f"{name} is on the meta device and has no values: load the weights")
    _check_own_calls(model)
    _check_dtype(model)
    for name, weight in model.named_parameters():
        if not all_finite(weight.detach()):
            raise ConfigError(
                f"{name} holds NaN or infinity, and so will every result: load other weights"
            )


def _check_kind(model: Any) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            "the model is a ScriptModule, whose Python code is gone: pass the nn.Module it was "
            "scripted from"
        )
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ConfigError(f"model is the class {model.__name__}: pass a module, {model.__name__}()")
    if type(model).__name__ == "ExportedProgram" or _is_exported(model):
        raise ConfigError("the model comes from torch.export: pass the nn.Module that was exported")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}: pass an nn.Module")
    if isinstance(model, GraphModule) and KEY in model.meta:
        raise ConfigError(
            "this model was made by fxquant: pass the float model it was made from (only what "
            "was prepared in mode 'static' and calibrated can go on, by prepare(..., mode='qat'))"
        )


def _is_exported(model: Any) -> bool:
    """What ``ExportedProgram.module()`` returns checks its inputs in a hook of torch's."""
    hooks = model._forward_pre_hooks.values() if isinstance(model, GraphModule) else ()
    homes = [str(getattr(hook, "__module__", "")) for hook in hooks]
    return any(home.startswith(("torch.export", "torch._export")) for home in homes)


def _check_own_calls(model: nn.Module) -> None:
    """What runs around ``forward`` of the whole model is seen by no capture of ``forward``."""
    name = type(model).__name__
    hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values())
    if any(not computes_a_weight(hook) for hook in hooks):
        raise ConfigError(
            f"{name} itself carries forward hooks, and a graph of its forward would lose them: "
            "remove them, or pass a module whose forward calls this one, such as "
            "nn.Sequential(model)"
        )
    if isinstance(model, GraphModule):
        return  # its class has a __call__ for better tracebacks
    for cls in type(model).__mro__:
        if cls is nn.Module:
            return
        if "__call__" in vars(cls):
            raise ConfigError(
                f"{name} defines __call__, and a graph of its forward would lose what that does: "
                "move it to forward, or pass a module that calls this one, such as "
                "nn.Sequential(model)"
            )


def _check_dtype(model: nn.Module) -> None:
    floats = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if not floats or any(p.dtype == torch.float32 for p in floats.values()):
        return
    name, first = next(iter(floats.items()))
    raise ConfigError(
        f"{name} is {first.dtype}, and int8 kernels are made from float32: pass "
        "copy.deepcopy(model).float(), and float32 inputs"
    )


def check_floats(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a model that computes on integers alone.

    Args:
        model: the model.
        args: positional example inputs; nothing is known of the inputs where there are none.
        kwargs: keyword example inputs.

    Raises:
        ConfigError: neither a weight nor an example input is floating point.
    """
    held = (*model.parameters(), *model.buffers())
    given = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    if given and not any(t.is_floating_point() or t.is_complex() for t in (*held, *given)):
        raise ConfigError(
            f"{type(model).__name__} computes on no floating-point tensors: neither its weights "
            "nor its inputs are float, and there is nothing to quantize"
        )


def check_mode(mode: str, allowed: tuple[str, ...]) -> None:
    """Refuse a mode that is not among ``allowed``.

    Raises:
        ConfigError: it is not.
    """
    if mode not in allowed:
        raise ConfigError(f"mode is {mode!r}: this version of fxquant has {list(allowed)}")


def check_float_dtypes(*configs: QConfig | None) -> None:
    """Refuse float dtypes that no op would get: better than float32 without a word.

    Raises:
        ConfigError: 16 bits beside a weight that is only stored.
    """
    for config in configs:
        if config is None or config.float_dtype == "float32":
            continue
        if config.scheme == "weight_only":
            raise ConfigError(
                f"float_dtype={config.float_dtype!r} beside a weight that is only stored as "
                "integers is not there: leave it out, or give single ops "
                f"overrides={{...: {config.float_dtype!r}}}"
            )


def check_share(share: float | None) -> None:
    """Refuse a share outside 0 to 1.

    Raises:
        ConfigError: it is outside.
    """
    if share is None:
        return
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not number or not 0.0 <= share <= 1.0:
        raise ConfigError(f"min_coverage is {share!r}: it must lie between 0 and 1")


def resolve_overrides(
    overrides: Overrides | None,
) -> tuple[tuple[Selector, QConfig | None], ...]:
    """Overrides in the user's order, with presets looked up.

    Raises:
        ConfigError: they are no dict, or name no preset.
    """
    if overrides is None:
        return ()
    if not isinstance(overrides, Mapping):
        raise ConfigError("overrides must be a dict of selector to QConfig or None")
    return tuple(
        (selector, None if config is None else resolve_qconfig(config))
        for selector, config in overrides.items()
    )


def split_example(example: Examples | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments; a dataclass gives its fields by name."""
    if example is None:
        return (), {}
    given: Any = example
    if dataclasses.is_dataclass(given) and not isinstance(given, type | Mapping):
        return (), {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, PackedSequence):
        return (example,), {}  # a tuple by name only
    if isinstance(example, tuple | list):
        return tuple(example), {}
    return (example,), {}


def tensor_example(example: Examples | None) -> tuple[Any, ...] | None:
    """Example inputs as one tuple, or ``None`` where there are none."""
    args, kwargs = split_example(example)
    return (*args, *kwargs.values()) or None


def no_ranges(qconfig: QConfig, mode: str, place: str) -> CalibrationError:
    """The error for ops that need ranges, in a mode that finds none.

    Args:
        qconfig: the default configuration.
        mode: the mode.
        place: where a range is needed.
    """
    asked = f"asks for ranges known beforehand, of {place or 'the input'} for one, and mode"
    if qconfig.scheme == "static":
        return CalibrationError(
            f"this qconfig {asked} {mode!r} brings none: leave qconfig out for the one that goes "
            "with the mode, or pass mode='static' and calibration data"
        )
    return CalibrationError(
        f"an override {asked} {mode!r} brings none: pass calibration data as the second argument"
    )
