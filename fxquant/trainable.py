"""Builds models that are prepared for quantization-aware training."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from fxquant.arguments import ranks
from fxquant.backends.base import Backend
from fxquant.building import Wishes
from fxquant.errors import CalibrationError, ConfigError
from fxquant.graph.both_modes import capture_both
from fxquant.graph.held_state import state_kept
from fxquant.graph.info import write_info
from fxquant.graph.recurrent_layers import as_called
from fxquant.graph.user_class import with_user_class
from fxquant.graph.user_tree import TrainableModule, adopt_tree
from fxquant.numerics.fake_quantizer import FakeQuantize, FakeQuantizer
from fxquant.numerics.finite import all_finite
from fxquant.passes.fake_quantize import HOME
from fxquant.pipeline import first_snapshot
from fxquant.recipes import fake_quantize_recipe, training_recipe
from fxquant.record import Part, Record, attach
from fxquant.report.checks import nothing_int8, size_in_bytes
from fxquant.report.ops import read_ops


def build_trainable(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wishes: Wishes,
    backend: Backend,
) -> GraphModule:
    """Capture a model for training and insert fake-quants.

    Args:
        model: the user's model; it is copied, and the copy is left in the mode it is in.
        args: positional example inputs.
        kwargs: keyword example inputs.
        wishes: configuration, overrides, patterns.
        backend: what it will be converted for.

    Raises:
        TraceError: the model cannot be captured as one graph for both modes.
        ConfigError: an override matches nothing, or a name of the model is in the way.
        LoweringError: nothing in the model can become int8.
    """
    if hasattr(model, HOME):
        raise ConfigError(
            f"the model has an attribute called {HOME!r}, which is where fake-quants are kept: "
            "give it another name"
        )
    start = time.perf_counter()
    model = as_called(model)
    both = capture_both(model, args, kwargs)
    module, root = both.captured.module, both.captured.root
    if root is None:
        raise TypeError("the captured copy is missing")
    record = Record(wishes.mode, rung=both.captured.rung, bytes_before=size_in_bytes(model))
    record.snapshots.append(first_snapshot(module, time.perf_counter() - start))
    known = ranks(model, args, kwargs)
    training_recipe(wishes.qconfig, wishes.overrides, wishes.patterns, known).run(module, record)
    if args or kwargs:
        _see_shapes(module, args, kwargs)
    fake_quantize_recipe(backend, both.droppers).run(module, record)
    if not any(isinstance(m, FakeQuantizer) for m in module.modules()):
        raise nothing_int8(read_ops(module.graph))
    record.parts = (Part("", both.captured.rung),)
    attach(module, record)
    made = with_user_class(module, model, TrainableModule)
    if not isinstance(made, TrainableModule):
        raise TypeError(f"{type(made).__name__} does not keep the user's modules")
    adopt_tree(made, root, model, HOME)
    return made


def check_trained(prepared: nn.Module) -> None:
    """Refuse to convert a model that was not trained, or whose training diverged.

    Raises:
        CalibrationError: no fake-quant has seen data; a weight or a statistic is not finite.
    """
    fakes = [m for m in prepared.modules() if isinstance(m, FakeQuantize)]
    if fakes and not any(fake.seen for fake in fakes):
        raise CalibrationError(
            "no fake-quant has seen any data: train the prepared model for at least one step in "
            "training mode, or call fxquant.calibrate(prepared, data), before convert"
        )
    for name, tensor in (*prepared.named_parameters(), *prepared.named_buffers()):
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CalibrationError(
                f"{name} holds NaN or infinity, and so would every result: training diverged. Go "
                "back to a checkpoint before that, with a lower learning rate, or switch "
                "fake-quant on later"
            )


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.numel():
            write_info(n, shape=tuple(value.shape))
        return value


def _see_shapes(module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the example once, in evaluation mode: costs are weighed and work is counted by sizes."""
    inputs = []
    left = list(args)
    for node in module.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name.startswith("*"):
            return
        if left:
            inputs.append(left.pop(0))
        elif name in kwargs:
            inputs.append(kwargs[name])
        elif node.args:
            inputs.append(node.args[0])
        else:
            return
    modes = [(each, each.training) for each in module.modules()]
    with torch.no_grad(), state_kept(module), torch.random.fork_rng(devices=[]):
        try:
            _Shapes(module.eval(), garbage_collect_values=True).run(*inputs)
        finally:
            for each, training in modes:
                each.training = training
