"""What uncaptured code reads of the layers it calls: noted with what it is for, and only then."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.graph.reads import description, watching


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gain + self.inner.weight.sum()


def test_what_the_module_itself_reads_is_not_noted() -> None:
    block = Block()
    with watching(block) as reads:
        block(torch.randn(2, 4))
    assert not reads.described
    assert not reads.computed


def test_types_and_sizes_are_not_numbers() -> None:
    layer = nn.Linear(3, 5)
    with watching(layer) as reads:
        weight = layer.weight
        assert weight.dtype is torch.float32
        assert weight.device.type == "cpu"
        assert tuple(weight.shape) == (5, 3)
        assert weight.size(0) == len(weight) == 5
        assert weight.dim() == weight.ndim == 2
        assert weight.is_floating_point()
    assert reads.described == {"weight"}
    assert not reads.computed


def test_numbers_are_noted_whatever_reads_them() -> None:
    for use in (
        lambda w: w + 1,
        lambda w: nn.functional.linear(torch.ones(1, 3), w),
        lambda w: w.sum().item(),
        lambda w: torch.stack([w, w]),
        lambda w: w.numpy(),
        lambda w: w[0],
    ):
        layer = nn.Linear(3, 5)
        with watching(layer) as reads:
            use(layer.weight)
        assert reads.computed == {"weight"}


def test_tensors_of_layers_within_count_as_used() -> None:
    block = Block()
    with watching(block) as reads:
        assert block.inner.weight.dtype is torch.float32
    assert reads.computed == {"inner.weight"}


def test_classes_and_hooks_are_left_as_found_on_failure_too() -> None:
    block = Block()
    try:
        with watching(block):
            block(torch.randn(2, 3))
    except RuntimeError:
        pass
    assert type(block) is Block
    assert type(block.inner) is nn.Linear
    assert not block._forward_hooks
    assert not block._forward_pre_hooks


def test_reading_after_a_call_that_failed_is_noted() -> None:
    block = Block()
    with watching(block) as reads:
        try:
            block(torch.randn(2, 3))
        except RuntimeError:
            assert block.gain.dtype is torch.float32
    assert reads.described == {"gain"}


def test_a_description_has_sizes_and_no_numbers() -> None:
    made = description(torch.randn(1000, 1000, dtype=torch.bfloat16))
    assert made.shape == (1000, 1000)
    assert made.dtype is torch.bfloat16
    assert made.isnan().all()
    assert made.untyped_storage().nbytes() == 2
