"""Op table: ATen overloads as spellings, so that exported graphs read like traced ones.

Most are read off ATen's own schemas, when a graph first holds them: an overload whose parameters are those of the op, under the
same names, spells it. What ATen says in another way stands in the tables below.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch._ops import OpOverload

from fxquant.graph.ops import Function, Kind, Op, Spelling
from fxquant.graph.table_entry import sig

Arguments = dict[str, Any]


class AtenSpellings:
    """The ATen spellings of the ops of a table; each is worked out when it is first asked for.

    Args:
        ops: records of the op table.
    """

    def __init__(self, ops: tuple[Op, ...]) -> None:
        self._ops: dict[str, list[Op]] = {}
        self._found: dict[OpOverload, tuple[tuple[Op, Spelling], ...]] = {}
        for op in ops:
            if op.target is None and op.build is None:
                continue
            for name in dict.fromkeys((op.name, *_written(op), *_OTHER_NAMES.get(op.name, ()))):
                self._ops.setdefault(name, []).append(op)
        self._named = {op.name: op for op in ops}

    def of(self, overload: OpOverload) -> tuple[tuple[Op, Spelling], ...]:
        """What ``overload`` spells: nothing, or an op and how to read its arguments."""
        if overload not in self._found:
            self._found[overload] = tuple(self._read(overload))
        return self._found[overload]

    def _read(self, overload: OpOverload) -> Iterator[tuple[Op, Spelling]]:
        other = _OTHER_WORDS.get(str(overload))
        if other is not None:
            name, like, read = other
            yield self._named[name], Spelling(sig(like), read=read)
            return
        namespace, _, name = overload._schema.name.partition("::")
        if namespace != "aten":
            return
        for op in self._ops.get(name) or self._ops.get(name.rstrip("_"), []):
            spelling = _spelling(op, overload)
            if spelling is not None:
                yield op, spelling


def _written(op: Op) -> Iterator[str]:
    """What users call the op: ``torch.special.expit`` is ``aten::special_expit``."""
    for function in op.functions:
        yield str(getattr(function, "__name__", "")).rstrip("_")
    for method in op.methods:
        yield method.rstrip("_")


def _spelling(op: Op, overload: OpOverload) -> Spelling | None:
    """How ``overload`` spells ``op``, if it does."""
    schema = overload._schema
    if any(argument.is_out for argument in schema.arguments) or not _fits(op, overload):
        return None
    named = {_parameter(op, a.name): a for a in schema.arguments}
    required = [n for n, p in op.signature.parameters.items() if p.default is p.empty]
    if any(name not in named for name in required):
        return None
    extra = [a for name, a in named.items() if name not in op.signature.parameters]
    said = {*_SWITCHES, *op.absorb}
    if any(not a.has_default_value() and a.name not in said for a in extra):
        return None
    absorb = {
        a.name: _SWITCHES.get(a.name) or (_default(op, a),)
        for a in extra
        if a.has_default_value() or a.name in _SWITCHES
    }
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY
            if argument.kwarg_only
            else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=_default(op, argument)
            if argument.has_default_value()
            else inspect.Parameter.empty,
        )
        for name, argument in named.items()
    ]
    read = _READERS.get(op.name)
    return Spelling(inspect.Signature(parameters), writes_first(overload), read, absorb)


def _fits(op: Op, overload: OpOverload) -> bool:
    """One tensor in, one tensor out, as far as types tell."""
    schema = overload._schema
    kinds = {str(a.type) for a in schema.arguments if _parameter(op, a.name) == op.tensors[0]}
    if not kinds or not kinds <= {"Tensor", "List[Tensor]"}:
        return False
    results = [str(result.type) for result in schema.returns]
    if op.kind is Kind.PICK:
        return results == ["Tensor", "Tensor"]
    return results in (["Tensor"], ["int"], ["List[Tensor]"]) or op.kind is Kind.SPLIT


def _parameter(op: Op, name: str) -> str:
    if name == "self":
        return op.tensors[0]
    return _RENAMED.get((op.name, name), _RENAMED.get(("", name), name))


def _default(op: Op, argument: torch.Argument) -> Any:
    value = argument.default_value
    if isinstance(value, list):
        # ``stride=[]`` is how ATen says that none is given.
        return tuple(value) or None
    if str(argument.type) == "Optional[MemoryFormat]" or value is None:
        return None
    if argument.name == "memory_format":
        return torch.contiguous_format
    return value


def writes_first(target: object) -> bool:
    """Whether an operator or ATen overload, known to the table or not, writes to its first."""
    if target in _OPERATORS:
        return True
    if not isinstance(target, OpOverload) or not target._schema.arguments:
        return False
    first = target._schema.arguments[0]
    return first.alias_info is not None and first.alias_info.is_write


def may_alias(target: object) -> bool:
    """Whether the result of an ATen overload may share memory with an argument."""
    if not isinstance(target, OpOverload):
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


_OPERATORS: Final = (
    operator.ifloordiv, operator.imod, operator.iand, operator.ior, operator.ixor,
    operator.ilshift, operator.irshift,
)  # fmt: skip
"""Operators that write in place, beside those that the table knows."""

_RENAMED: Final[Mapping[tuple[str, str], str]] = {
    ("", "train"): "training",
    ("", "axis0"): "dim0",
    ("", "axis1"): "dim1",
    ("", "size"): "shape",
    ("expand", "size"): "size",
    ("unfold", "size"): "size",
    ("embedding", "indices"): "input",
    ("split", "split_size"): "split_size_or_sections",
    ("split", "split_sizes"): "split_size_or_sections",
}
_SWITCHES: Final[Mapping[str, tuple[Any, ...]]] = {
    "cudnn_enabled": (True, False),
    "cudnn_enable": (True, False),
}
"""Parameters that choose a kernel and change no value."""

_OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "reshape": ("_unsafe_view",),
    "clamp": ("clamp_min", "clamp_max"),
    "split": ("split_with_sizes",),
    "clone": ("lift_fresh_copy", "lift_fresh"),
    "dropout": ("feature_dropout", "feature_alpha_dropout"),
    "logsigmoid": ("log_sigmoid",),
    "size": ("sym_size",),
    "numel": ("sym_numel",),
    "fold": ("col2im",),
}


def _no_padding(given: Arguments) -> Arguments:
    """ATen writes ``padding_idx=None`` as -1."""
    return {**given, "padding_idx": None if given["padding_idx"] == -1 else given["padding_idx"]}


_READERS: Final[Mapping[str, Callable[[Arguments], Arguments]]] = {"embedding": _no_padding}


_END: Final = 2**63 - 1


def _sliced(given: Arguments) -> Arguments:
    """``slice(x, 1, 2, 5)`` is ``x[:, 2:5]``."""
    start, end, step = given["start"], given["end"], given["step"]
    part = slice(
        None if isinstance(start, int) and start == 0 else start,
        None if isinstance(end, int) and end == _END else end,
        None if isinstance(step, int) and step == 1 else step,
    )
    return {"input": given["input"], "index": _at(given["dim"], part)}


def _selected(given: Arguments) -> Arguments:
    """``select(x, 1, 0)`` is ``x[:, 0]``."""
    return {"input": given["input"], "index": _at(given["dim"], given["index"])}


def _at(dim: int, index: Any) -> Any:
    if dim < 0:
        return (..., index, *(slice(None),) * (-dim - 1))
    return (*(slice(None),) * dim, index) if dim else index


def _indexed(given: Arguments) -> Arguments:
    """``index(x, [None, i])`` is ``x[:, i]``."""
    places = tuple(slice(None) if place is None else place for place in given["indices"])
    return {"input": given["input"], "index": places[0] if len(places) == 1 else places}


def _cut_at(name: str) -> Callable[[Arguments], Arguments]:
    """Sections and indices are one argument of a canonical split."""

    def read(given: Arguments) -> Arguments:
        rest = dict(given)
        value = rest.pop(name)
        return {**rest, "indices_or_sections": tuple(value) if isinstance(value, list) else value}

    return read


def _interpolated(mode: str, aligns: bool) -> Callable[[Arguments], Arguments]:
    def read(given: Arguments) -> Arguments:
        factors = given["scale_factors"]
        same = factors is not None and len(set(factors)) == 1
        return {
            "input": given["input"],
            "size": given["output_size"],
            "scale_factor": factors[0] if same else factors,
            "mode": mode,
            "align_corners": given["align_corners"] if aligns else None,
            "recompute_scale_factor": None,
        }

    return read


_RESIZE = lambda input, output_size, scale_factors=None: None
_ALIGNED_RESIZE = lambda input, output_size, align_corners=False, scale_factors=None: None

_Other = tuple[str, Callable[..., Any], Callable[[Arguments], Arguments]]

_OTHER_WORDS: Final[Mapping[str, _Other]] = {
    "aten.slice.Tensor": (
        "getitem",
        lambda input, dim=0, start=None, end=None, step=1: None,
        _sliced,
    ),
    "aten.select.int": ("getitem", lambda input, dim, index: None, _selected),
    "aten.index.Tensor": ("getitem", lambda input, indices: None, _indexed),
    "aten.tensordot.default": (
        "tensordot",
        lambda a, b, own, others: None,
        lambda given: {"a": given["a"], "b": given["b"], "dims": (given["own"], given["others"])},
    ),
    "aten.tensor_split.sections": (
        "tensor_split",
        lambda input, sections, dim=0: None,
        _cut_at("sections"),
    ),
    "aten.tensor_split.indices": (
        "tensor_split",
        lambda input, indices, dim=0: None,
        _cut_at("indices"),
    ),
    "aten.hsplit.int": ("hsplit", lambda input, sections: None, _cut_at("sections")),
    "aten.hsplit.array": ("hsplit", lambda input, indices: None, _cut_at("indices")),
    "aten.pow.Scalar": (
        "power_of",
        lambda base, exponent: None,
        lambda given: {"input": given["exponent"], "base": given["base"]},
    ),
    **{
        f"aten.{name}{rank}d.vec": ("interpolate", _RESIZE, _interpolated(mode, aligns=False))
        for name, mode in (
            ("upsample_nearest", "nearest"),
            ("_upsample_nearest_exact", "nearest-exact"),
        )
        for rank in (1, 2, 3)
    },
    **{
        f"aten.upsample_{mode}{rank}d.vec": (
            "interpolate",
            _ALIGNED_RESIZE,
            _interpolated(mode, aligns=True),
        )
        for mode, rank in (("linear", 1), ("bilinear", 2), ("trilinear", 3), ("bicubic", 2))
    },
}
"""Overload to the op it spells, how it is called, and how its arguments are read."""

_FIRST_OF_TWO: Final[Mapping[str, Function]] = {
    "aten.adaptive_max_pool1d.default": F.adaptive_max_pool1d,
    "aten.adaptive_max_pool2d.default": F.adaptive_max_pool2d,
    "aten.adaptive_max_pool3d.default": F.adaptive_max_pool3d,
    "aten.max_pool2d_with_indices.default": torch.max_pool2d,
    "aten.max_pool3d_with_indices.default": torch.max_pool3d,
}


def first_of_two(target: object) -> Function | None:
    """The function that gives the first result of an ATen overload whose second nobody reads."""
    return _FIRST_OF_TWO.get(str(target)) if isinstance(target, OpOverload) else None
