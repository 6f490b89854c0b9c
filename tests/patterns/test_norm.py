"""Folding of batch norms: where it happens, where not and why, and that outputs stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.edit import Editor
from fxquant.graph.op_table import module_of
from fxquant.passes.configure import Configure
from fxquant.passes.fuse import Fuse
from fxquant.patterns.norm import affine_of, folded, output_channels
from tests.helpers import (
    FLOAT32,
    One,
    canonical,
    check_eager,
    check_rule,
    close_share,
    fused,
    misses,
    names,
    node_of,
    run,
    trained,
)

NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
DECONVS: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


def image(rank: int, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, *(9, 8, 7)[:rank])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(rank: int, bias: bool, groups: int) -> None:
    conv = CONVS[rank](4, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
    model = trained(nn.Sequential(conv, NORMS[rank](8)))
    module = check_rule(model, image(rank), ops=[f"conv{rank}d"])
    assert node_of(module, f"conv{rank}d").target == "0"


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_convolutions(rank: int, bias: bool, groups: int) -> None:
    conv = DECONVS[rank](4, 8, 3, stride=2, output_padding=1, groups=groups, bias=bias)
    model = trained(nn.Sequential(conv, NORMS[rank](8)))
    check_rule(model, image(rank), ops=[f"conv_transpose{rank}d"])


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    model = trained(nn.Sequential(nn.Linear(6, 5, bias=bias), nn.BatchNorm1d(5)))
    check_rule(model, torch.randn(3, 6), ops=["linear"])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_with_an_activation(rank: int) -> None:
    for layer in (CONVS[rank](4, 4, 3), DECONVS[rank](4, 4, 3)):
        model = trained(nn.Sequential(layer, NORMS[rank](4), nn.Hardswish()))
        name = "conv_transpose" if isinstance(layer, nn.modules.conv._ConvTransposeNd) else "conv"
        check_rule(model, image(rank), ops=[f"{name}{rank}d", "hardswish"])


def test_two_norms_in_a_row() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    check_rule(model, image(2), ops=["conv2d"])


def test_a_norm_without_weights() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)))
    check_rule(model, image(2), ops=["conv2d"])


def test_a_norm_with_a_tiny_variance_and_a_dead_channel() -> None:
    norm = nn.BatchNorm2d(4)
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), norm))
    assert norm.running_var is not None
    norm.running_var[0] = 0.0
    norm.weight.data[1] = 0.0
    check_rule(model, image(2), ops=["conv2d"])


def test_the_formula_by_hand() -> None:
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0).eval()
    with torch.no_grad():
        conv.weight.fill_(3.0), conv.bias.fill_(5.0)  # type: ignore[union-attr]
        norm.weight.fill_(2.0), norm.bias.fill_(7.0)
    norm.running_mean, norm.running_var = torch.tensor([1.0]), torch.tensor([4.0])
    scale, shift = affine_of(norm)
    assert (scale.item(), shift.item()) == (1.0, 6.0)  # 2 / sqrt(4); 7 - 1 * 1
    made = folded(conv, norm)
    assert made.get_parameter("weight").item() == 3.0
    assert made.get_parameter("bias").item() == 11.0
    assert output_channels(conv) == output_channels(nn.Linear(3, 1)) == 1


def test_folding_leaves_the_modules_it_read() -> None:
    conv, norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
    trained(nn.Sequential(conv, norm))
    before = [p.detach().clone() for p in (*conv.parameters(), *norm.parameters())]
    folded(conv, norm)
    after = [*conv.parameters(), *norm.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


REFUSED: list[tuple[Callable[[], nn.Module], list[str], str]] = [
    (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        ["conv2d", "batch_norm"],
        "the batch norm tracks no running statistics",
    ),
    (
        lambda: One(
            lambda m, x: _both(m, m.conv(x)), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)
        ),
        ["conv2d", "batch_norm", "add"],
        "conv2d %conv has more than one user: %add",
    ),
    (
        lambda: One(
            lambda m, x: m.bn(m.conv(x).flatten(0, 1)),
            conv=nn.Conv2d(4, 4, 1),
            bn=nn.BatchNorm1d(9),
        ),
        ["conv2d", "flatten", "batch_norm"],
        "expected conv1d or conv2d or conv3d or conv_transpose1d or conv_transpose2d or "
        "conv_transpose3d, found flatten %flatten",
    ),
]


def _both(m: Any, y: Any) -> Any:
    return m.bn(y) + y


@pytest.mark.parametrize(("make", "ops", "reason"), REFUSED, ids=lambda v: None)
def test_where_it_is_refused(make: Callable[[], nn.Module], ops: list[str], reason: str) -> None:
    model, x = trained(make()), torch.randn(2, 4, 9, 9)
    module = fused(model, x)
    assert names(module) == ops
    check_eager(model, module, x)
    if "flatten" not in ops:
        assert reason in [why for rule, _, why in misses(model, x) if rule == "fold-conv-bn"]


def test_a_norm_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).train()
    assert names(fused(model, image(2), train=True)) == ["conv2d", "batch_norm"]
    found = [why for rule, _, why in misses(model, image(2), train=True) if rule == "fold-conv-bn"]
    assert found == ["the batch norm is in training mode"]


def test_another_number_of_channels_is_refused() -> None:
    """Only broken models have it: the error must come from them, at their line, not from us."""
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(3)))
    found = [why for rule, _, why in misses(model) if rule == "fold-conv-bn"]
    assert found == ["the batch norm has 3 channels, the layer before it 4"]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (
            (2, 5, 6),
            "the linear's output has 3 dimensions, so the batch norm normalizes dimension 1, not "
            "the features",
        ),
        (None, "the rank of the linear's input is not known: give example_inputs"),
    ],
)
def test_linear_on_other_than_two_dimensions(shape: tuple[int, ...] | None, reason: str) -> None:
    # Five features and five places: nothing but the rank tells these two apart.
    model = trained(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    args = () if shape is None else (torch.randn(shape),)
    assert names(fused(model, *args)) == ["linear", "batch_norm"]
    assert reason in [why for rule, _, why in misses(model, *args) if rule == "fold-linear-bn"]
    x = torch.randn(2, 5, 6)
    check_eager(model, fused(model, *args), x)


def test_an_embedding_adds_a_dimension() -> None:
    """[N, 5] of indices become [N, 5, 6]: a rank carried over from the input would be wrong."""
    model = trained(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.BatchNorm1d(5)))
    x = torch.randint(0, 9, (3, 5))
    check_eager(model, fused(model, x), x)


def test_a_matrix_product_takes_the_larger_rank() -> None:
    model = trained(
        One(
            lambda m, x: m.bn(m.lin(torch.matmul(x, m.weight))),
            lin=nn.Linear(6, 5),
            bn=nn.BatchNorm1d(5),
            weight=nn.Parameter(torch.randn(3, 6, 6)),
        )
    )
    x = torch.randn(5, 6)
    check_eager(model, fused(model, x), x)


def test_a_layer_that_stays_float_is_folded_too() -> None:
    model, x = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())), image(2)
    module = fused(model, x, overrides=(("0", None),))
    assert names(module) == ["conv2d", "relu"]
    assert close_share(module(x), model(x)) <= FLOAT32


def test_memory_that_is_written_in_place_is_not_folded() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.conv(x)
        y[:, 0] = 0.0
        return m.bn(y)

    model = trained(One(body, conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)))
    module = fused(model, image(2))
    assert "batch_norm" in names(module)
    check_eager(model, module, image(2))


def test_folding_twice_changes_nothing() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    module = run(canonical(model, image(2)), Configure(), Fuse())
    weight = module_of(node_of(module, "conv2d")).get_parameter("weight")
    again = Editor(module)
    Fuse().run(again)
    assert again.log == []
    assert module_of(node_of(module, "conv2d")).get_parameter("weight") is weight


def test_the_log_says_what_was_folded() -> None:
    module = run(
        canonical(trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))), Configure()
    )
    editor = Editor(module)
    Fuse().run(editor)
    (edit,) = editor.log
    assert (edit.rule, edit.removed, edit.changed) == ("fold-conv-bn", ("_1",), ("_0",))
    assert set(edit.origins) == {"_0", "_1"}
    assert edit.line.startswith("norm.py:")


def test_functional_batch_norm_folds_too() -> None:
    def body(m: Any, x: Any) -> Any:
        return nn.functional.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var)

    model = trained(One(body, conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)))
    module = fused(model, image(2))
    assert names(module) == ["conv2d"]
    x = image(2)
    assert close_share(module(x), model(x)) <= FLOAT32
