"""Layers whose weight may be given with the call: what training puts in its place.

They are the user's own modules under a class derived from their own, and keep their parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph.copies import share_parameters
from fxquant.graph.op_table import class_op, register_module

_ROUNDING: Final = "rounding"
"""Where a layer that is called by a user's module has what rounds its weight."""


def _chosen(layer: Any, given: Tensor | None) -> Tensor:
    rounding = layer.__dict__.get(_ROUNDING)
    if given is None and rounding is not None:
        given = rounding(layer.weight)
    weight: Tensor = layer.weight if given is None else given
    return weight


class _Conv(nn.modules.conv._ConvNd):
    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        """As the class's own, with another weight where one is given."""
        made: Tensor = self._conv_forward(input, _chosen(self, weight), self.bias)
        return made


class TrainedConv1d(_Conv, nn.Conv1d):
    """An ``nn.Conv1d`` whose weight may be given."""


class TrainedConv2d(_Conv, nn.Conv2d):
    """An ``nn.Conv2d`` whose weight may be given."""


class TrainedConv3d(_Conv, nn.Conv3d):
    """An ``nn.Conv3d`` whose weight may be given."""


class _ConvTranspose(nn.modules.conv._ConvTransposeNd):
    def forward(
        self,
        input: Tensor,
        output_size: list[int] | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """As the class's own, with another weight where one is given."""
        dims = len(self.kernel_size)
        extra = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]  # tuples are read as lists are
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            dims,
            self.dilation,  # type: ignore[arg-type]
        )
        options = (self.stride, self.padding, extra, self.groups, self.dilation)
        made: Tensor = _TRANSPOSED[dims](input, _chosen(self, weight), self.bias, *options)
        return made


class TrainedConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """An ``nn.ConvTranspose1d`` whose weight may be given."""


class TrainedConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """An ``nn.ConvTranspose2d`` whose weight may be given."""


class TrainedConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """An ``nn.ConvTranspose3d`` whose weight may be given."""


class TrainedLinear(nn.Linear):
    """An ``nn.Linear`` whose weight may be given."""

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        """As the class's own, with another weight where one is given."""
        return F.linear(input, _chosen(self, weight), self.bias)


class TrainedEmbedding(nn.Embedding):
    """An ``nn.Embedding`` whose table may be given."""

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        """As the class's own, with another table where one is given."""
        return F.embedding(
            input,
            _chosen(self, weight),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class TrainedEmbeddingBag(nn.EmbeddingBag):
    """An ``nn.EmbeddingBag`` whose table may be given."""

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """As the class's own, with another table where one is given."""
        return F.embedding_bag(
            input,
            _chosen(self, weight),
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )


_TRANSPOSED: Final[dict[int, Any]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_TRAINED: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.Conv1d: TrainedConv1d,
    nn.Conv2d: TrainedConv2d,
    nn.Conv3d: TrainedConv3d,
    nn.ConvTranspose1d: TrainedConvTranspose1d,
    nn.ConvTranspose2d: TrainedConvTranspose2d,
    nn.ConvTranspose3d: TrainedConvTranspose3d,
    nn.Linear: TrainedLinear,
    nn.Embedding: TrainedEmbedding,
    nn.EmbeddingBag: TrainedEmbeddingBag,
}


def _register() -> None:
    for plain, trained in _TRAINED.items():
        op = class_op(plain)
        if op is not None:
            register_module(op.name, trained)


_register()


def is_trained_layer(module: nn.Module) -> bool:
    """Whether its class is one that takes weights with the call."""
    return type(module) in _TRAINED.values() or hasattr(type(module), "takes_given_weights")


def take_given_weights(module: nn.Module) -> bool:
    """Let a layer take its weight with the call; returns whether it can.

    Args:
        module: a convolution, transposed convolution, linear or embedding of a copied model; its
            class changes, nothing else.
    """
    if is_trained_layer(module):
        return True
    for plain, trained in _TRAINED.items():
        if isinstance(module, plain):
            module.__class__ = trained
            return True
    return False


def rounding_copy(layer: nn.Module, rounding: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a layer that computes with its weight rounded, wherever it is called.

    Args:
        layer: one that takes its weight with the call; the copy shares its parameters.
        rounding: gives what is left of the weight.
    """
    twin = share_parameters(layer)
    twin.__dict__[_ROUNDING] = rounding
    return twin
