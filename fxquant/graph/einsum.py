"""Equations of ``einsum``: what they say, as axes to bring together, multiply and sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fxquant.graph.ops import Unreadable

REST: Final = "..."
"""The axes that an equation does not name, where it is not known how many they are."""

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Equation:
    """An equation whose terms are all known.

    Args:
        terms: the axes of every operand; :data:`REST` can only come first.
        result: the axes of the result.
    """

    terms: tuple[Axes, ...]
    result: Axes


@dataclass(frozen=True)
class Contraction:
    """A product of two operands as one of matrices.

    Args:
        alone: for each operand the axes that are summed before the product.
        batch: axes of both operands that stay.
        left: axes of the first operand that stay.
        right: axes of the second operand that stay.
        summed: axes of both operands that the product sums over.
    """

    alone: tuple[Axes, Axes]
    batch: Axes
    left: Axes
    right: Axes
    summed: Axes


def read_equation(text: str, ranks: Sequence[int | None]) -> Equation | Unreadable:
    """Read an equation.

    Args:
        text: such as ``"bqd,bkd->bqk"`` or ``"...i,ij->...j"``.
        ranks: for every operand how many dimensions it has, ``None`` where that is not known.

    Returns:
        The equation, or why it cannot be written with products of matrices.

    Example:
        >>> read_equation("ij,jk", (2, 2))
        Equation(terms=(('i', 'j'), ('j', 'k')), result=('i', 'k'))
    """
    text = text.replace(" ", "")
    given, arrow, wanted = text.partition("->")
    words = given.split(",")
    if len(words) != len(ranks):
        return Unreadable(f"einsum {text!r} has {len(words)} terms for {len(ranks)} operands")
    for word in words:
        if any(count > 1 for count in Counter(word.replace(REST, "")).values()):
            return Unreadable(f"einsum {text!r} takes a diagonal: {word!r} names an axis twice")
    rest = _rest_axes(words, ranks)
    if isinstance(rest, Unreadable):
        return rest
    if not arrow:
        wanted = (REST if REST in given else "") + _implied(given)
    terms = tuple(_axes(word, own) for word, own in zip(words, rest, strict=True))
    longest = max(rest, key=len)
    result = _axes(wanted, longest)
    if REST not in wanted and longest:
        return Unreadable(f"einsum {text!r} sums over the axes that '...' stands for")
    if (REST,) == longest and any(REST in axes[1:] for axes in (*terms, result)):
        return Unreadable(f"einsum {text!r}: it is not known how many axes '...' stands for")
    return Equation(terms, result)


def _implied(given: str) -> str:
    counts = Counter(given.replace(REST, "").replace(",", ""))
    return "".join(sorted(axis for axis, count in counts.items() if count == 1))


def _axes(word: str, rest: Axes) -> Axes:
    before, dots, after = word.partition(REST)
    return (*before, *(rest if dots else ()), *after)


def _rest_axes(words: Sequence[str], ranks: Sequence[int | None]) -> list[Axes] | Unreadable:
    """What ``...`` stands for in each term: named axes, aligned at their end, or REST itself."""
    holds = [REST in word for word in words]
    if not all(rank is not None for rank, has in zip(ranks, holds, strict=True) if has):
        return [(REST,) if has else () for has in holds]
    counts = [
        (rank or 0) - len(word.replace(REST, "")) if has else 0
        for word, rank, has in zip(words, ranks, holds, strict=True)
    ]
    if min(counts) < 0:
        return Unreadable(f"an operand of einsum {','.join(words)!r} has too few dimensions")
    most = max(counts)
    names = tuple(f"...{place}" for place in range(most))
    return [names[most - count :] for count in counts]


def contraction(a: Axes, b: Axes, wanted: Axes) -> Contraction:
    """Sort the axes of two operands by what becomes of them.

    Args:
        a: axes of the first operand.
        b: axes of the second operand.
        wanted: axes that must stay.

    Example:
        >>> contraction(("b", "q", "d"), ("b", "k", "d"), ("b", "q", "k")).summed
        ('d',)
    """
    both = [axis for axis in a if axis in b]
    # Axes of "..." broadcast, which only batches do; what one operand lacks is broadcast too.
    rest = [axis for axis in wanted if axis.startswith(REST)]
    kept = [axis for axis in wanted if axis in both and axis not in rest]
    return Contraction(
        alone=(
            tuple(axis for axis in a if axis not in b and axis not in wanted),
            tuple(axis for axis in b if axis not in a and axis not in wanted),
        ),
        batch=(*rest, *kept),
        left=tuple(axis for axis in wanted if axis in a and axis not in b and axis not in rest),
        right=tuple(axis for axis in wanted if axis in b and axis not in a and axis not in rest),
        summed=tuple(axis for axis in both if axis not in wanted),
    )
