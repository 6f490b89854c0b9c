"""Graphs on their way to training, for the tests of the passes that make and undo them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.backends.base import INT8_OPS, REASONS
from fxquant.graph.both_modes import capture_both
from fxquant.numerics.fake_quantizer import FakeQuantize
from fxquant.numerics.fake_weights import FakeQuantizeWeight
from fxquant.passes.annotate import Annotate
from fxquant.passes.annotate_recurrent import AnnotateRecurrent
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.configure import Configure
from fxquant.passes.fake_quantize import InsertFakeQuants
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.fuse import Fuse
from fxquant.passes.propose import Propose
from fxquant.passes.split_padding import SplitPadding
from fxquant.patterns.rule import Rule
from fxquant.patterns.trained import TRAINING_RULES
from fxquant.recipes import OTHER_OPS
from fxquant.spec import QConfig
from tests.helpers import Overrides, ranks_of, run


def decided(
    model: nn.Module,
    *args: Any,
    config: QConfig | None = None,
    overrides: Overrides = (),
    rules: tuple[Rule, ...] = (),
) -> tuple[GraphModule, Any]:
    """``model`` up to the decisions what is trained for int8, and what drops in training."""
    both = capture_both(model, args, {})
    module = both.captured.module
    run(module, Functionalize(), Canonicalize(), SplitPadding())
    run(module, Configure(config or QConfig(), overrides))
    run(module, Fuse((*rules, *TRAINING_RULES), ranks_of(*args, model=model)))
    run(module, Annotate(INT8_OPS, REASONS, OTHER_OPS, trained=True), AnnotateRecurrent())
    return module, both.droppers


def inserted(model: nn.Module, *args: Any, **options: Any) -> GraphModule:
    """``model`` with fake-quants; ``saturates`` as for the pass."""
    saturates = options.pop("saturates", False)
    module, droppers = decided(model, *args, **options)
    return run(module, Propose(), InsertFakeQuants(saturates, droppers))


def watched(module: GraphModule, *batches: Any) -> GraphModule:
    """A graph whose fake-quants saw ``batches`` in training mode."""
    module.train()
    with torch.no_grad():
        for batch in batches:
            module(batch)
    return module


def values(module: nn.Module) -> list[str]:
    """The names of the values that are fake-quantized."""
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, FakeQuantize)]
    return [name.rpartition(".")[2] for name, _ in found]


def weights(module: nn.Module) -> list[str]:
    """The names of the weights that are."""
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, FakeQuantizeWeight)]
    return [name.rpartition(".")[2] for name, _ in found]
