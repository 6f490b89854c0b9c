"""What is said where a model fails on the example inputs that it was given."""

from __future__ import annotations

import linecache
import re
import traceback
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.calibration.binding import describe
from fxquant.calibration.data import USER_FAILURES
from fxquant.errors import ConfigError, FxQuantError
from fxquant.graph.held_state import state_kept
from fxquant.graph.info import info


def run_example(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a captured model once, without gradients; what it keeps is put back.

    Args:
        module: the model.
        args: what it is fed by position.
        kwargs: what it is fed by name.

    Raises:
        ConfigError: it fails on that.
    """
    with torch.no_grad(), state_kept(module):
        try:
            # Not module(...): a GraphModule's own __call__ prints to stderr.
            nn.Module.__call__(module, *args, **kwargs)
        except USER_FAILURES as error:
            raise refused_example(module, args, kwargs, error) from error


def refused_example(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> FxQuantError:
    """The error to raise: what was fed, which op failed on it and why, and what to pass.

    Args:
        module: a captured model, which failed.
        args: what it was fed by position.
        kwargs: what it was fed by name.
        error: what it failed with; one of fxquant's own says all this already.
    """
    if isinstance(error, FxQuantError):
        return error
    fed = describe(kwargs if kwargs else args[0] if len(args) == 1 else args)
    # An interpreter adds where it was in the graph.
    why = str(error).partition("While executing")[0].strip()
    return ConfigError(
        f"the model fails on its example inputs, {fed}{_place(module, error)}: "
        f"{type(error).__name__}: {why}. Pass one batch of the shape and dtype that the model is "
        "made for: a tensor, a tuple of all arguments, or a dict of arguments by name"
    )


def _place(module: nn.Module, error: Exception) -> str:
    """The op that failed, if it is one of a graph's."""
    name = _name(error)
    graphs = [each.graph for each in module.modules() if isinstance(each, GraphModule)]
    records = [info(node) for graph in graphs for node in graph.nodes if node.name == name]
    known = next((record for record in records if record.path), None)
    if known is None:
        return ""
    return f", at {known.path} ({known.source})" if known.source else f", at {known.path}"


def _name(error: Exception) -> str:
    """The name of the node: what an interpreter says, or that line of a graph's code."""
    said = re.search(r"While executing %(\w+)", str(error))
    if said is not None:
        return said.group(1)
    for entry in reversed(traceback.extract_tb(error.__traceback__)):
        if entry.filename.startswith("<eval_with_key>"):
            line = linecache.getline(entry.filename, entry.lineno or 0)
            return line.strip().partition(" = ")[0].partition(":")[0]
    return ""
