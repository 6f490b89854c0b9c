"""Op table: tensors put side by side, and tensors cut into parts."""

from __future__ import annotations

from typing import Final

import torch

from fxquant.graph.ops import Kind
from fxquant.graph.table_entry import entry, sig, spellings

_JOINS: Final = (
    entry(
        "cat",
        Kind.JOIN,
        torch.cat,
        sig(lambda tensors, dim=0: None),
        tensors=("tensors",),
        functions=spellings((torch.concat, torch.concatenate), lambda tensors, dim=0: None),
    ),
    entry("stack", Kind.JOIN, torch.stack, sig(lambda tensors, dim=0: None), tensors=("tensors",)),
)

_SPLITS: Final = (
    entry(
        "chunk",
        Kind.SPLIT,
        torch.chunk,
        sig(lambda input, chunks, dim=0: None),
        alias=True,
        methods=spellings(("chunk",), lambda input, chunks, dim=0: None),
    ),
    entry(
        "split",
        Kind.SPLIT,
        torch.split,
        sig(lambda input, split_size_or_sections, dim=0: None),
        alias=True,
        methods=spellings(("split",), lambda input, split_size_or_sections, dim=0: None),
    ),
    entry(
        "unbind",
        Kind.SPLIT,
        torch.unbind,
        sig(lambda input, dim=0: None),
        alias=True,
        methods=spellings(("unbind",), lambda input, dim=0: None),
    ),
)

JOINS: Final = (*_JOINS, *_SPLITS)
