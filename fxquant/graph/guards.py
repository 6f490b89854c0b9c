"""Guards: the checks, inside a captured graph, that a call takes the way the capture took.

Each is an ordinary function in the graph, so copies, pickles and passes need to know nothing of
them; each hands itself on when it is traced anew, as unpickling a graph module does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node
from torch.overrides import handle_torch_function, has_torch_function

from fxquant.errors import GuardError
from fxquant.graph.containers import mismatch, pick, rebuild
from fxquant.graph.export_conditions import check_conditions, check_value
from fxquant.graph.proxies import truth


def check_answer(found: Any, expected: Any, where: str) -> None:
    """Refuse a call in which a question about sizes has another answer than when captured.

    Args:
        found: the answer in this call.
        expected: the answer when the model was captured.
        where: the user's line that asked, ``file.py:12: if x.size(0) > 1:``.

    Raises:
        GuardError: the answers differ.
    """
    if type(found) is type(expected) and found == expected:
        return
    if has_torch_function((found,)):
        handle_torch_function(check_answer, (found,), found, expected, where)
        return
    raise GuardError(
        f"{where}\n  this line was answered {_said(expected)} when the model was captured, and in "
        f"this call the answer is {_said(found)}: the graph holds only the way taken then. Feed "
        "inputs like the example, or quantize again with example_inputs like these"
    )


def check_cases(found: tuple[Any, ...], cases: tuple[tuple[Any, ...], ...], where: str) -> None:
    """Refuse a call in which several questions have answers that go together in no known case.

    Args:
        found: the answers in this call.
        cases: for each case in which the graph is right, the answers to all of them.
        where: the user's line that asked the first.

    Raises:
        GuardError: it is none of the cases.
    """
    if has_torch_function(found):
        handle_torch_function(check_cases, found, found, cases, where)
        return
    if tuple(found) not in cases:
        raise GuardError(
            f"{where}\n  this line and others were answered {' or '.join(map(str, cases))} when "
            f"the model was captured, and in this call {tuple(found)}: the graph holds "
            "only the ways taken then. Feed inputs like the example, or quantize again with "
            "example_inputs like these"
        )


def _said(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else repr(value)


def check_input(
    value: Any, rank: int | None, dtype: torch.dtype | None, device: str, name: str, where: str
) -> None:
    """Refuse an input about which the code asked, and which differs from the example in that.

    Args:
        value: the input.
        rank: how many dimensions it had, if a line depended on that.
        dtype: its dtype, if a line depended on that.
        device: the type of its device, if a line depended on that; else empty.
        name: the name of the argument.
        where: the first of the user's lines that asked.

    Raises:
        GuardError: the input differs.
    """
    if has_torch_function((value,)):
        handle_torch_function(check_input, (value,), value, rank, dtype, device, name, where)
        return
    if not isinstance(value, Tensor):
        raise GuardError(f"input {name!r} is a {type(value).__name__}, not a tensor")
    facts = (
        ("dimensions", rank, value.dim()),
        ("dtype", dtype, value.dtype),
        ("device", device or None, value.device.type),
    )
    for what, expected, found in facts:
        if expected is not None and found != expected:
            raise GuardError(
                f"{where}\n  this line depends on the {what} of {name!r}: {expected} when the "
                f"model was captured, {found} in this call. The graph holds only the way taken "
                "then: feed inputs like the example, or quantize again with example_inputs like "
                "these"
            )


def check_bound(value: Any, expected: Any, name: str, optional: bool = False) -> None:
    """Refuse a call that changes an argument the graph was captured with.

    Args:
        value: the argument in this call.
        expected: the argument it was captured with.
        name: the name of the argument.
        optional: whether ``None`` stands for an argument that is left out.

    Raises:
        GuardError: the value differs.
    """
    if optional and value is None:
        return
    if value is expected or (type(value) is type(expected) and _same(value, expected)):
        return
    if has_torch_function((value,)) and not isinstance(value, Tensor):
        handle_torch_function(check_bound, (value,), value, expected, name, optional)
        return
    again = name if isinstance(value, Tensor) else f"{name}={_shown(value)}"
    raise GuardError(
        f"argument {name!r} is {_shown(value)}, but this graph was captured with "
        f"{_shown(expected)}: the graph holds only that case. Quantize again with {again} in "
        "example_inputs"
    )


def _shown(value: Any) -> str:
    """A value for a message: no one reads the numbers of a tensor there."""
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"


def _same(value: Any, expected: Any) -> bool:
    if isinstance(expected, tuple | list):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(
            type(a) is type(b) and _same(a, b) for a, b in pairs
        )
    if isinstance(expected, Tensor):
        return value is expected
    return bool(value == expected)


def check_given(value: Any, name: str) -> None:
    """Refuse a call that leaves out a tensor the graph was captured with.

    Raises:
        GuardError: it is no tensor.
    """
    if isinstance(value, Tensor):
        return
    if has_torch_function((value,)):
        handle_torch_function(check_given, (value,), value, name)
        return
    raise GuardError(
        f"argument {name!r} is {value!r}, but this graph was captured with a tensor: the graph "
        f"holds only that case. Quantize again without {name!r} in example_inputs"
    )


def count_parts(size: Any, parts: Any, how: str) -> Any:
    """How many parts ``split`` or ``chunk`` makes of a dimension.

    Args:
        size: how long the dimension is.
        parts: the size of a part for ``split``, the number wanted for ``chunk``.
        how: ``split`` or ``chunk``.

    Example:
        >>> count_parts(7, 3, "split"), count_parts(5, 4, "chunk")
        (3, 3)
    """
    if has_torch_function((size, parts)):
        return handle_torch_function(count_parts, (size, parts), size, parts, how)
    each = -(-size // parts) if how == "chunk" else parts
    return max(1, -(-size // each)) if each else parts


def check_structure(value: Any, spec: tuple[Any, ...], name: str) -> None:
    """Refuse a container that is built in another way than the example's.

    Args:
        value: the container.
        spec: how the example was built, see :mod:`fxquant.graph.containers`.
        name: the name of the argument.

    Raises:
        GuardError: types, keys, lengths or constants differ.
    """
    if has_torch_function((value,)) and not isinstance(value, Tensor):
        handle_torch_function(check_structure, (value,), value, spec, name)
        return
    why = mismatch(value, spec, name)
    if why is not None:
        raise GuardError(
            f"{why}: the graph holds only the case it was captured with. Quantize again with "
            "example_inputs like these"
        )


GUARDS: Final[frozenset[Callable[..., Any]]] = frozenset(
    {
        check_answer,
        check_cases,
        check_input,
        check_bound,
        check_given,
        check_structure,
        check_conditions,
        check_value,
    }
)
_PLUMBING: Final[frozenset[Callable[..., Any]]] = frozenset(
    {*GUARDS, count_parts, truth, pick, rebuild, torch._assert}
)


def is_plumbing(node: Node) -> bool:
    """Whether a node checks, takes apart or puts together, and computes nothing of the model."""
    return node.op == "call_function" and node.target in _PLUMBING
