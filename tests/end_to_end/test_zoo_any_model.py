"""Any model in: nets written the way people write them are quantized as they are.

For each: no change by the user, most of the multiply-accumulates in int8, an output near the float
one on both backends, other batch sizes and other sizes too, and the user's model as it was.
"""

from __future__ import annotations

import math
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.backends.x86 import X86
from tests.zoo.any import CASES
from tests.zoo.any.case import Case, feed, tensors_in

PLAIN, OTHERS = 25.0, 20.0
"""Decibels: what plain CNNs must reach, and what others must."""
ELSEWHERE: Final = 7.0 if X86().saturates_pairs else 6.0
"""Decibels that batches of other sizes may lose; kernels that add pairs have coarser weights."""
SAME_LABELS: Final = 0.8
"""Share of the integers of an output (labels, places) that must be those of the float model."""
GENERIC: Final = ("", "nothing decided", "float", "unknown", "not supported", "unsupported")

NAMES: Final = tuple(CASES)


def noise(wanted: Any, found: Any, signal: Any) -> float:
    """Decibels of the worst tensor: mean square of ``signal`` to that of the difference."""
    worst = math.inf
    triples = zip(tensors_in(wanted), tensors_in(found), tensors_in(signal), strict=True)
    for a, b, like in triples:
        assert b.shape == a.shape and b.dtype == a.dtype
        if a.numel() and a.is_floating_point():
            error = float((a - b).double().square().mean())
            power = float(like.double().square().mean())
            worst = min(worst, 10 * math.log10(max(power, 1e-30) / max(error, 1e-30)))
        elif a.numel():
            assert float((a == b).double().mean()) >= SAME_LABELS
    return worst


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything of a model that quantizing might have touched, but for the values of tensors."""
    return [
        (name, type(module), module.training, sorted(vars(module)), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


def check_is_near(model: nn.Module, quantized: nn.Module, case: Case) -> None:
    """As near as asked where it was calibrated, nearly so at odd batches and other sizes."""
    floor = PLAIN if case.plain else OTHERS
    x = case.data(16, 99, case.size)
    wanted = feed(model, x)
    got = noise(wanted, feed(quantized, x), wanted)
    assert got >= floor, f"{got:.1f} dB"
    for batch in (1, 3):
        x = case.data(batch, 98, case.size)
        got = noise(feed(model, x), feed(quantized, x), wanted)
        assert got >= floor - ELSEWHERE, f"batch of {batch}: {got:.1f} dB"
    if case.empty:
        x = case.data(0, 97, case.size)
        noise(feed(model, x), feed(quantized, x), wanted)
    if case.other is not None:
        x = case.data(3, 96, case.other)
        wanted = feed(model, x)
        got = noise(wanted, feed(quantized, x), wanted)
        assert got >= floor - ELSEWHERE, f"size {case.other}: {got:.1f} dB"


def check_report(quantized: GraphModule, case: Case) -> None:
    """Enough work in int8, and a reason for whatever is not."""
    report = fxquant.report(quantized)
    assert all(row["macs"] is not None for row in report.rows), str(report)
    assert report.mac_coverage >= case.macs, str(report)
    for row in report.rows:
        if row["runs"] == "float":
            assert row["why"] not in GENERIC and len(row["why"].split()) > 2, row
            assert row["by"], row


@pytest.mark.parametrize("name", NAMES)
def test_any_model(name: str) -> None:
    case = CASES[name]
    model = case.build()
    before, state = fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
    data = [case.data(16, seed, case.size) for seed in range(3)]
    wanted = feed(model, data[0])

    x86 = fxquant.quantize(model, data, backend="x86")
    check_report(x86, case)
    check_is_near(model, x86, case)
    reference = fxquant.quantize(model, data, backend="reference")
    check_report(reference, case)
    check_is_near(model, reference, case)

    assert fingerprint(model) == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    pairs = zip(tensors_in(wanted), tensors_in(feed(model, data[0])), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_attention_is_int8_where_it_is_asked_for() -> None:
    """By itself it stays float, where torch's fused attention was measured to be faster."""
    case = CASES["hf_whisper_encoder"]
    model, data = case.build(), [case.data(4, 0, case.size)]
    asked = {F.scaled_dot_product_attention: fxquant.QConfig()}
    for backend in ("x86", "reference"):
        quantized = fxquant.quantize(model, data, overrides=asked, backend=backend)
        assert fxquant.report(quantized).mac_coverage >= 0.95
        check_is_near(model, quantized, case)


@pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")
@pytest.mark.parametrize(("name", "layer"), [("crnn", nn.LSTM), ("gru_tagger", nn.GRU)])
def test_recurrent_layers_are_int8_where_that_is_asked_for(name: str, layer: type) -> None:
    """By themselves layers as small as these stay float, and their rows say what was measured."""
    case = CASES[name]
    model, data = case.build(), [case.data(16, seed, case.size) for seed in range(3)]
    for backend in ("x86", "reference"):
        asked = fxquant.quantize(model, data, overrides={layer: "dynamic"}, backend=backend)
        assert fxquant.report(asked).mac_coverage >= 0.95
        check_is_near(model, asked, case)


def test_there_are_models_enough_and_all_are_honest() -> None:
    assert len(NAMES) >= 40
    # Whatever may keep more than 5 % of its work in float says why.
    assert [name for name, case in CASES.items() if case.macs < 0.95 and not case.why] == []


def test_the_same_seed_builds_the_same_model() -> None:
    for name in ("regnet", "swin", "gru_tagger"):
        first, again = CASES[name].build().state_dict(), CASES[name].build().state_dict()
        assert all(torch.equal(first[key], again[key]) for key in first)
        given: list[list[Tensor]] = [list(tensors_in(CASES[name].data(2, 3, 32))) for _ in "ab"]
        assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))
