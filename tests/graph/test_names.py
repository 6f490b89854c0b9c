"""Names that torch.fx would write into code: as text they stay, as code they are refused."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import TraceError
from fxquant.graph.names import check_names

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", ['"', "\\", "a\nb", "a\rb", "\udc80", '"); raise SystemExit(3)  #', "a\\x41"]
)
@pytest.mark.parametrize("kind", ["module", "parameter", "buffer"])
def test_names_that_would_be_code_are_refused(name: str, kind: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8)).eval()
    if kind == "module":
        net.add_module(name, nn.ReLU())
    elif kind == "parameter":
        net.register_parameter(name, nn.Parameter(torch.ones(1)))
    else:
        net.register_buffer(name, torch.ones(1))
    with pytest.raises(TraceError, match="cannot stand in the code"):
        fxquant.quantize(net, [X])


@pytest.mark.parametrize(
    "name", ["1", "a b", "it's", "<img>", "\x1b[31m", "\u202e", "{x}", "%s", "#"]
)
def test_names_that_stay_text_are_kept(name: str, tmp_path: Path) -> None:
    net = nn.Sequential()
    net.add_module(name, nn.Linear(8, 8))
    q = fxquant.quantize(net.eval(), [X], backend="reference")
    assert [op.path for op in fxquant.report(q).ops] == [name]
    torch.save(q, tmp_path / "q.pt")
    again = torch.load(tmp_path / "q.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(X), q(X))


def test_names_are_checked_without_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that parse at once may fail, see ``fxquant.graph.names``."""
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the parser was called")

    monkeypatch.setattr(builtins, "compile", refuse)
    check_names(net)
