"""Linear weights as oneDNN packs them, and the plain ones that they are made of.

Layers that share a weight share what is packed; a state dict has one tensor for all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fxquant.backends.x86_pairs import asked_once

_ONEDNN: Final = torch.ops.onednn

_SAVED: Final[MutableMapping[Tensor, weakref.ref[Tensor]]] = WeakIdKeyDictionary()
"""For a packed weight, the plain one in the last state dict, as long as anyone holds that."""


def saved_of(packed: Tensor | None) -> Tensor | None:
    """The plain weight in a state dict that somebody still holds; ``None`` where there is none."""
    found = _SAVED.get(packed) if packed is not None else None
    return found() if found is not None else None


def note_saved(packed: Tensor, plain: Tensor) -> None:
    """A state dict holds ``plain``; all that share ``packed`` may hold the same.

    Args:
        packed: what the kernel reads.
        plain: int8, of the shape of the layer's weight.
    """
    _SAVED[packed] = weakref.ref(plain)


def unpacked_linear(packed: Tensor) -> Tensor:
    """The int8 ``[outputs, inputs]`` that ``qlinear_prepack`` packed."""
    return packed.to_dense().t().contiguous()


@asked_once
def unpacks_exactly() -> bool:
    """Whether this torch gives the plain weight back, of sizes that fill no block too."""
    generator = torch.Generator().manual_seed(0)
    for size in ((1, 1), (3, 70), (16, 64), (65, 33), (130, 257)):
        plain = torch.randint(-128, 128, size, generator=generator).to(torch.int8)
        if not torch.equal(unpacked_linear(_ONEDNN.qlinear_prepack(plain, None)), plain):
            return False
    return True
