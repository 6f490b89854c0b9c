"""Prepared for training, a model can be indexed and iterated over as before."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Stages(nn.Module):
    """A model whose author lets it be read as a container."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.stages = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = torch.relu(stage(x))
        return x

    def __getitem__(self, index: int) -> nn.Module:
        return self.stages[index]

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[nn.Module]:
        yield from self.stages

    def __contains__(self, module: object) -> bool:
        return module is self.stem or any(module is stage for stage in self.stages)


def prepared(model: nn.Module) -> Any:
    return fxquant.prepare(model, mode="qat", example_inputs=(torch.randn(6, 4),))


def reloaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_sequential_is_read_as_one_without_what_training_added() -> None:
    made = prepared(chain())
    for each in (made, copy.deepcopy(made), reloaded(made)):
        assert len(each) == 4 and bool(each)
        assert each[1] is each.get_submodule("1") and each[-1] is each.get_submodule("3")
        assert [type(m).__bases__[-1] is nn.Linear or type(m) for m in each][1:3] == [
            nn.BatchNorm1d,
            nn.ReLU,
        ]
        assert list(each) == [each.get_submodule(str(n)) for n in range(4)]
        with pytest.raises(IndexError):
            each[4]
    head = made[:2]
    assert type(head) is nn.Sequential and head[1] is made[1]
    x = torch.randn(6, 4)
    assert made(x).shape == (6, 3)


def test_a_class_with_methods_of_its_own_uses_them() -> None:
    made = prepared(Stages())
    assert len(made) == 2 and list(made) == list(made.stages)
    assert made[0] is made.stages[0]
    assert made.stem in made and made.fake_quant not in made


def test_what_cannot_be_read_as_a_container_still_cannot() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.fc(x)
            return made

    made = prepared(Plain())
    with pytest.raises(TypeError):
        len(made)
    with pytest.raises(TypeError):
        made[0]


def test_a_converted_model_refuses() -> None:
    made = prepared(chain())
    made.train()(torch.randn(6, 4))
    converted: Any = fxquant.convert(made, backend="reference")
    with pytest.raises(TypeError, match="not subscriptable"):
        converted[0]
    assert made[0] is made.get_submodule("0")
