"""Split padding: every padding a convolution can have is zeros of its own or a pad before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxquant.graph.op_table import module_of
from tests.helpers import One, canonical, check_eager, fused, names, node_of, options, trained

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def check(rank: int, ops: list[str], **given: Any) -> Any:
    conv = CONVS[rank](2, 4, **given)
    model = One(lambda m, x: m.conv(x), conv=conv).eval()
    x = torch.randn(2, 2, *(9, 8, 7)[:rank])
    module = canonical(model, x)
    assert names(module) == ops
    check_eager(model, module, x)
    made = module_of(node_of(module, f"conv{rank}d"))
    assert made.padding_mode == "zeros" and not isinstance(made.padding, str)
    assert made.get_parameter("weight") is module.get_parameter("conv.weight")
    return module


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_modes_become_a_pad(rank: int, mode: str) -> None:
    module = check(rank, ["pad", f"conv{rank}d"], kernel_size=3, padding=1, padding_mode=mode)
    assert options(node_of(module, "pad")) == {"pad": (1,) * 2 * rank, "mode": mode, "value": None}


def test_sides_of_a_pad_are_listed_last_first() -> None:
    given: dict[str, Any] = {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "reflect"}
    module = check(2, ["pad", "conv2d"], **given)
    assert options(node_of(module, "pad"))["pad"] == (2, 2, 1, 1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_same_with_equal_sides_is_a_number(rank: int) -> None:
    module = check(rank, [f"conv{rank}d"], kernel_size=3, padding="same", dilation=2)
    assert module_of(node_of(module, f"conv{rank}d")).padding == (2,) * rank


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_same_with_unequal_sides_is_a_pad(rank: int) -> None:
    module = check(rank, ["pad", f"conv{rank}d"], kernel_size=4, padding="same")
    given = options(node_of(module, "pad"))
    assert (given["pad"], given["mode"], given["value"]) == ((1, 2) * rank, "constant", 0.0)


def test_valid_is_zero() -> None:
    module = check(2, ["conv2d"], kernel_size=3, padding="valid")
    assert module_of(node_of(module, "conv2d")).padding == (0, 0)


def test_same_with_a_mode() -> None:
    check(2, ["pad", "conv2d"], kernel_size=4, padding="same", padding_mode="circular")


def test_the_users_module_keeps_its_padding() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    canonical(nn.Sequential(conv), torch.randn(1, 2, 5, 5))
    assert (conv.padding_mode, conv.padding) == ("reflect", (1, 1))


def test_a_convolution_called_twice() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    model = One(lambda m, x: m.conv(m.conv(x)), conv=conv).eval()
    module = canonical(model, torch.randn(1, 2, 5, 5))
    assert names(module) == ["pad", "conv2d", "pad", "conv2d"]
    check_eager(model, module, torch.randn(1, 2, 5, 5))


def test_a_padded_convolution_still_fuses() -> None:
    model = trained(
        nn.Sequential(
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(2), nn.ReLU()
        )
    )
    assert names(fused(model, torch.randn(1, 2, 5, 5))) == ["pad", "conv2d", "relu"]
