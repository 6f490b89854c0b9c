"""Which shape a model's input has, from an example or by trying."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError
from fxquant.synthesis.statistics import NORMS

# Ordered: what accepts any size takes the first. A list, because fixed sizes have no formula.
_SIDES: Final[dict[int, tuple[int, ...]]] = {
    1: (1024, 512, 256, 128, 64, 32, 16, 8, 2048, 4096, 8192, 16000),
    2: (224, 32, 28, 64, 96, 128, 256, 16, 8, 48, 112, 160, 192, 240, 299, 384, 512, 40, 24, 20),
    3: (16, 32, 64, 8, 112),
}
# A transposed convolution starts from little and grows it.
_SEEDS: Final = (1, 4, 8, 7, 16, 32)
_CONVS: Final = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSED: Final = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_NORM_DIMS: Final = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
_TOKENS: Final = 16
_PHOTO, _THUMBNAIL, _PHOTO_STRIDE = 224, 32, 16
_FIRST_LAYERS: Final = 4
_REFUSALS: Final = (RuntimeError, TypeError, ValueError, LookupError, AssertionError)

_PASS_EXAMPLE: Final = "pass example_inputs=(tensor,) of the right shape, or calibration data"


def input_shape(model: nn.Module, example_inputs: Any, probe: Tensor) -> tuple[int, ...]:
    """The shape of one sample, without the batch dimension.

    Args:
        model: in eval; it is run on zeros where there is no example.
        example_inputs: one float tensor [batch, ...], alone or in a tuple or list; or ``None``.
        probe: any tensor of the dtype and on the device the model takes.

    Raises:
        CalibrationError: integer inputs, several inputs, or no shape that works was found.
    """
    if example_inputs is not None:
        return _from_example(example_inputs)
    _refuse_several(model)
    for layer in _first_layers(model):
        for shape in _candidates(layer):
            stride = _try(model, shape, probe)
            if stride is not None:
                return _smaller(model, shape, stride, probe)
    raise CalibrationError(
        f"the input shape of this {type(model).__name__} could not be found: no usual size went "
        f"through it. {_PASS_EXAMPLE}"
    )


def _from_example(example: Any) -> tuple[int, ...]:
    items = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    if len(items) != 1 or not isinstance(items[0], Tensor):
        kinds = ", ".join(type(item).__name__ for item in items)
        raise CalibrationError(
            f"inputs can be made up for one tensor only, and example_inputs holds ({kinds}): "
            "pass calibration data"
        )
    (tensor,) = items
    if not tensor.is_floating_point():
        raise CalibrationError(
            f"inputs can be made up for float tensors only, and example_inputs is {tensor.dtype}: "
            "which integers make sense no statistic tells. Pass calibration data"
        )
    if tensor.dim() < 2 or 0 in tensor.shape[1:]:
        raise CalibrationError(
            f"example_inputs has shape {list(tensor.shape)}: it must be [batch, ...] and not empty"
        )
    return tuple(tensor.shape[1:])


def _refuse_several(model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters.values()
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in starred]
    if len(needed) > 1:
        raise CalibrationError(
            f"forward needs {len(needed)} inputs ({', '.join(needed)}) and inputs can be made up "
            "for one tensor only: pass calibration data"
        )


def _first_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that may see the input, in the order they were written."""
    kinds = (*_CONVS, *_TRANSPOSED, *_NORM_DIMS, nn.Linear, nn.Embedding, nn.EmbeddingBag)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    if layers and isinstance(layers[0], (nn.Embedding, nn.EmbeddingBag)):
        raise CalibrationError(
            f"this {type(model).__name__} takes integers (its first layer is a "
            f"{type(layers[0]).__name__}), and which make sense no statistic tells: pass "
            "calibration data"
        )
    return layers[:_FIRST_LAYERS]


def _candidates(layer: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(layer, nn.Linear):
        yield (layer.in_features,)
        yield (_TOKENS, layer.in_features)
    for kinds, channels in ((_CONVS, "in_channels"), (_TRANSPOSED, "in_channels")):
        for kind, dims in kinds.items():
            if isinstance(layer, kind):
                sides = _SEEDS if kinds is _TRANSPOSED else _SIDES[dims]
                yield from ((getattr(layer, channels), *[side] * dims) for side in sides)
    for norm, dims in _NORM_DIMS.items():
        if isinstance(layer, norm):
            if dims == 1:
                yield (layer.num_features,)
            yield from ((layer.num_features, *[side] * dims) for side in _SIDES[dims])


def _try(model: nn.Module, shape: tuple[int, ...], probe: Tensor) -> int | None:
    """The total stride if an input of this shape goes through and meets a BatchNorm, or None."""
    sides: list[int] = []
    reached = False

    def look(_norm: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal reached
        reached = True
        # Pooled to 1, as by squeeze-and-excitation, a side says nothing about strides.
        if args[0].dim() == len(shape) + 1 and args[0].shape[-1] > 1:
            sides.append(args[0].shape[-1])

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, NORMS)]
    try:
        with torch.no_grad():
            nn.Module.__call__(model, probe.new_zeros(2, *shape))
    except _REFUSALS:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return shape[-1] // min(sides, default=shape[-1]) if reached else None


def _smaller(
    model: nn.Module, shape: tuple[int, ...], stride: int, probe: Tensor
) -> tuple[int, ...]:
    """Take 32 for a model that takes 224 too but shrinks it little: it was made for thumbnails."""
    if shape[1:] != (_PHOTO, _PHOTO) or stride >= _PHOTO_STRIDE:
        return shape
    thumbnail = (shape[0], _THUMBNAIL, _THUMBNAIL)
    return shape if _try(model, thumbnail, probe) is None else thumbnail
