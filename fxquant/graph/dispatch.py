"""Dispatch modes that see every op of torch, and do not load its compiler."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class QuietMode(TorchDispatchMode):
    """A dispatch mode that leaves ``torch._dynamo`` alone.

    torch keeps its compiler out of what a mode does by loading it first, a second of work in every
    process. Nothing is compiled where fxquant's modes are active; where a user's own compiled
    function runs under one, the compiler is there already.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch asks this of every mode."""
        return False
