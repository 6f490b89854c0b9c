"""Models: made by the user's code, or read from a file the user trusts."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import zipfile
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import nn

from fxquant.cli.code import call, imported
from fxquant.errors import LoadError

_FILES: Final = (".pt", ".pth", ".pt2", ".bin", ".pkl", ".ckpt", ".safetensors", ".onnx")
_MOST: Final = 6
_UNREADABLE: Final = (
    RuntimeError, ValueError, KeyError, IndexError, EOFError, AttributeError, ImportError,
    TypeError, pickle.UnpicklingError, zipfile.BadZipFile, UnicodeDecodeError,
)  # fmt: skip
"""What reading something that is no checkpoint raises."""


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The options of reading models."""
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="open model files that are pickles, which can run any code they bring",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="load a state dict into the (float) model: .safetensors, or .pt read without code",
    )


def load_model(
    spec: str, arguments: argparse.Namespace, *, weights: str | None = None
) -> nn.Module:
    """The model that ``package.module:factory`` or a file names.

    Args:
        spec: user code (a factory, a class or a module itself) or a file of ``torch.save``.
        arguments: with ``trust_pickle`` and ``seed``; each model starts from the seed, so that two
            commands, or one with two models, make the same random weights.
        weights: a state dict to load into it.

    Raises:
        LoadError: there is none, or it cannot be read.
    """
    torch.manual_seed(arguments.seed)
    random.seed(arguments.seed)
    if os.path.exists(spec) or spec.endswith(_FILES):
        model = _from_file(spec, arguments.trust_pickle)
    elif ":" in spec:
        model = _from_code(spec)
    else:
        raise LoadError(
            f"the model {spec!r} is neither a file nor package.module:factory, such as "
            "mymodels:build for build() in mymodels.py"
        )
    if weights is not None:
        _load_weights(model, weights)
    return model


def _from_code(spec: str) -> nn.Module:
    found = imported(spec, LoadError, "the model")
    if not isinstance(found, nn.Module) and callable(found):
        found = call(found, f"make a model by {spec}()", LoadError)
    if not isinstance(found, nn.Module):
        raise LoadError(
            f"the model {spec!r} is a {type(found).__name__}: name an nn.Module, or a function or "
            "class that gives one when it is called without arguments"
        )
    return found


def _from_file(path: str, trust: bool) -> nn.Module:
    if not os.path.isfile(path):
        raise LoadError(f"there is no model file {path!r}")
    if path.endswith(".safetensors"):
        raise LoadError(
            f"{path!r} holds weights and no model: pass package.module:factory, and this file as "
            "--weights"
        )
    if path.endswith((".pt2", ".onnx")):
        raise LoadError(
            f"{path!r} cannot be read: pass package.module:factory, or a module that torch.save "
            "wrote"
        )
    if not trust:
        raise LoadError(
            f"{path!r} is a pickle, and opening it runs whatever code it brings"
            f"{_brings(path)}. If you trust who made it, pass --trust-pickle"
        )
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=False)
    except _UNREADABLE as error:
        raise LoadError(f"{path!r} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise LoadError(
            f"{path!r} holds a {type(found).__name__} and no nn.Module: for a state dict pass "
            "package.module:factory, and the file as --weights"
        )
    return found


def _brings(path: str) -> str:
    """What a checkpoint wants to import, read without running it."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except _UNREADABLE:
        return ""
    if not names:
        return ""
    # What is neither ours nor torch's is what a reader wants to see.
    names.sort(key=lambda name: name.startswith(("fxquant.", "torch.")))
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f" (it imports {', '.join(names[:_MOST])}{more})"


def _load_weights(model: nn.Module, path: str) -> None:
    if not os.path.isfile(path):
        raise LoadError(f"there is no file of weights {path!r}")
    try:
        if path.endswith(".safetensors"):
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch tells how to run what is in the file; a state dict never needs that.
        raise LoadError(
            f"the weights {path!r} are no state dict that can be read without running code"
        ) from error
    except (*_UNREADABLE, safetensors.SafetensorError) as error:
        raise LoadError(f"the weights {path!r} cannot be read: {error}") from error
    try:
        model.load_state_dict(state)
    except _UNREADABLE as error:
        raise LoadError(f"the weights {path!r} do not fit: {error}") from error
