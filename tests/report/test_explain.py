"""Why an op is int8 or float, and what would change it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigError, LoweringError
from fxquant.record import OpRecord
from fxquant.report.advice import advice

X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
HOSTILE = "<img src=x onerror=alert(1)>"


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1e4:
            return x
        return self.body(x)


class Net(nn.Module):
    """One op for every way to be decided."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.gate, self.drop = Gate(), nn.Dropout()
        self.head, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
        self.wild = nn.ModuleDict({HOSTILE: nn.Linear(8, 8)})

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.gate(torch.relu(self.bn(self.conv(x))))
        z = self.drop(self.head(y.mean((2, 3))))
        z = torch.fft.fft(self.wild[HOSTILE](z)).real
        return self.out(torch.logsumexp(torch.stack([z, z]), 0))


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return fxquant.quantize(Net().eval(), [X], backend="reference", overrides={"out": None})


def one(q: nn.Module, selector: Any) -> Any:
    found = fxquant.explain(q, selector)
    assert len(found) == 1
    return found.ops[0]


def test_who_decided(quantized: nn.Module) -> None:
    conv = one(quantized, "conv")
    assert (conv.int8, conv.by, conv.kernel) == (True, "the default", "reference")
    assert "overrides={'conv': None}" in conv.change
    out = one(quantized, "out")
    assert (out.int8, out.by) == (False, "override 'out'")
    assert "'out': fxquant.QConfig()" in out.change
    lse = one(quantized, torch.logsumexp)
    assert lse.by == "annotate" and "fxquant.Pattern" in lse.change
    fft = one(quantized, torch.fft.fft)
    assert fft.by == "the op table" and "does not know" in fft.why
    gate = fxquant.explain(quantized, Gate).ops[0]
    assert gate.by == "capture" and "a branch depends on what a tensor holds" in gate.why
    assert "test_explain.py" in conv.source


def test_what_was_folded_is_explained_by_what_took_it(quantized: nn.Module) -> None:
    bn = one(quantized, "bn")
    assert bn.path == "conv" and set(bn.members) == {"conv", "bn", "relu"}
    assert any("fold-conv-bn" in made for made in bn.made)
    assert one(quantized, "relu") == one(quantized, "%relu") == one(quantized, "conv")


def test_selectors(quantized: nn.Module) -> None:
    def paths(selector: Any) -> list[str]:
        return [op.path for op in fxquant.explain(quantized, selector)]

    assert paths("gate.body.0") == paths("gate.body.*") == ["gate.body.0"]
    assert paths("gate") == ["gate", "gate.body.0"]
    assert paths(nn.Conv2d) == ["conv", "gate.body.0"]
    assert paths("re:(head|out)") == ["head", "out"]
    assert paths(f"wild.{HOSTILE}") == [f"wild.{HOSTILE}"]
    assert len(paths("*")) == len(fxquant.report(quantized).ops)


@pytest.mark.parametrize(
    ("selector", "why"),
    [
        ("haed", r"'haed' names nothing in this model: the nearest names are \['head'"),
        ("nothing.like.it", "there are, for example"),
        (nn.Conv3d, "Conv3d names nothing"),
        (torch.cumsum, "names nothing"),
        ("re:(", "no regular expression"),
        ("", "no name"),
        (3, "ask for a path"),
        (None, "ask for a path"),
    ],
)
def test_what_names_nothing(quantized: nn.Module, selector: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        fxquant.explain(quantized, selector)


def test_only_models_of_fxquant() -> None:
    with pytest.raises(ConfigError, match="was not made by fxquant"):
        fxquant.explain(nn.Linear(2, 2), "0")


def test_a_prepared_model_is_explained_as_planned() -> None:
    prepared = fxquant.prepare(Net().eval(), example_inputs=X)
    found = fxquant.explain(prepared, "conv")
    assert found.ops[0].int8 and found.ops[0].kernel == ""
    assert "not converted yet" in str(found)
    assert fxquant.explain(prepared, "gate.body").ops[0].path == "gate.body.0"


def test_what_a_pass_took_out_is_no_op(quantized: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Identity()).eval()
    q = fxquant.quantize(net, [torch.randn(8, 4)], backend="reference")
    found = one(q, "1")
    assert found.int8 is None or found.path == "0"
    x = one(q, "input")
    assert x.int8 is None and "input of the model" in x.why


def test_costs_come_with_figures() -> None:
    net = nn.Sequential(nn.Tanh(), nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten()).eval()
    q = fxquant.quantize(net, [X])
    placed = [op for op in fxquant.explain(q, "*") if op.by == "place" and "faster" in op.why]
    for op in placed:
        assert " us, against " in op.why and "conversions" in op.why


def test_near_misses_are_listed() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.tanh(y) + y

    unit = fxquant.Pattern([nn.Conv2d, nn.Tanh], name="mine")
    q = fxquant.quantize(Leaky().eval(), [X], patterns=[unit], backend="reference")
    near = dict(pair for op in fxquant.explain(q, "conv") for pair in op.near)
    near |= dict(pair for op in fxquant.explain(q, "tanh") for pair in op.near)
    assert "`conv2d` has a second user: `add`" in near["mine"]


def test_text_and_json_are_harmless(quantized: nn.Module) -> None:
    found = fxquant.explain(quantized, "*")
    text = str(found)
    assert HOSTILE in text  # as text: nothing of it is a command to a terminal
    json.dumps(found.to_dict())
    for bad in ("\x1b[31m", "\u202e", "\n"):
        op = OpRecord(f"a{bad}b", "linear", False, f"why{bad}", f"by{bad}", "float")
        shown = advice(op)
        assert bad not in shown


def test_names_that_act_on_terminals() -> None:
    bad = "\x1b[31mred\u202e"
    net = nn.Sequential()
    net.add_module(bad, nn.Linear(4, 4))
    net.add_module("n" * 10_000, nn.Linear(4, 4))
    net.add_module(HOSTILE, nn.ReLU())
    q = fxquant.quantize(net.eval(), [torch.randn(8, 4)], backend="reference")
    text = str(fxquant.explain(q, "*"))
    assert "\x1b" not in text and "\u202e" not in text and len(text) < 5_000
    unit = fxquant.Pattern([nn.Linear, nn.ReLU], name="<b>\x1b[0m")
    text = str(unit.match(net))
    assert "\x1b" not in text and "\u202e" not in text and "1 hit" in text and len(text) < 2_000
    miss = fxquant.Pattern([nn.Linear, nn.SiLU]).match(net)
    assert "\x1b" not in str(miss) and not miss
    with pytest.raises(ConfigError) as caught:
        fxquant.explain(q, "\x1b[31m")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("share", [1.5, -0.1, float("nan"), "0.5", True])
def test_a_share_that_is_none(share: Any) -> None:
    with pytest.raises(ConfigError, match="min_coverage is"):
        fxquant.quantize(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 4)], min_coverage=share)


def test_too_little_coverage_lists_reasons() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    batches: list[Any] = [torch.randn(8, 4)]
    with pytest.raises(LoweringError, match=r"50% of the ops are int8(.|\n)*1 \(linear\)"):
        fxquant.quantize(net, batches, overrides={"1": None}, min_coverage=0.9)
