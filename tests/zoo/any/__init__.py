"""Small models written the way people write them: one file a family, each with its ``CASES``."""

from __future__ import annotations

from typing import Final

from tests.zoo.any import (
    blocks,
    classic,
    containers,
    convnext,
    detection,
    generators,
    googlenet,
    heads,
    huggingface,
    mixers,
    regnet,
    segmentation,
    sequence,
    sharing,
    spelling,
    swin,
    vit,
)
from tests.zoo.any.case import Case

_FAMILIES: Final = (
    blocks, classic, containers, convnext, detection, generators, googlenet, heads, huggingface,
    mixers, regnet, segmentation, sequence, sharing, spelling, swin, vit,
)  # fmt: skip

CASES: Final[dict[str, Case]] = {
    name: case for family in _FAMILIES for name, case in family.CASES.items()
}
"""Every model, by name."""
