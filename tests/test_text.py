"""Text of users is harmless in every message: what acts on terminals shows as an escape."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import CalibrationError, FxQuantError, FxQuantWarning, LoadError, warn_user
from fxquant.graph.text import names_near
from fxquant.text import harmless, readable

HOSTILE = ("\x1b[31mred\x1b]0;t\x07", "a\u202eb\u200f", "n" * 10_000, "\u2028sep", "9b\x9b31m")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def acts(text: str) -> bool:
    """Whether a character of it would act on a terminal or a reader; line breaks are ours."""
    return any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text if c != "\n")


def net(name: str) -> nn.Module:
    made = nn.Sequential()
    made.add_module(name, nn.Linear(8, 8))
    made.add_module("tail", nn.Linear(8, 8))
    return made.eval()


def holding_nan(name: str) -> nn.Module:
    made = net(name)
    with torch.no_grad():
        next(made.parameters())[0, 0] = float("nan")
    return made


Call = Callable[[str], Any]
CALLS: dict[str, Call] = {
    "override": lambda n: fxquant.quantize(net(n), [X], overrides={f"x{n}": None}),
    "expression": lambda n: fxquant.quantize(net(n), [X], overrides={f"re:({n}": None}),
    "explain": lambda n: fxquant.explain(fxquant.prepare(net(n)), f"x{n}"),
    "qconfig": lambda n: fxquant.quantize(net(n), [X], qconfig=n),
    "backend": lambda n: fxquant.quantize(net(n), [X], backend=n),
    "mode": lambda n: fxquant.quantize(net(n), [X], mode=n),  # type: ignore[arg-type]  # on purpose
    "history": lambda n: fxquant.history(fxquant.prepare(net(n)))[n],
    "data": lambda n: fxquant.quantize(net(n), [X * float("nan")]),
    "batch": lambda n: fxquant.quantize(net(n), [{n: X}]),
    "weights": lambda n: fxquant.quantize(holding_nan(n), [X]),
    "coverage": lambda n: fxquant.quantize(net(n), [X], overrides={n: None}, min_coverage=1.0),
}


@pytest.mark.parametrize("name", HOSTILE, ids=["ansi", "bidi", "long", "separator", "c1"])
@pytest.mark.parametrize("call", CALLS)
def test_errors_quote_names_as_text(call: str, name: str) -> None:
    with pytest.raises(FxQuantError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore", FxQuantWarning)
        CALLS[call](name)
    text = str(caught.value)
    assert not acts(text) and len(text) < 2_500


@pytest.mark.parametrize("name", HOSTILE, ids=["ansi", "bidi", "long", "separator", "c1"])
def test_graphs_as_text(name: str) -> None:
    q = fxquant.quantize(net(name), [X], backend="reference")
    assert not acts(fxquant.history(q).after("fuse"))
    assert not acts(fxquant.history(q).before("lower"))


def test_warnings_too() -> None:
    with pytest.warns(FxQuantWarning) as caught:
        warn_user("layer \x1b[31m", FxQuantWarning)
    assert str(caught[0].message) == "layer \\x1b[31m"


def test_messages_keep_their_lines_and_their_arguments() -> None:
    error = CalibrationError("first\nsecond\t\x00")
    assert str(error) == "first\nsecond\\t\\x00"
    assert error.args == ("first\nsecond\t\x00",)
    assert str(LoadError("no \x1b file")) == "no \\x1b file"


def test_what_is_plain_stays_as_it_is() -> None:
    for text in ("", "plain", "gr\u00fc\u00dfe \U0001f600", "a" * 399):
        assert harmless(text) == readable(text) == text
    assert readable("a" * 400) == "a" * 120 + "..." + "a" * 120
    assert harmless("a\tb", keep="\t") == "a\tb"


def test_names_that_are_near() -> None:
    known = ["layer1.conv", "layer2.conv", "", "n" * 5_000]
    assert names_near("layer1.cnov", known).startswith("the nearest names are ['layer1.conv'")
    assert len(names_near("n" * 5_000, known)) < 300  # nothing of that length is compared
    assert "for example" in names_near(nn.Linear, known)
