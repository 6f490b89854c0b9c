"""What a backend declares: costs that make sense, ops that have an int8 form."""

from __future__ import annotations

import platform

import pytest
import torch

from fxquant.backends import x86
from fxquant.backends.base import GATE, GELU_TANH, INT8_OPS, MEASURED, Availability, Backend, Cost
from fxquant.backends.cuda import Cuda
from fxquant.backends.reference import Reference
from fxquant.backends.x86 import X86
from fxquant.graph.op_table import op_named, op_names
from fxquant.graph.ops import Kind


def test_costs_grow_with_size() -> None:
    cost = Cost(10.0, 0.5)
    assert cost.of(0) == 10.0
    assert cost.of(2000) == 11.0


def test_unknown_ops_cost_the_default() -> None:
    assert MEASURED.codes("lgamma") is MEASURED.on_codes[""]
    assert MEASURED.real("lgamma") is MEASURED.in_float[""]
    assert MEASURED.codes("add") is not MEASURED.on_codes[""]


def test_costs_are_of_ops_that_exist() -> None:
    # A step of any recurrent layer has one cost.
    names = {*op_names(), "", "recurrent", GATE, GELU_TANH}
    assert set(MEASURED.on_codes) <= names
    assert set(MEASURED.in_float) <= names
    for cost in (*MEASURED.on_codes.values(), *MEASURED.in_float.values()):
        assert 0 < cost.call < 1000
        assert 0 <= cost.element < 100


def test_ops_with_an_int8_form_exist_and_the_rest_is_float() -> None:
    assert set(op_names()) >= INT8_OPS
    for name in ("var", "std", "logsumexp", "lp_pool2d", "size"):
        assert name not in INT8_OPS
    for name in op_names():
        if op_named(name).kind in (Kind.FLOAT, Kind.SHAPE, Kind.BOUNDARY):
            assert name not in INT8_OPS


@pytest.mark.parametrize("backend", (X86(), Cuda(), Reference()), ids=lambda b: b.name)
def test_backends_keep_the_protocol(backend: Backend) -> None:
    names = [rule.name for rule in backend.rules]
    assert len(set(names)) == len(names)
    assert all(name.startswith(f"{backend.name}-") for name in names)
    assert backend.costs.quantize.call > 0
    assert isinstance(backend.saturates_pairs, bool)
    assert isinstance(backend.reads_unsigned, bool)


def test_x86_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert X86().missing() is None
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "arm64")
        assert X86().missing() == "this is a arm64 processor"
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert X86().missing() == "this torch is built without oneDNN"
    with monkeypatch.context() as patch:
        patch.setattr(x86, "_NEEDED", {"qconv_nowhere": "default"})
        assert "torch.ops.onednn.qconv_nowhere" in str(X86().missing())


def test_needed_operators_are_the_ones_the_layers_call() -> None:
    for name, overload in x86._NEEDED.items():
        assert hasattr(getattr(torch.ops.onednn, name), overload)


def test_availability_is_plain_data() -> None:
    assert Availability("a", True, "b") == Availability("a", True, "b", {})
