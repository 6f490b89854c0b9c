"""Records which operators a call of a model makes, on which of its tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxquant.backends.programs.recording import (
    Recording,
    Step,
    Value,
    found_in,
    is_pure,
    values_in,
)
from fxquant.graph.dispatch import QuietMode

MOST_STEPS: Final = 20_000
"""Calls of one recording; a model of more is better left as it is."""

_LITERALS: Final = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
_MASKS: Final = (torch.bool, torch.uint8)
_BLANK: Final = (
    *("empty.memory_format", "empty_like", "empty_strided", "empty_permuted"),
    *("new_empty", "new_empty_strided"),
)
"""Operators that make memory which another has to write to before it is read."""
_OVERWRITING: Final = ("aten::copy_", "aten::fill_.Scalar", "aten::fill_.Tensor", "aten::zero_")
_READ_BY_PYTHON: Final = ("aten::_pack_padded_sequence",)
"""Operators whose results Python reads past every mode: ``batch_sizes.tolist()``."""


def record(run: Callable[[], Any], leaves: list[Tensor]) -> tuple[Any, Recording | str]:
    """Run something, and record the operators that it calls.

    Args:
        run: computes with ``leaves`` and tensors that it holds, by operators of torch.
        leaves: its inputs.

    Returns:
        What it returned; and the recording, or why running that again would not be the same.

    Example:
        >>> x = torch.tensor([1.0, -2.0])
        >>> [step.op.name() for step in record(lambda: x.relu() + 1, [x])[1].steps]
        ['aten::relu', 'aten::add.Tensor']
        >>> list(record(lambda: x.relu() if x[0] > 0 else x, [x])[1].answers.values())
        [True]
        >>> record(lambda: x * float(x[0]), [x])[1]
        'aten::item looks at the numbers in a tensor'
    """
    recorder = _Recorder(leaves)
    # Above autograd torch takes operators to pieces, and some of the pieces are no operators.
    with torch._C._AutoDispatchBelowAutograd(), recorder:
        made = run()
    return made, recorder.finished(made)


class _Numbers:
    """Which tensor is which value, for as long as there is that tensor."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Value, weakref.ref[Tensor]]] = {}
        self._others: set[int] = set()
        self._memory: dict[Value, Value] = {}
        self._looks: dict[Any, Value] = {}
        self._count = 0

    def fresh(self) -> Value:
        """A value that is nothing yet."""
        self._count += 1
        return Value(self._count - 1)

    def find(self, tensor: Tensor) -> Value | None:
        """The value that this tensor is."""
        found = self._known.get(id(tensor))
        return None if found is None else found[0]

    def memory(self, value: Value) -> Value:
        """The first value that lay in the same memory."""
        return self._memory[value]

    def add(self, tensor: Tensor, among: tuple[Tensor, ...] = ()) -> Value:
        """Number a tensor that was made of ``among``, or that came from elsewhere."""
        value, place = self.fresh(), _storage(tensor)
        sources = (self.find(other) for other in among if place and _storage(other) == place)
        first = next((source for source in sources if source is not None), None)
        self._memory[value] = value if first is None else self._memory[first]
        self._looks.setdefault(self._look(value, tensor), value)
        return self._name(tensor, value)

    def name(self, tensor: Tensor, value: Value) -> Value:
        """Let ``tensor``, which is another object than ``value`` was, stand for it too."""
        self._others.add(id(tensor))
        return self._name(tensor, value)

    def is_other(self, tensor: Tensor) -> bool:
        """Whether it is another object than the value that it stands for."""
        return id(tensor) in self._others

    def _name(self, tensor: Tensor, value: Value) -> Value:
        key = id(tensor)
        # Another tensor may come to lie where this one was.
        self._known[key] = (value, weakref.ref(tensor, lambda _: self._forget(key)))
        return value

    def _forget(self, key: int) -> None:
        self._known.pop(key, None)
        self._others.discard(key)

    def same_as(self, tensor: Tensor, source: Tensor) -> Value | None:
        """The value that looks at the memory of ``source`` just as ``tensor`` does."""
        known, place = self.find(source), _storage(tensor)
        if known is None or not place or place != _storage(source):
            return None
        return self._looks.get(self._look(known, tensor))

    def changed(self, tensor: Tensor) -> None:
        """Its shape was changed in place: it looks otherwise at its memory from now on."""
        value = self.find(tensor)
        self._looks = {look: known for look, known in self._looks.items() if known != value}
        if value is not None:
            self._looks.setdefault(self._look(value, tensor), value)

    def _look(self, value: Value, tensor: Tensor) -> Any:
        if not _storage(tensor):
            return value
        bits = (tensor.dtype, tensor.is_neg(), tensor.is_conj())
        shape = (tensor.shape, tensor.stride(), tensor.storage_offset())
        return self._memory[value], bits, shape


def _storage(tensor: Tensor) -> int:
    """Which memory it lies in; 0 for what has none, such as packed weights."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


class _Recorder(QuietMode):
    """Notes calls of operators. It keeps no result alive."""

    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._numbers = _Numbers()
        self._inputs = tuple(
            self._numbers.add(leaf, tuple(leaves[:i])) for i, leaf in enumerate(leaves)
        )
        self._kept = set(map(self._numbers.memory, self._inputs))
        self._blank: set[Value] = set()
        self._held: dict[Value, Tensor] = {}
        self._answers: dict[Value, bool] = {}
        self._steps: list[Step] = []
        self._why = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call ``func``, and note that."""
        named = kwargs or {}
        if self._why:
            return func(*args, **named)
        given, by_name = self._values(args), self._values(named)
        made = func(*args, **named)
        sources = tuple(_tensors((args, named)))
        if not sources and next(_tensors(made), None) is None:
            return made  # of types alone, such as promote_types
        written, read = _written_and_read(func, args, named)
        self._why = _why_not(func, made, sources[1:]) or self._spoilt(func, written, read, made)
        if not self._why:
            self._note(func, given, by_name, made, sources)
        return made

    def _note(
        self, func: Any, given: Any, by_name: Any, made: Any, sources: tuple[Tensor, ...]
    ) -> None:
        """Write a call down, unless what it returns is there already."""
        if torch.Tag.inplace_view in func.tags:
            self._numbers.changed(sources[0])
        parts = tuple(made) if isinstance(made, tuple | list) else (made,)
        plain = all(type(part) is Tensor for part in parts)
        if plain and is_pure(func) and self._seen(parts, sources):
            return
        results = tuple(self._result(part, sources) for part in parts)
        if func.name().removeprefix("aten::") in _BLANK:
            self._blank.update(results)
        self._steps.append(Step(func, given, by_name, results, isinstance(made, tuple | list)))
        if len(self._steps) > MOST_STEPS:
            self._why = f"it calls more than {MOST_STEPS} operators"

    def finished(self, made: Any) -> Recording | str:
        """The recording, once ``made`` is returned; or why there is none."""
        if self._why:
            return self._why
        leaves, structure = pytree.tree_flatten(made)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.numel() and self._is_blank(leaf):
                return "it returns memory that no operator wrote"
            if type(leaf) is not Tensor and type(leaf) not in _LITERALS:
                return f"it returns a {type(leaf).__name__}"
        results = tuple(self._returned(leaf) for leaf in leaves)
        steps = tuple(_needed(self._steps, {*values_in(results), *self._answers}))
        used = {value for step in steps for value in step.reads} | set(values_in(results))
        held = {value: tensor for value, tensor in self._held.items() if value in used}
        return Recording(
            self._inputs,
            tuple(held),
            tuple(held.values()),
            steps,
            self._answers,
            results,
            structure,
        )

    def _returned(self, leaf: Any) -> Any:
        """A leaf of what is returned. A view that was left out stays an object of its own."""
        value = self._values(leaf)
        if isinstance(leaf, Tensor) and self._numbers.is_other(leaf):
            view = self._numbers.fresh()
            self._steps.append(Step(torch.ops.aten.alias.default, (value,), {}, (view,), False))
            return view
        return value

    def _values(self, nest: Any) -> Any:
        """``nest`` with values for tensors; what no operator made, the model holds."""
        if isinstance(nest, Tensor):
            known = self._numbers.find(nest)
            if known is None:
                known = self._numbers.add(nest)
                self._held[known] = nest
                self._kept.add(known)
            return known
        if isinstance(nest, tuple | list):
            return tuple(map(self._values, nest))
        if isinstance(nest, dict):
            return {name: self._values(item) for name, item in nest.items()}
        return nest

    def _result(self, made: Tensor | bool | None, sources: tuple[Tensor, ...]) -> Value:
        if not isinstance(made, Tensor):
            value = self._numbers.fresh()
            if made is not None:
                self._answers[value] = made
            return value
        known = self._numbers.find(made)
        return self._numbers.add(made, sources) if known is None else known

    def _seen(self, parts: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> bool:
        """Whether all results are there already: a view that undoes another, or nothing to do."""
        same: list[Value] = []
        for part in parts:
            known = self._numbers.find(part)
            if known is None:
                looks = (self._numbers.same_as(part, source) for source in sources)
                known = next((look for look in looks if look is not None), None)
            if known is None:
                return False
            same.append(known)
        for part, value in zip(parts, same, strict=True):
            if self._numbers.find(part) is None:
                self._numbers.name(part, value)
        return True

    def _spoilt(
        self, func: Any, written: tuple[Tensor, ...], read: tuple[Tensor, ...], made: Any
    ) -> str:
        """Why memory is not what the operators say.

        That is, inputs, or what the model holds, are no longer what they were; or something is
        read that no operator wrote, and then somebody else did.
        """
        places = [self._numbers.memory(self._values(tensor)) for tensor in written]
        if not self._kept.isdisjoint(places):
            return f"{func.name()} writes to an input, or to what the model holds"
        views = {_storage(part) for part in _tensors(made)}
        for tensor in read if self._blank else ():
            looks = is_pure(func) and _storage(tensor) in views
            if tensor.numel() and not looks and self._is_blank(tensor):
                return f"{func.name()} reads memory that no operator wrote"
        self._blank.difference_update(places)
        return ""

    def _is_blank(self, tensor: Tensor) -> bool:
        value = self._numbers.find(tensor)
        return value is not None and self._numbers.memory(value) in self._blank


def _written_and_read(
    func: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors that an operator says it writes to, and those that it reads."""
    written: list[Tensor] = []
    read: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        given = args[place] if place < len(args) else named.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            written.extend(_tensors(given))
        # What computes in place reads that place, too.
        if not writes or not (argument.is_out or func.name() in _OVERWRITING):
            read.extend(_tensors(given))
    return tuple(written), tuple(read)


def _tensors(nest: Any) -> Iterator[Tensor]:
    return found_in(nest, Tensor)


def _why_not(func: Any, made: Any, others: tuple[Tensor, ...]) -> str:
    """Why a call of ``func``, with ``others`` beside its first tensor, cannot be repeated."""
    counts = torch.Tag.dynamic_output_shape in func.tags
    if func.name() == "aten::index.Tensor":
        counts = any(other.dtype in _MASKS for other in others)
    if counts or func.name() in _READ_BY_PYTHON:
        return f"{func.name()} returns as much as the numbers in a tensor say"
    if type(made) is bool:
        return ""
    if torch.Tag.data_dependent_output in func.tags:
        return f"{func.name()} looks at the numbers in a tensor"
    parts = made if isinstance(made, tuple | list) else (made,)
    # Of several results some may not be there.
    fits = all(type(part) is Tensor or (part is None and part is not made) for part in parts)
    return "" if parts and fits else f"{func.name()} returns something other than tensors"


def _needed(steps: list[Step], wanted: set[Value]) -> list[Step]:
    """Without calls that nobody asked for: views that others took the place of."""
    kept: list[Step] = []
    for step in reversed(steps):
        if not step.pure or not wanted.isdisjoint(step.results):
            kept.append(step)
            wanted.update(step.reads)
    return kept[::-1]
