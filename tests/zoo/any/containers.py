"""What goes in and comes out: dicts, dataclasses, named tuples, options, lists, early exits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.any.case import Case, features, images, rows
from tests.zoo.common import conv_bn_act, init_convs


@dataclass
class Prediction:
    """An ordinary dataclass."""

    logits: Tensor
    features: list[Tensor]
    loss: Tensor | None = None


class Boxes(NamedTuple):
    """An ordinary named tuple."""

    boxes: Tensor
    scores: Tensor


def _trunk() -> nn.Sequential:
    return nn.Sequential(conv_bn_act(3, 16, 3, 2), conv_bn_act(16, 24, 3, 2))


class DictInDictOut(nn.Module):
    """A dict of tensors in, a nested dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk()
        self.side = nn.Linear(6, 24)
        self.heads = nn.ModuleDict({"a": nn.Linear(24, 5), "b": nn.Linear(24, 3)})
        init_convs(self)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        x = self.trunk(batch["image"]).mean((2, 3))
        x = x + torch.relu(self.side(batch["meta"]))
        return {"heads": {k: head(x) for k, head in self.heads.items()}, "features": x}


def image_and_meta(batch: int, seed: int, size: int) -> dict[str, Any]:
    """The dict as the one argument called ``batch``."""
    return {"batch": {"image": images()(batch, seed, size), "meta": features(6)(batch, seed, 0)}}


class DataclassOut(nn.Module):
    """Optional targets, keyword-only flags, a dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk()
        self.fc = nn.Linear(24, 10)
        init_convs(self)

    def forward(
        self, x: Tensor, targets: Tensor | None = None, *, return_features: bool = True
    ) -> Prediction:
        found = []
        for layer in self.trunk:
            x = layer(x)
            if return_features:
                found.append(x)
        logits = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        loss = None if targets is None else F.cross_entropy(logits, targets)
        return Prediction(logits=logits, features=found, loss=loss)


class NamedTupleOut(nn.Module):
    """Two heads, a named tuple out; a method that users call afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk()
        self.box, self.score = nn.Conv2d(24, 4, 1), nn.Conv2d(24, 1, 1)
        self.classes = ["thing"]
        init_convs(self)

    def forward(self, x: Tensor) -> Boxes:
        x = self.trunk(x)
        boxes = self.box(x).flatten(2).transpose(1, 2).exp()
        return Boxes(boxes=boxes, scores=self.score(x).sigmoid().flatten(1))


class KeywordForward(nn.Module):
    """**kwargs handed down to a block, a None among them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Conditional()
        self.fc = nn.Linear(24, 6)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = self.inner(x, **kwargs)
        return self.fc(x)


class _Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(8, 24)

    def forward(
        self, x: Tensor, context: Tensor | None = None, scale: float = 1.0, *args: Any
    ) -> Tensor:
        x = self.a(x)
        if context is not None:
            x = x + self.b(context)
        return F.silu(x) * scale


def x_and_context(batch: int, seed: int, size: int) -> dict[str, Tensor]:
    """Two keyword tensors, one of them through ``**kwargs``."""
    return {"x": features(16)(batch, seed, 0), "context": features(8)(batch, seed + 9, 0)}


class EarlyExit(nn.Module):
    """Stops after the first head if that is sure for the whole batch: depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_act(3, 16, 3, 2)
        self.exit = nn.Linear(16, 10)
        self.rest = conv_bn_act(16, 24, 3, 2)
        self.fc = nn.Linear(24, 10)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        early = self.exit(x.mean((2, 3)))
        if early.softmax(-1).amax(-1).min() > 0.999:
            return early
        return early + self.fc(self.rest(x).mean((2, 3)))


class ValueDependentGate(nn.Module):
    """A small module in the middle looks at values; everything around it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.front = _trunk()
        self.normalize = _ClampIfLarge()
        self.back = conv_bn_act(24, 24, 3)
        self.fc = nn.Linear(24, 10)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        x = self.normalize(x)
        x = self.back(x)
        return self.fc(x.mean((2, 3)))


class _ClampIfLarge(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool((x.abs() > 1e4).any()):
            return x.clamp(-1e4, 1e4)
        return x


class Experts(nn.Module):
    """Lists of modules walked with zip, indices and slices; a soft mixture of experts."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(dim, dim) for _ in range(4)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(4)])
        self.gate = nn.Linear(dim, 4)
        self.out = nn.ModuleList([nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 3)])

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.gate(x), dim=-1)
        total = torch.zeros_like(x)
        for i, (expert, norm) in enumerate(zip(self.experts, self.norms, strict=True)):
            total = total + weights[..., i : i + 1] * F.gelu(expert(norm(x)))
        for layer in self.out[:-1]:
            total = layer(total)
        return self.out[-1](total)


class LastStep(nn.Module):
    """A list of tensors in; the batch may have any length."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        assert len(xs) == 2
        return [self.b(F.relu(self.a(x)))[:, -1] for x in xs]


def two_sequences(batch: int, seed: int, size: int) -> dict[str, Any]:
    """A list of two tensors as the argument ``xs``."""
    return {"xs": [rows(12)(batch, seed, size), rows(12)(batch, seed + 5, size)]}


CASES = {
    "dict_in_dict_out": Case(DictInDictOut, image_and_meta, 32, 40),
    "dataclass_out": Case(DataclassOut, images(), 32, 40, plain=True),
    "named_tuple_out": Case(NamedTupleOut, images(), 32, 40),
    "keyword_forward": Case(KeywordForward, x_and_context, 0),
    "early_exit": Case(EarlyExit, images(), 32, 40, empty=False),
    "value_dependent_gate": Case(ValueDependentGate, images(), 32, 40),
    "experts": Case(Experts, rows(16), 8, 12),
    "list_in_list_out": Case(LastStep, two_sequences, 6, 9),
}
