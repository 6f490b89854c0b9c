"""Quick deep copies: equal to those of copy.deepcopy, and nothing shared but what the memo says."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fxquant.graph.copies import deep_copy


class Tied(nn.Module):
    """One module in two places, one weight in two modules, attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a
        self.c = nn.Linear(3, 3)
        self.c.weight = self.a.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.sizes = [(1, 2), {"k": torch.ones(2)}]
        self.empty: list[int] = []
        self.same = self.empty
        self.me = [self]

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x))) + self.table


class OwnCopy(nn.Linear):
    """Says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, object]) -> OwnCopy:
        made = OwnCopy(2, 2)
        made.copied = True  # type: ignore[assignment] # not declared, which is the point
        return made


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)),
    "tied": Tied,
    "lstm": lambda: nn.LSTM(3, 4, 2),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 8),
}


def attributes(module: nn.Module) -> dict[str, list[str]]:
    return {name: [*vars(each)] for name, each in module.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("name", MODELS)
def test_a_quick_copy_has_what_a_deep_copy_has(name: str) -> None:
    model = MODELS[name]()
    quick, usual = deep_copy(model, {}), copy.deepcopy(model)
    assert attributes(quick) == attributes(usual)
    assert repr(quick) == repr(usual)
    kept, wanted = quick.state_dict(), usual.state_dict()
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(kept[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_shares_nothing_that_can_change(name: str) -> None:
    model = MODELS[name]()
    twin = deep_copy(model, {})
    ours = {id(value) for module in model.modules() for value in vars(module).values()}
    for module in twin.modules():
        changeable = [v for v in vars(module).values() if isinstance(v, (dict, list, set, Tensor))]
        assert not ours & {id(value) for value in changeable}
    assert not {*map(id, model.parameters())} & {*map(id, twin.parameters())}


def test_what_was_one_object_still_is() -> None:
    twin = deep_copy(Tied(), {})
    assert twin.a is twin.b and twin.c.weight is twin.a.weight
    assert twin.me[0] is twin and twin.same is twin.empty


def test_what_the_memo_names_is_shared() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    twin = deep_copy(model, {id(p): p for p in (*model.parameters(), model[1])})
    assert twin[0] is not model[0] and twin[0].weight is model[0].weight
    assert twin[1] is model[1]


def test_modules_with_a_copy_of_their_own_are_asked() -> None:
    twin = deep_copy(nn.Sequential(OwnCopy(2, 2)), {})
    assert twin[0].copied


def test_hooks_are_copied_as_ever_and_belong_to_one() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("first"))
    twin = deep_copy(model, {})
    twin[0].register_forward_hook(lambda *_: calls.append("second"))
    model(torch.ones(1, 2))
    assert calls == ["first"]
    twin(torch.ones(1, 2))
    assert calls == ["first", "first", "second"]


def test_weights_of_recurrent_layers_are_laid_side_by_side_but_not_those_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where there is a GPU, whose kernels ask for it: on a processor nothing is moved."""
    flattened: list[nn.Module] = []
    model = nn.Sequential(nn.LSTM(2, 3), nn.LSTM(3, 3))
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda self: flattened.append(self))
    twin = deep_copy(model, {})
    assert flattened == [twin[0], twin[1]]
    flattened.clear()
    twin = deep_copy(model, {id(p): p for p in model[0].parameters()})
    assert flattened == [twin[1]]
