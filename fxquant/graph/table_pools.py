"""Op table: max pools, with and without indices, and what undoes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.ops import Function, Kind, Op, Spelling
from fxquant.graph.table_entry import entry, one_way, sig, spellings

WITH_INDICES: Final = "_with_indices"
"""How the name of a pool that says where its values were ends."""

_options = lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False: None
_functional = (
    lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: (
        None
    )
)
_size = lambda input, output_size: None
_size_functional = lambda input, output_size, return_indices=False: None


def _asks(indices: bool) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """Whether a call of the functional form wants the indices, too."""

    def read(given: dict[str, Any]) -> dict[str, Any] | None:
        rest = dict(given)
        return rest if rest.pop("return_indices") is indices else None

    return read


def _pair(
    name: str,
    like: Callable[..., Any],
    functional: Callable[..., Any],
    targets: tuple[Function, Function],
    module: type[nn.Module],
    direct: dict[Function, Spelling],
    located: tuple[Function, ...] = (),
) -> tuple[Op, Op]:
    """A pool, and the same pool when it says where its values were."""
    target, with_indices = targets
    return (
        entry(
            name,
            Kind.MOVE,
            target,
            sig(like),
            functions=spellings((target,), functional, read=_asks(False)) | direct,
            modules=(module,),
            tidy=one_way,
        ),
        entry(
            f"{name}{WITH_INDICES}",
            Kind.PICK,
            with_indices,
            sig(like),
            # F.max_pool2d_with_indices takes the switch, too, and gives indices whatever it says.
            absorb={"return_indices": (True, False)},
            functions=spellings((target,), functional, read=_asks(True))
            | spellings((with_indices,), functional)
            | spellings(located, like),
            tidy=one_way,
        ),
    )


def _max_pool(
    rank: int, targets: tuple[Function, Function], direct: Function, located: Function, module: Any
) -> tuple[Op, Op]:
    name = f"max_pool{rank}d"
    plain = spellings((direct,), _options)
    return _pair(name, _options, _functional, targets, module, plain, (located,))


def _adaptive(rank: int, targets: tuple[Function, Function], module: Any) -> tuple[Op, Op]:
    return _pair(f"adaptive_max_pool{rank}d", _size, _size_functional, targets, module, {})


def _unpool(rank: int, target: Function, module: type[nn.Module]) -> Op:
    return entry(
        f"max_unpool{rank}d",
        Kind.MOVE,
        target,
        sig(lambda input, indices, kernel_size, stride=None, padding=0, output_size=None: None),
        modules=(module,),
        tidy=one_way,
    )


POOLS: Final = (
    *_max_pool(
        1,
        (F.max_pool1d, F.max_pool1d_with_indices),
        torch.max_pool1d,
        torch.max_pool1d_with_indices,
        nn.MaxPool1d,
    ),
    *_max_pool(
        2,
        (F.max_pool2d, F.max_pool2d_with_indices),
        torch.max_pool2d,
        torch._C._nn.max_pool2d_with_indices,
        nn.MaxPool2d,
    ),
    *_max_pool(
        3,
        (F.max_pool3d, F.max_pool3d_with_indices),
        torch.max_pool3d,
        torch._C._nn.max_pool3d_with_indices,
        nn.MaxPool3d,
    ),
    *_adaptive(
        1, (F.adaptive_max_pool1d, F.adaptive_max_pool1d_with_indices), nn.AdaptiveMaxPool1d
    ),
    *_adaptive(
        2, (F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices), nn.AdaptiveMaxPool2d
    ),
    *_adaptive(
        3, (F.adaptive_max_pool3d, F.adaptive_max_pool3d_with_indices), nn.AdaptiveMaxPool3d
    ),
    _unpool(1, F.max_unpool1d, nn.MaxUnpool1d),
    _unpool(2, F.max_unpool2d, nn.MaxUnpool2d),
    _unpool(3, F.max_unpool3d, nn.MaxUnpool3d),
)
