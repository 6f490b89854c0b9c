"""Configure: which configuration applies to which op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import ConfigError
from fxquant.graph.info import info
from fxquant.passes.configure import Configure, Selector
from fxquant.spec import QConfig, QSpec
from tests.helpers import One, Overrides, canonical, nodes, run


class Block(nn.Module):
    """A convolution and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 1)
        self.conv2 = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(self.conv1(x)) + x)


class Net(nn.Module):
    """Nested blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer10 = nn.Sequential(Block())
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer10(self.layer1(x)).mean((2, 3))
        return F.relu(self.fc(y))


FOUR = QConfig(weight=QSpec("int8", bits=4, symmetric=True, granularity="channel"))
SEVEN = QConfig(activation=QSpec(bits=7))


def chosen(*overrides: tuple[Selector, QConfig | None]) -> dict[str, QConfig | None]:
    module = run(canonical(Net(), torch.ones(1, 2, 3, 3)), Configure(overrides=tuple(overrides)))
    return {info(n).path: info(n).config for n in nodes(module)}


def hit(selector: Selector) -> list[str]:
    return [path for path, config in chosen((selector, None)).items() if config is None]


BLOCK = ("conv1", "conv2", "add", "relu")
LAYER1 = [f"layer1.{i}.{name}" for i in (0, 1) for name in BLOCK]
LAYER10 = [f"layer10.0.{name}" for name in BLOCK]


def label(value: object) -> str:
    """A test's name without addresses: workers must agree on it."""
    return str(getattr(value, "__name__", value))


@pytest.mark.parametrize(
    ("selector", "paths"),
    [
        ("fc", ["fc"]),
        ("layer1.0.conv1", ["layer1.0.conv1"]),
        ("layer1.0", LAYER1[:4]),
        ("layer1", LAYER1),  # and not layer10
        ("layer1.0.add", ["layer1.0.add"]),
        ("*.conv2", ["layer1.0.conv2", "layer1.1.conv2", "layer10.0.conv2"]),
        ("layer1.?.conv[1]", ["layer1.0.conv1", "layer1.1.conv1"]),
        ("layer1*", [*LAYER1, *LAYER10]),
        (r"re:layer1\.\d\.conv1", ["layer1.0.conv1", "layer1.1.conv1"]),
        (r"re:.*\.1", LAYER1[4:]),
        (nn.Linear, ["fc"]),
        (nn.Conv2d, [p for p in (*LAYER1, *LAYER10) if "conv" in p]),
        (Block, [*LAYER1, *LAYER10]),
        (nn.Sequential, [*LAYER1, *LAYER10]),
        (torch.add, [p for p in (*LAYER1, *LAYER10) if "add" in p]),
        (F.relu, [*(p for p in (*LAYER1, *LAYER10) if "relu" in p), "relu"]),
        (nn.ReLU, [*(p for p in (*LAYER1, *LAYER10) if "relu" in p), "relu"]),
        (torch.mean, ["mean"]),
    ],
    ids=label,
)
def test_selectors(selector: Selector, paths: list[str]) -> None:
    assert hit(selector) == paths


def test_the_last_match_wins() -> None:
    found = chosen((nn.Conv2d, None), ("layer1.1", FOUR), ("layer1.1.conv2", SEVEN))
    assert found["layer1.0.conv1"] is None
    assert found["layer1.1.conv1"] == FOUR
    assert found["layer1.1.conv2"] == SEVEN
    assert found["fc"] == QConfig()
    reversed_order = chosen(("layer1.1.conv2", SEVEN), ("layer1.1", FOUR), (nn.Conv2d, None))
    assert reversed_order["layer1.1.conv2"] is None
    assert reversed_order["layer1.1.add"] == FOUR


def test_the_default_and_who_decided() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()).eval(), torch.ones(1, 2, 3, 3)
    overrides: Overrides = (("0", FOUR),)
    module = run(canonical(model, x), Configure(SEVEN, overrides))
    conv, relu = nodes(module)
    assert (info(conv).config, info(conv).configured_by) == (FOUR, "override '0'")
    assert (info(relu).config, info(relu).configured_by) == (SEVEN, "the default")


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        ("layer1.0.conv", r"override 'layer1\.0\.conv' matches nothing.*nearest.*layer1\.0\.conv1"),
        ("lyer10", "matches nothing.*nearest names are.*layer10"),
        ("nothing.like.it", "matches nothing.*there are, for example, "),
        ("layer2*", "matches nothing"),
        ("re:conv1", "matches nothing"),
        (nn.LSTM, "override LSTM matches nothing"),
        (torch.matmul, "override matmul matches nothing"),
    ],
    ids=label,
)
def test_a_selector_that_matches_nothing_names_near_ones(selector: Selector, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        chosen((selector, None))


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        ("re:(", r"'re:\(' is no regular expression"),
        (3, "the override selector 3 is none: use a module path"),
        (None, "the override selector None is none"),
    ],
)
def test_what_is_no_selector(selector: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        chosen((selector, None))


def test_functional_layers_are_found_by_their_module_and_by_their_class() -> None:
    model = One(lambda m, x: F.linear(x, m.weight), weight=nn.Parameter(torch.ones(2, 2)))
    module = canonical(nn.Sequential(model), torch.ones(1, 2))
    for selector in (F.linear, nn.Linear, "0", "0.linear", One):
        run(module, Configure(overrides=((selector, None),)))
        assert info(nodes(module)[0]).config is None
        run(module, Configure(overrides=()))
        assert info(nodes(module)[0]).config == QConfig()


def test_modules_called_twice_are_found_by_the_users_name() -> None:
    model = One(lambda m, x: m.conv(m.conv(x)), conv=nn.Conv2d(2, 2, 1))
    module = run(canonical(model, torch.ones(1, 2, 3, 3)), Configure(overrides=(("conv", None),)))
    assert [info(n).config for n in nodes(module)] == [None, None]
