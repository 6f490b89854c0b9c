"""What `quantize`, `bench` and their like share: a model, data for it, and how to quantize it."""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import fxquant
from fxquant.calibration import bind_batch, first_batch
from fxquant.cli.code import call, imported
from fxquant.cli.data import load_data, load_transform
from fxquant.cli.models import load_model
from fxquant.cli.parsing import natural, positive
from fxquant.cli.settings import Settings, read_settings
from fxquant.cli.terminal import progress, tell
from fxquant.errors import CalibrationError, ConfigError
from fxquant.graph.held_state import state_kept


@dataclass(frozen=True)
class Job:
    """Everything that quantizing one model takes.

    Args:
        model: the float model.
        settings: how to quantize it.
        data: what to calibrate with, if anything.
        transform: turns what the data yields into a batch.
        example: one batch, bound to the arguments of ``forward``, if one was given.
        train: trains the model it is given, in mode ``qat``.
    """

    model: nn.Module
    settings: Settings
    data: Any = None
    transform: Callable[[Any], Any] | None = None
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    train: Callable[[nn.Module], object] | None = None

    @property
    def example_inputs(self) -> Any:
        """The example in the form :func:`fxquant.quantize` takes."""
        return None if self.example is None else as_example(*self.example)

    def quantized(self) -> GraphModule:
        """The quantized model; shows progress."""
        settings = self.settings
        tell(f"quantizing, mode {settings.mode}")
        with progress("calibrating") as report:
            return fxquant.quantize(
                self.model,
                self.data,
                example_inputs=self.example_inputs,
                transform=self.transform,
                max_batches=settings.max_batches,
                min_coverage=settings.min_coverage,
                train=self.train,
                progress=report,
                **settings.keywords(),
            )


def add_seed(parser: argparse.ArgumentParser) -> None:
    """The option of what is random."""
    parser.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of what is random (0)"
    )


def add_job(parser: argparse.ArgumentParser) -> None:
    """The options of data and of what is random."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--calibration",
        metavar="DATA",
        help="a file (.npy, .npz, .safetensors), a folder of them, or package.module:loader",
    )
    group.add_argument(
        "--transform", metavar="MODULE:FUNCTION", help="turns what the data yields into a batch"
    )
    group.add_argument("--batch-size", type=positive, metavar="N", help="split what files hold")
    group.add_argument(
        "--example-inputs", metavar="DATA", help="one batch, for shapes; else the first of the data"
    )
    add_seed(parser)


def load_job(arguments: argparse.Namespace) -> Job:
    """All that the arguments name, settings first: they are checked fastest.

    Raises:
        FxQuantError: something cannot be had.
    """
    settings = read_settings(arguments)
    train = load_training(settings.train)
    model = load_model(arguments.model, arguments, weights=arguments.weights).eval()
    data = None
    if arguments.calibration is not None:
        data = load_data(arguments.calibration, arguments.batch_size)
    transform = load_transform(arguments.transform)
    if data is None and transform is not None and arguments.example_inputs is None:
        raise ConfigError("--transform is for data: pass --calibration with it")
    example = None
    if arguments.example_inputs is not None:
        example = example_batch(arguments.example_inputs, model, transform, arguments.batch_size)
        args, kwargs = example
        with torch.no_grad(), state_kept(model):
            call(
                functools.partial(model, *args, **kwargs),
                f"run the model on {arguments.example_inputs!r}",
                CalibrationError,
            )
    return Job(model, settings, data, transform if data is not None else None, example, train)


def load_training(spec: str | None) -> Callable[[nn.Module], object] | None:
    """The function at ``package.module:function`` that trains a model; it is blamed by name.

    Raises:
        ConfigError: it is not there, or no function.
    """
    if spec is None:
        return None
    found = imported(spec, ConfigError, "the training function")
    if not callable(found):
        raise ConfigError(
            f"the training function {spec!r} is a {type(found).__name__}: name a function"
        )

    def train(model: nn.Module) -> None:
        tell("training")
        call(functools.partial(found, model), f"train the model by {spec}", CalibrationError)

    return train


def example_batch(
    spec: str,
    model: nn.Module,
    transform: Callable[[Any], Any] | None,
    batch_size: int | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first batch of some data, bound to the arguments of ``forward``.

    Raises:
        CalibrationError: there is none, or it does not fit.
    """
    data = load_data(spec, batch_size)
    first = first_batch(data, transform, model=model)
    if first.args is None:
        raise ConfigError(f"{spec!r} runs the model itself and shows no batch: name another loader")
    return bind_batch(model, first.args, 0) if not first.kwargs else (first.args, first.kwargs)


def as_example(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments of ``forward`` in the form that the functions of fxquant take."""
    if args and kwargs:
        raise ConfigError("example inputs are either all by place or all by name")
    return kwargs or args


@contextmanager
def seeded(seed: int | None) -> Generator[None]:
    """Random numbers from ``seed`` on; the state outside is left as found."""
    if seed is None:
        yield
        return
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
