"""What explain says would change an op does change it."""

from __future__ import annotations

import re
import warnings
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import LoweringError
from tests.helpers import One

_G: Final = torch.Generator().manual_seed(0)
PICTURE: Final = torch.randn(4, 8, 6, 6, generator=_G)
STEPS: Final = torch.randn(6, 4, 16, generator=_G)
TOKENS: Final = torch.randn(4, 10, 16, generator=_G)
WORDS: Final = torch.randint(0, 20, (4, 6), generator=_G)
MODES: Final = ("static", "dynamic", "weight_only", "bfloat16")


def _conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


def _attend(m: Any, x: Any) -> Any:
    return m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)))


def _scores(m: Any, x: Any) -> Any:
    return m.v(m.q(x) @ m.k(x).transpose(1, 2))


def _masked(m: Any, x: Any) -> Any:
    scores = (m.q(x) @ m.k(x).transpose(1, 2)).masked_fill(torch.ones(10, 10).triu(1).bool(), -1e9)
    return m.v(torch.softmax(scores, -1))


def _projections(width: int = 16) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {name: nn.Linear(16, 16) for name in ("q", "k", "o")}
    return made | {"v": nn.Linear(width, 16)}


def _in_place(m: Any, x: Any) -> Any:
    y = m.a(x)
    z = m.b(y)[:, 0]
    y[:, 1] += 1
    return z + y[:, 1]


CASES: Final[dict[str, tuple[nn.Module, Tensor]]] = {
    "layers": (nn.Sequential(_conv(), nn.BatchNorm2d(8), nn.ReLU(), _conv()), PICTURE),
    "transposed": (nn.Sequential(_conv(), nn.ConvTranspose2d(8, 8, 2)), PICTURE),
    "a norm without statistics": (
        nn.Sequential(_conv(), nn.BatchNorm2d(8, track_running_stats=False)), PICTURE,
    ),
    "a variance": (One(lambda m, x: m.a(x).var((2, 3)), a=_conv()), PICTURE),
    "an average at the end": (
        One(lambda m, x: torch.tanh(m.a(x).sigmoid().mean((2, 3))), a=_conv()), PICTURE,
    ),
    "an unknown op": (One(lambda m, x: torch.fft.fft(m.a(x)).real, a=_conv()), PICTURE),
    "a computed weight": (
        One(lambda m, x: F.conv2d(m.a(x), m.b.weight * x.mean()), a=_conv(), b=_conv()), PICTURE,
    ),
    "a mask": (One(lambda m, x: m.b(F.pad(m.a(x), (1, 1), value=1e6)), a=_conv(), b=_conv()),
               PICTURE),
    "indices": (One(lambda m, x: m.a(x).argmax(1), a=_conv()), PICTURE),
    "writing in place": (One(_in_place, a=_conv(), b=_conv()), PICTURE),
    "a recurrent layer": (nn.Sequential(nn.Linear(16, 16), nn.GRU(16, 16)), STEPS),
    "embeddings": (nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 8)), WORDS),
    "embeddings in training": (
        nn.Sequential(nn.Embedding(20, 16, max_norm=1.0), nn.Linear(16, 8)), WORDS,
    ),
    "attention": (One(_attend, **_projections()), TOKENS),
    "products": (One(_scores, **_projections(10)), TOKENS),
    "masked scores": (One(_masked, **_projections(10)), TOKENS),
}  # fmt: skip


def _made(name: str, mode: Any, overrides: Any = None) -> nn.Module | None:
    model, x = CASES[name]
    try:
        return fxquant.quantize(
            model.eval(), [x] if mode == "static" else None, mode=mode, example_inputs=(x,),
            overrides=overrides, backend="reference",
        )  # fmt: skip
    except LoweringError:
        return None  # nothing became what the mode makes


def _override(text: str) -> Any:
    """The override that an advice spells, if it spells one."""
    found = re.search(r"overrides=(\{.*?\})(?= |$)", text)
    spelled = found[1] if found else None
    if spelled is None and (later := re.search(r"that decided, ('.*': .*), makes", text)):
        spelled = f"{{{later[1]}}}"
    names = {"fxquant": fxquant, "torch": torch, "nn": nn, "F": F, "QConfig": fxquant.QConfig}
    return None if spelled is None else eval(spelled, names)  # it is text of ours


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_advice_holds(name: str, mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxquant.errors.FxQuantWarning)
        made = _made(name, mode)
        if made is None:
            pytest.skip("nothing of it has the form that this mode makes")
        for op in fxquant.explain(made, "*"):
            assert op.change and "nothing that fxquant knows of" not in op.change
            wish = _override(op.change if op.change != "the override named above" else op.why)
            if wish is None:
                continue
            changed = _made(name, mode, wish)
            # An attention that is opened up is several ops, all of them under its path.
            found = [] if changed is None else [
                each for each in fxquant.explain(changed, "*")
                if each.path == op.path or each.path.startswith(f"{op.path}.")
            ]  # fmt: skip
            if op.runs == "float":
                assert any(each.runs != "float" for each in found), (op.path, op.change)
            else:
                assert all(each.runs == "float" for each in found), (op.path, op.change)


def test_what_was_asked_to_stay_float() -> None:
    for mode in MODES:
        model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval(), TOKENS
        data = [x] if mode == "static" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fxquant.errors.FxQuantWarning)
            q = fxquant.quantize(model, data, mode=mode, overrides={"1": None}, backend="reference")
            told = fxquant.explain(q, "1").ops[0]
            assert told.runs == "float" and told.by == "override '1'"
            wish = {"1": None} | _override(told.change)
            again = fxquant.quantize(model, data, mode=mode, overrides=wish, backend="reference")
        assert fxquant.explain(again, "1").ops[0].runs == fxquant.explain(again, "0").ops[0].runs


def test_what_the_whole_unit_of_a_pattern_needs() -> None:
    unit = fxquant.Pattern([nn.Conv2d, nn.Tanh], name="unit")
    net = nn.Sequential(_conv(), nn.Tanh(), _conv()).eval()
    q = fxquant.quantize(net, [PICTURE], patterns=[unit], backend="reference")
    told = fxquant.explain(q, "0").ops[0]
    wish = _override(told.change)
    assert wish == {"0": None, "1": None}
    again = fxquant.quantize(net, [PICTURE], patterns=[unit], overrides=wish, backend="reference")
    assert {op.path: op.int8 for op in fxquant.report(again).ops} == {"0": False, "2": True}


def test_a_pattern_makes_int8_what_stays_float_by_itself() -> None:
    net = One(lambda m, x: m.b(m.a(x).var((2, 3), keepdim=True)), a=_conv(), b=nn.Conv2d(8, 8, 1))
    q = fxquant.quantize(net.eval(), [PICTURE], backend="reference")
    told = fxquant.explain(q, torch.var).ops[0]
    assert told.runs == "float" and "fxquant.Pattern that ties it to its neighbours" in told.change

    @fxquant.pattern
    def varied(x, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
        return conv(x).var((2, 3), keepdim=True)

    again = fxquant.quantize(net.eval(), [PICTURE], patterns=[varied], backend="reference")
    assert fxquant.explain(again, torch.var).ops[0].runs == "int8"


def test_near_misses_are_few_and_the_nearest_first() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.a(x)
        z = m.bn(y) + m.b(x)  # the norm cannot be folded: others read what it normalizes
        return m.c(torch.relu(z)).sigmoid() * y.mean()

    parts = {"a": _conv(), "b": _conv(), "c": _conv(), "bn": nn.BatchNorm2d(8)}
    q = fxquant.quantize(One(body, **parts).eval(), [PICTURE], backend="reference")
    near = {op.path: op.near for op in fxquant.explain(q, "*")}
    told = dict(near["bn"])
    assert "more than one user" in told["fold-conv-bn"]
    # What only shares its last op with a rule is no near miss of it.
    assert not [rule for found in near.values() for rule, why in found if "expected" in why]
    assert all(len({rule for rule, _ in found}) == len(found) for found in near.values())
