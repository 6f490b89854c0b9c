"""Capture by ``torch.export``: the graph in the shape that symbolic tracing gives.

The exported program itself is made here; :mod:`fxquant.graph.export_rebuild` writes its graph anew.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxquant.errors import TraceError
from fxquant.graph.export_rebuild import Rebuild
from fxquant.lazy import lazy_module

if TYPE_CHECKING:
    from torch import export as exporting
    from torch.export import ExportedProgram
else:
    exporting = lazy_module("torch.export")

_SYMBOLIC_SHAPES: Final[Any] = lazy_module("torch.fx.experimental._config")


def export_graph(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """Turn ``model`` into a graph module by ``torch.export``, with every size dynamic it can keep.

    Args:
        model: a copy that may be used up: the result takes over its modules, without their hooks,
            which are part of the graph.
        args: positional example inputs.
        kwargs: keyword example inputs.

    Raises:
        TraceError: the model cannot be exported, or uses what a graph of tensors cannot hold; the
            message holds the reason.

    Example:
        >>> graph = export_graph(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.ones(1, 2),), {})
        >>> tuple(graph(torch.ones(3, 2)).shape)
        (3, 2)
    """
    try:
        given = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise TraceError(f"torch.export needs example inputs that fit forward: {error}") from error
    return Rebuild(model, _export(model, args, kwargs, given)).run()


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]
) -> ExportedProgram:
    sizes = {name: pytree.tree_map(_any_size, value) for name, value in given.items()}
    with _settings(model.training):
        try:
            return exporting.export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
        # Anything may go wrong inside a user's forward that is fed tensors without values; all of
        # it means the same: this model cannot be exported.
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} cannot be exported: {_first_lines(error)}"
            ) from error


def _any_size(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, torch.Tensor):
        return None
    return dict.fromkeys(range(value.dim()), exporting.Dim.AUTO)


@contextlib.contextmanager
def _settings(training: bool) -> Iterator[None]:
    """A batch of one in the example says nothing about other batches; fused attention is opaque."""
    fast = torch.backends.mha.get_fastpath_enabled()
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        _SYMBOLIC_SHAPES.patch(backed_size_oblivious=True),
        torch.set_grad_enabled(training),
    ):
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    where = f" (at {places[-1][0]}:{places[-1][1]})" if places else ""
    return " ".join(lines[:2]) + where if lines else type(error).__name__
