"""torch's FX graph mode quantization: the peer to beat. Deprecated, and used nowhere else here."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.ao.quantization import (
        get_default_qat_qconfig_mapping,
        get_default_qconfig_mapping,
        quantize_dynamic,
    )
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

ENGINES = ("x86", "fbgemm", "onednn")


def engines() -> tuple[str, ...]:
    """Those of :data:`ENGINES` that this build of torch supports."""
    return tuple(name for name in ENGINES if name in torch.backends.quantized.supported_engines)


def fx_static(model: nn.Module, data: Iterable[Tensor], engine: str) -> nn.Module:
    """Static int8 by torch's own means, in its default configuration for ``engine``.

    The engine is a setting of the whole process, at conversion and at every later call: a
    process that compares engines must not mix them.
    """
    torch.backends.quantized.engine = engine
    batches = list(data)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        mapping = get_default_qconfig_mapping(engine)
        prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, (batches[0],))
        for batch in batches:
            prepared(batch)
        converted: nn.Module = convert_fx(prepared)
    return converted


def fx_qat(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy prepared for quantization-aware training by torch's own means, in training mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = get_default_qat_qconfig_mapping("x86")
        made: nn.Module = prepare_qat_fx(copy.deepcopy(model).train(), mapping, (example,))
    return made


def dynamic_recurrent(model: nn.Module) -> nn.Module:
    """Recurrent layers dynamically quantized by torch's own means, with its fastest engine."""
    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = quantize_dynamic(model, {nn.LSTM, nn.GRU})
    return made


def dynamic_linears(model: nn.Module, engine: str) -> nn.Module:
    """Linears dynamically quantized by torch's own means; ``engine`` is as for static ones."""
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = quantize_dynamic(model, {nn.Linear})
    return made
