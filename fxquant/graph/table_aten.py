"""Op table: ATen overloads as spellings, so that exported graphs read like traced ones.

Most are read off ATen's own schemas: an overload whose parameters are those of the op, under the
same names, spells it. What ATen says in another way stands in the tables below.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch._ops import OpOverload, OpOverloadPacket

from fxquant.graph.ops import Function, Kind, Op, Spelling
from fxquant.graph.table_entry import sig

Arguments = dict[str, Any]


def with_aten(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """The same ops, with the ATen overloads that spell them.

    Args:
        ops: records of the op table.
    """
    return tuple(_extended(op) for op in ops)


def _extended(op: Op) -> Op:
    if op.target is None and op.build is None:
        return op
    absorb = dict(op.absorb)
    found: dict[Function, Spelling] = {}
    for name in dict.fromkeys((op.name, *_written(op), *_OTHER_NAMES.get(op.name, ()))):
        for overload in (*_overloads(name), *_overloads(f"{name}_")):
            spelling = _spelling(op, overload, absorb)
            if spelling is not None and overload not in {*op.functions, *_TAKEN}:
                found[overload] = spelling
    for function, like, read in _OTHER_WORDS.get(op.name, ()):
        found[function] = Spelling(sig(like), read=read)
    # The op's own functions stay first: convert calls the first.
    return dataclasses.replace(op, functions={**op.functions, **found}, absorb=absorb)


def _written(op: Op) -> Iterator[str]:
    """What users call the op: ``torch.special.expit`` is ``aten::special_expit``."""
    for function in op.functions:
        yield str(getattr(function, "__name__", "")).rstrip("_")
    for method in op.methods:
        yield method.rstrip("_")


def _overloads(name: str) -> Iterator[OpOverload]:
    packet = getattr(torch.ops.aten, name, None)
    if isinstance(packet, OpOverloadPacket):
        for overload in packet.overloads():
            yield getattr(packet, overload)


def _spelling(op: Op, overload: OpOverload, absorb: dict[str, Any]) -> Spelling | None:
    """How ``overload`` spells ``op``, if it does; what more it can say goes to ``absorb``."""
    schema = overload._schema
    if any(argument.is_out for argument in schema.arguments) or not _fits(op, overload):
        return None
    named = {_parameter(op, a.name): a for a in schema.arguments}
    required = [n for n, p in op.signature.parameters.items() if p.default is p.empty]
    if any(name not in named for name in required):
        return None
    extra = [a for name, a in named.items() if name not in op.signature.parameters]
    if any(not (a.has_default_value() or a.name in _SWITCHES or a.name in absorb) for a in extra):
        return None
    for argument in (a for a in extra if a.has_default_value() or a.name in _SWITCHES):
        values = _SWITCHES.get(argument.name) or (_default(op, argument),)
        absorb[argument.name] = (*absorb.get(argument.name, ()), *values)
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
    return Spelling(inspect.Signature(parameters), inplace=writes_first(overload), read=read)


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
    """Whether an ATen overload, known to the table or not, overwrites its first argument."""
    if not isinstance(target, OpOverload) or not target._schema.arguments:
        return False
    first = target._schema.arguments[0]
    return first.alias_info is not None and first.alias_info.is_write


def may_alias(target: object) -> bool:
    """Whether the result of an ATen overload may share memory with an argument."""
    if not isinstance(target, OpOverload):
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


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

_ATEN: Final = torch.ops.aten
_Other = tuple[Function, Callable[..., Any], Callable[[Arguments], Arguments]]

_OTHER_WORDS: Final[Mapping[str, tuple[_Other, ...]]] = {
    "getitem": (
        (_ATEN.slice.Tensor, lambda input, dim=0, start=None, end=None, step=1: None, _sliced),
        (_ATEN.select.int, lambda input, dim, index: None, _selected),
        (_ATEN.index.Tensor, lambda input, indices: None, _indexed),
    ),
    "tensordot": (
        (
            _ATEN.tensordot.default,
            lambda a, b, own, others: None,
            lambda given: {
                "a": given["a"],
                "b": given["b"],
                "dims": (given["own"], given["others"]),
            },
        ),
    ),
    "tensor_split": (
        (_ATEN.tensor_split.sections, lambda input, sections, dim=0: None, _cut_at("sections")),
        (_ATEN.tensor_split.indices, lambda input, indices, dim=0: None, _cut_at("indices")),
    ),
    "hsplit": (
        (_ATEN.hsplit.int, lambda input, sections: None, _cut_at("sections")),
        (_ATEN.hsplit.array, lambda input, indices: None, _cut_at("indices")),
    ),
    "power_of": (
        (
            _ATEN.pow.Scalar,
            lambda base, exponent: None,
            lambda given: {"input": given["exponent"], "base": given["base"]},
        ),
    ),
    "interpolate": (
        *(
            (overload.vec, _RESIZE, _interpolated(mode, aligns=False))
            for overload, mode in (
                (_ATEN.upsample_nearest1d, "nearest"),
                (_ATEN.upsample_nearest2d, "nearest"),
                (_ATEN.upsample_nearest3d, "nearest"),
                (_ATEN._upsample_nearest_exact1d, "nearest-exact"),
                (_ATEN._upsample_nearest_exact2d, "nearest-exact"),
                (_ATEN._upsample_nearest_exact3d, "nearest-exact"),
            )
        ),
        *(
            (overload.vec, _ALIGNED_RESIZE, _interpolated(mode, aligns=True))
            for overload, mode in (
                (_ATEN.upsample_linear1d, "linear"),
                (_ATEN.upsample_bilinear2d, "bilinear"),
                (_ATEN.upsample_trilinear3d, "trilinear"),
                (_ATEN.upsample_bicubic2d, "bicubic"),
            )
        ),
    ),
}

_TAKEN: Final = frozenset(row[0] for rows in _OTHER_WORDS.values() for row in rows)

_FIRST_OF_TWO: Final[Mapping[OpOverload, Function]] = {
    _ATEN.adaptive_max_pool1d.default: F.adaptive_max_pool1d,
    _ATEN.adaptive_max_pool2d.default: F.adaptive_max_pool2d,
    _ATEN.adaptive_max_pool3d.default: F.adaptive_max_pool3d,
    _ATEN.max_pool2d_with_indices.default: torch.max_pool2d,
    _ATEN.max_pool3d_with_indices.default: torch.max_pool3d,
}


def first_of_two(target: object) -> Function | None:
    """The function that gives the first result of an ATen overload whose second nobody reads."""
    return _FIRST_OF_TWO.get(target) if isinstance(target, OpOverload) else None
