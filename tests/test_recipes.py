"""Recipes: which passes run in which order, and which backend stands behind a name."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fxquant import recipes
from fxquant.backends import x86
from fxquant.backends.reference import Reference
from fxquant.backends.x86 import X86
from fxquant.errors import ConfigError
from fxquant.graph.verify import Stage
from fxquant.pipeline import Pipeline
from fxquant.recipes import (
    available_backends,
    convert_recipe,
    prepare_recipe,
    resolve_backend,
)
from fxquant.spec import QConfig


def test_prepare_leads_from_the_captured_graph_to_observers() -> None:
    steps = prepare_recipe(QConfig(), (), (), {}).passes
    assert steps[0].needs is Stage.CAPTURED
    assert [step.name for step in steps] == [
        "functionalize", "unshare", "fold-constants", "split-output-size", "canonicalize",
        "split-padding",
        "decompose", "adopt-products", "adopt-norms", "configure", "open-attention", "fuse",
        "annotate", "annotate-recurrent", "observe",
    ]  # fmt: skip


def test_convert_goes_on_where_prepare_ends() -> None:
    last = prepare_recipe(QConfig(), (), (), {}).passes[-1]
    steps = convert_recipe(Reference()).passes
    assert steps[0].needs is last.gives
    assert steps[-1].gives is Stage.LOWERED
    assert [step.name for step in steps] == [
        "read-ranges", "unsigned-codes", "share-scales", "place", "convert-recurrent",
        "convert-weights", "convert", "cast-floats", "convert-dynamic", "call-kernels", "lower",
    ]  # fmt: skip


def test_passes_in_the_wrong_order_are_refused() -> None:
    steps = convert_recipe(Reference()).passes
    with pytest.raises(ConfigError, match="needs a graph at stage"):
        Pipeline((steps[-1], steps[0]))


def test_names_are_those_of_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, make in recipes._BACKENDS.items():
        assert make().name == name
        assert resolve_backend(name).name == name


class _Elsewhere(nn.Module):
    """Says that it is on another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def parameters(self, recurse: bool = True) -> Any:
        """A constant that stayed on the processor, and a weight."""
        return iter([SimpleNamespace(device=torch.device(kind)) for kind in ("cpu", self.device)])


def test_auto_goes_by_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    there = _Elsewhere("cuda")
    assert resolve_backend("auto", there, "dynamic").name == "reference"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for mode in ("dynamic", "weight_only"):
        assert resolve_backend("auto", there, mode).name == "cuda"
    assert resolve_backend("auto", there, "static").name == "reference"
    assert resolve_backend("auto", nn.Linear(2, 2), "dynamic").name == "x86"
    assert resolve_backend("auto", _Elsewhere("mps"), "dynamic").name == "reference"
    with pytest.raises(ConfigError, match="the model is on cuda"):
        resolve_backend("x86", there)


def test_auto_is_the_fastest_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend("auto").name == "x86"
    monkeypatch.setattr(X86, "missing", lambda self: "this is a test")
    assert resolve_backend("auto").name == "reference"
    with pytest.raises(ConfigError, match=r"'x86' cannot run here: this is a test\. Available"):
        resolve_backend("x86")
    found = {one.name: one for one in available_backends()}
    assert not found["x86"].available
    assert found["x86"].reason == "this is a test"
    assert found["reference"].available


def test_where_kernels_add_pairs_weights_are_narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for pairs in (True, False):
        monkeypatch.setattr(x86, "layers_saturate", lambda pairs=pairs: pairs)
        steps = {step.name: step for step in convert_recipe(X86()).passes}
        convert = steps["convert"]
        assert dataclasses.is_dataclass(convert) and not isinstance(convert, type)
        assert dataclasses.asdict(convert)["saturates_pairs"] is pairs
