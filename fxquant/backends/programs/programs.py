"""The executor of converted models: records what they call, and runs that."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxquant.backends.programs.recorder import record
from fxquant.backends.programs.recording import Recording, Value, values_in
from fxquant.backends.programs.script import Registers, is_there, parts_of
from fxquant.backends.programs.signature import is_usual, signature_of
from fxquant.backends.programs.trusted import why_not_trusted
from fxquant.backends.programs.watch import Watch
from fxquant.collector import collector_paused

_FIRST: Final = 2
"""The call from which on inputs of one signature are recorded; the first may make something."""
_MOST: Final = 16
"""Programs of a model. Beyond these the one that was not run for longest is dropped."""
_MOST_KNOWN: Final = 1_000
"""Signatures that calls are counted of."""
_MOST_RESTARTS: Final = 6
"""How often a model may be changed before it is left as it is."""


_MOST_MISSES: Final = 8
"""How often a program may be run for nothing."""


class OtherwiseError(Exception):
    """The model would have made other calls of operators than the program did."""


class Program:
    """The calls of operators that a model makes for inputs of one signature.

    Args:
        recording: of them.
        watch: sees whether the model is still the one that was recorded.
    """

    def __init__(self, recording: Recording, watch: Watch) -> None:
        held = dict(zip(recording.held, recording.tensors, strict=True))
        returned = set(values_in(recording.results))
        self._fixed = {value: tensor for value, tensor in held.items() if value in returned}
        self._inputs, self._parts = recording.inputs, parts_of(recording)
        self._results, self._structure = recording.results, recording.structure
        self._alone = recording.structure.is_leaf()
        self._answers = tuple(recording.answers.items())
        self.watch = watch

    def run(self, leaves: list[Tensor]) -> Any:
        """What the model returns for these inputs.

        Raises:
            OtherwiseError: the numbers in them lead to other calls.
        """
        registers: Registers = {**self._fixed, **dict(zip(self._inputs, leaves, strict=True))}
        before = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)  # of this thread only
        try:
            for part in self._parts:
                part(registers)
        finally:
            torch._C._set_graph_executor_optimize(before)
        if not all(registers[question] is answer for question, answer in self._answers):
            raise OtherwiseError
        made = [registers[r] if isinstance(r, Value) else r for r in self._results]
        return made[0] if self._alone else pytree.tree_unflatten(made, self._structure)


@dataclass
class _Known:
    """What is known of inputs of one signature.

    Args:
        calls: with such inputs.
        due: the call that is recorded next.
        recording: the first one; the second has to agree with it.
        program: what came of two that agree.
        used: when that was run last.
        misses: calls that the program was not right for.
    """

    calls: int = 0
    due: float = _FIRST
    recording: Recording | None = None
    program: Program | None = None
    used: int = 0
    misses: int = 0

    def missed(self) -> None:
        """The program was run for nothing. Where that is often so, there is none any more."""
        self.misses += 1
        if self.misses >= _MOST_MISSES:
            self.program, self.due = None, math.inf


class Programs:
    """Runs a model: as its graph stands, and from the fourth call with like inputs as a program.

    Two calls are recorded. If both made the same calls of operators on the same tensors that the
    model holds, these are written as a program, and if that gives what the model gave, bit for bit,
    it is run from then on. A model that draws numbers has none. A copy of one, or what comes from a
    pickle, begins anew.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, _Known] = {}
        self._owner: weakref.ref[GraphModule] | None = None
        self._clock = self._built = self._restarts = 0
        self._off = not is_there()

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple[Any, ...]:
        return Programs, ()

    @property
    def count(self) -> int:
        """How many programs there are."""
        return sum(known.program is not None for known in self._known.values())

    def forget(self) -> None:
        """Begin anew: the graph is another one."""
        self._known.clear()
        self._owner, self._off = None, not is_there()

    def __call__(
        self,
        module: GraphModule,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What ``forward`` returns.

        Args:
            module: the model.
            forward: runs its graph.
            args: what the model is called with.
            kwargs: the same, by name.
        """
        seen = None if self._off or not is_usual() else signature_of(args, kwargs)
        if seen is None:
            return forward(*args, **kwargs)
        signature, leaves = seen
        known = self._known.get(signature)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known = {key: each for key, each in self._known.items() if each.program}
            known = self._known[signature] = _Known(due=self._due())
        self._clock += 1
        program = known.program
        if program is not None and self._is_owner(module) and program.watch.unchanged():
            known.used = self._clock
            try:
                return program.run(leaves)
            except OtherwiseError:
                known.missed()
            except RuntimeError:
                pass  # The graph says it as eager torch does, and where.
            return forward(*args, **kwargs)
        known.calls += 1
        if program is None and known.calls < known.due:
            return forward(*args, **kwargs)
        watch = self._watch(module, known)
        if watch is None:
            return forward(*args, **kwargs)
        # What is written down are many small objects, and none of them is garbage.
        with collector_paused():
            return self._learn(known, watch, lambda: forward(*args, **kwargs), leaves)

    def _watch(self, module: GraphModule, known: _Known) -> Watch | None:
        """A watch over a model that may be recorded now."""
        if self._owner is None:
            self._owner = weakref.ref(module)
            self._off = bool(why_not_trusted(module))
        if self._off or not self._is_owner(module):
            return None
        if known.program is not None:
            if not known.program.watch.is_heard():
                self._restart()
            return None
        watch = Watch(module)
        tracked = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        if tracked or not watch.unchanged():
            known.due = 2 * known.calls
            return None
        return watch

    def _is_owner(self, module: GraphModule) -> bool:
        """Whether it is the model that was recorded: torch may copy one with all that it has."""
        return self._owner is not None and self._owner() is module

    def _restart(self) -> None:
        """Something of the model was replaced."""
        self._restarts += 1
        self._known.clear()
        self._off = self._restarts > _MOST_RESTARTS

    def _learn(
        self, known: _Known, watch: Watch, run: Callable[[], Any], leaves: list[Tensor]
    ) -> Any:
        """Run the model once, and record that."""
        before, known.recording, known.due = known.recording, None, math.inf
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            return run()
        drawn = torch.get_rng_state()
        made, recording = record(run, leaves)
        if isinstance(recording, str) or not torch.equal(drawn, torch.get_rng_state()):
            return made
        if before is None:
            known.recording, known.due = recording, known.calls + 1
        elif before.agrees(recording):
            program = Program(recording, watch)
            if watch.unchanged() and _gives(program, leaves, made):
                self._keep(known, program)
        return made

    def _keep(self, known: _Known, program: Program) -> None:
        self._built += 1
        known.program, known.used = program, self._clock
        having = [each for each in self._known.values() if each.program is not None]
        if len(having) > _MOST:
            oldest = min(having, key=lambda each: each.used)
            oldest.program, oldest.calls, oldest.due = None, 0, self._due()

    def _due(self) -> int:
        """The call to record: the more programs there were, the more calls it takes to get one."""
        return _FIRST << self._built // _MOST


def _gives(program: Program, leaves: list[Tensor], wanted: Any) -> bool:
    """Whether a new program returns what the model did."""
    try:
        return _same(program.run(leaves), wanted)
    except (OtherwiseError, RuntimeError):
        return False


def _same(one: Any, other: Any) -> bool:
    """Whether two results are the same, bit for bit; what is no number is like itself."""
    return all(map(_equal, pytree.tree_leaves(one), pytree.tree_leaves(other)))


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    alike = one.dtype == other.dtype and one.shape == other.shape
    if not alike or one.stride() != other.stride():
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())
