"""Random inputs for a match: shapes that its layers take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.graph.held import held_tensor
from fxquant.graph.op_table import module_of
from fxquant.patterns.match import Match


def samples(match: Match, inputs: tuple[str, ...]) -> Iterator[list[Tensor]]:
    """Random inputs of shapes that may fit, the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    likely: list[tuple[tuple[int, ...], ...]] = []
    fixed: dict[int, Tensor] = {}
    for place, name in enumerate(inputs):
        node = match.bound.get(name)
        held = held_tensor(node) if isinstance(node, Node) else None
        if held is not None:
            fixed[place] = held.detach()
            likely.append(((),))
            continue
        read = [m for m in sorted(match.nodes) if node in m.all_input_nodes]
        known = tuple(shape for m in read for shape in _shapes(m))
        likely.append(known or _USUAL)
    for shapes in itertools.islice(itertools.product(*_with_each_other(likely)), 200):
        yield [
            fixed.get(place, torch.randn(shape, generator=generator))
            for place, shape in enumerate(shapes)
        ]


_USUAL: Final = ((2, 8, 8, 8), (2, 8, 8), (2, 8), (2, 8, 4, 4, 4))


def _with_each_other(
    likely: list[tuple[tuple[int, ...], ...]],
) -> list[tuple[tuple[int, ...], ...]]:
    """An input that nothing says the shape of may have that of another, or broadcast."""
    known = tuple(dict.fromkeys(s for shapes in likely if shapes is not _USUAL for s in shapes))
    return [(*known, *_USUAL, (1,)) if shapes is _USUAL else shapes for shapes in likely]


def _shapes(node: Node) -> tuple[tuple[int, ...], ...]:
    """Shapes that a layer takes."""
    if node.op != "call_module":
        return ()
    layer: Any = module_of(node)
    if isinstance(layer, nn.modules.conv._ConvNd):
        spans = zip(layer.kernel_size, layer.dilation, strict=True)
        side = max(8, *((kernel - 1) * dilation + 1 for kernel, dilation in spans))
        return ((2, layer.in_channels, *[side] * len(layer.kernel_size)),)
    if isinstance(layer, nn.Linear):
        return ((2, layer.in_features), (2, 3, layer.in_features))
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        return tuple((2, layer.num_features, *[6] * more) for more in (2, 0, 1, 3))
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return ((2, 3, *layer.normalized_shape),)
    if isinstance(layer, nn.GroupNorm):
        return ((2, layer.num_channels, 6, 6),)
    return ()
