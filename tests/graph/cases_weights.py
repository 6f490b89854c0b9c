"""Spelling cases: ops with parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import nn

from tests.graph.spelling import Case, Spelled
from tests.helpers import trained


def _conv(rank: int, make: Callable[..., nn.Module]) -> Case:
    kernel, one, two = (3,) * rank, (1,) * rank, (2,) * rank
    return Case(
        (2, 4) + (7,) * rank,
        {"stride": two, "padding": one, "dilation": one, "groups": 2},
        (Spelled(lambda: make(4, 6, 3, stride=2, padding=1, groups=2)),),
        {"weight": (6, 2, *kernel), "bias": (6,)},
    )


def _deconv(rank: int, make: Callable[..., nn.Module]) -> Case:
    kernel, one, two = (3,) * rank, (1,) * rank, (2,) * rank
    given = {"stride": two, "padding": one, "output_padding": one, "groups": 2, "dilation": one}
    return Case(
        (2, 4) + (4,) * rank,
        given,
        (Spelled(lambda: make(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)),),
        {"weight": (4, 3, *kernel), "bias": (6,)},
    )


def _norm(make: Callable[..., nn.Module], *sides: int) -> Spelled:
    return Spelled(lambda: trained(make(4, eps=1e-3)), (2, 4, *sides))


WEIGHTS: Final[dict[str, Case]] = {
    "conv1d": _conv(1, nn.Conv1d),
    "conv2d": _conv(2, nn.Conv2d),
    "conv3d": _conv(3, nn.Conv3d),
    "conv_transpose1d": _deconv(1, nn.ConvTranspose1d),
    "conv_transpose2d": _deconv(2, nn.ConvTranspose2d),
    "conv_transpose3d": _deconv(3, nn.ConvTranspose3d),
    "linear": Case(
        modules=(
            Spelled(lambda: nn.Linear(6, 3)),
            Spelled(lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(6, 3)),
        ),
        parameters={"weight": (3, 6), "bias": (3,)},
    ),
    "batch_norm": Case(
        options={"momentum": 0.1, "eps": 1e-3},
        modules=(
            _norm(nn.BatchNorm1d, 5),
            _norm(nn.BatchNorm2d, 5, 5),
            _norm(nn.BatchNorm3d, 3, 3, 3),
            _norm(nn.SyncBatchNorm, 5, 5),
        ),
        parameters={"running_mean": (4,), "running_var": (4,), "weight": (4,), "bias": (4,)},
    ),
    "layer_norm": Case(
        options={"normalized_shape": (6,), "eps": 1e-3},
        modules=(Spelled(lambda: nn.LayerNorm(6, eps=1e-3)),),
        parameters={"weight": (6,), "bias": (6,)},
    ),
    "group_norm": Case(
        options={"num_groups": 2, "eps": 1e-3},
        modules=(Spelled(lambda: nn.GroupNorm(2, 4, eps=1e-3)),),
        parameters={"weight": (4,), "bias": (4,)},
    ),
    "embedding_bag": Case(modules=(Spelled(lambda: nn.EmbeddingBag(5, 3)),)),
    "embedding": Case(
        options={"padding_idx": 1},
        modules=(Spelled(lambda: nn.Embedding(5, 3, padding_idx=1)),),
        parameters={"weight": (5, 3)},
    ),
    "instance_norm": Case(
        options={"momentum": 0.1, "eps": 1e-3},
        modules=(
            Spelled(lambda: nn.InstanceNorm1d(4, eps=1e-3), (2, 4, 5)),
            Spelled(lambda: nn.InstanceNorm2d(4, eps=1e-3, affine=True), (2, 4, 5, 5)),
            Spelled(lambda: nn.InstanceNorm3d(4, eps=1e-3), (2, 4, 3, 3, 3)),
        ),
        parameters={"weight": (4,), "bias": (4,)},
    ),
    "rms_norm": Case(
        options={"normalized_shape": (6,), "eps": 1e-3},
        modules=(Spelled(lambda: nn.RMSNorm(6, eps=1e-3)),),
        parameters={"weight": (6,)},
    ),
    "normalize": Case(options={"p": 1.5, "dim": 2, "eps": 1e-3}),
    "local_response_norm": Case(
        options={"size": 3, "alpha": 0.01, "beta": 0.5, "k": 2.0},
        modules=(Spelled(lambda: nn.LocalResponseNorm(3, 0.01, 0.5, 2.0)),),
    ),
    "prelu": Case(modules=(Spelled(lambda: nn.PReLU(4)),), parameters={"weight": (4,)}),
}
