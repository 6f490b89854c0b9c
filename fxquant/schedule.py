"""When, in quantization-aware training, observers watch, values are rounded and norms freeze.

:class:`Schedule` does it step by step; :func:`set_fake_quant`, :func:`set_observers` and
:func:`freeze_norms` do it at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.errors import ConfigError
from fxquant.graph.info import info
from fxquant.graph.op_table import is_op, module_of
from fxquant.graph.settle import unwrapped
from fxquant.graph.trained_units import TrainedUnit
from fxquant.graph.user_tree import TrainableModule
from fxquant.numerics.fake_quantizer import FakeQuantize, FakeQuantizer
from fxquant.passes.configure import Selector, nothing_matches, predicate
from fxquant.record import KEY

__all__ = ["Schedule", "freeze_norms", "set_fake_quant", "set_observers"]


def set_fake_quant(model: nn.Module, on: bool, where: Selector | None = None) -> None:
    """Switch rounding on or off; without it the model computes in float.

    Args:
        model: what ``prepare(mode="qat")`` returned.
        on: whether values are rounded.
        where: a selector as in ``overrides``: results and weights of what it names; default all.

    Raises:
        ConfigError: the model is another one, or the selector names nothing.
    """
    for fake in _fakes(_trainable(model), where):
        _switch(fake, quantizing=on)


def set_observers(model: nn.Module, on: bool, where: Selector | None = None) -> None:
    """Let ranges follow activations (in training mode) and weights, or stay as they are.

    Args:
        model: what ``prepare(mode="qat")`` returned.
        on: whether ranges move.
        where: as for :func:`set_fake_quant`.

    Raises:
        ConfigError: the model is another one, or the selector names nothing.
    """
    for fake in _fakes(_trainable(model), where):
        _switch(fake, observing=on)


def freeze_norms(model: nn.Module, frozen: bool = True, where: Selector | None = None) -> None:
    """Stop batch norms from following their batches: they use running statistics from now on.

    ``model.train()`` leaves a frozen norm as it is. Its weight and bias are trained as before.

    Args:
        model: what ``prepare(mode="qat")`` returned.
        frozen: ``False`` lets them follow again.
        where: as for :func:`set_fake_quant`; of what it names, the batch norms.

    Raises:
        ConfigError: the model is another one, or the selector names no batch norm.
    """
    made = _trainable(model)
    made.freeze(_norms(made, where), frozen)


@dataclass(frozen=True)
class Phases:
    """When things happen, in calls of ``step()``.

    Args:
        observe_from: the step from which observers watch.
        observe_until: the step from which they no longer do; ``None``: never.
        fake_quant_from: the step from which values are rounded.
        freeze_norms_at: the step from which batch norms use their running statistics; ``None``:
            never.
    """

    observe_from: int = 0
    observe_until: int | None = None
    fake_quant_from: int = 0
    freeze_norms_at: int | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is None and name in ("observe_until", "freeze_norms_at"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{name} is {value!r}: it is a number of steps, 0 or more")
        if self.observe_until is not None and self.observe_until <= self.observe_from:
            raise ConfigError(
                f"observers would stop at step {self.observe_until} and start at "
                f"{self.observe_from}: they need at least one step in between"
            )

    def observing(self, step: int) -> bool:
        """Whether observers watch in ``step``."""
        ended = self.observe_until is not None and step >= self.observe_until
        return step >= self.observe_from and not ended


class Schedule:
    """Switches observers, fake-quant and batch norms of a prepared model as training goes on.

    A step is whatever you call ``step()`` after: a batch or an epoch. Numbers below count calls:
    what starts at 3 starts after the third.

    Args:
        model: what ``prepare(mode="qat")`` returned, also inside DDP or ``torch.compile``.
        observe_from: the step from which ranges follow what comes by.
        observe_until: the step from which they stay; ``None``: never.
        fake_quant_from: the step from which values are rounded.
        freeze_norms_at: the step from which batch norms use running statistics; ``None``: never.
        overrides: other numbers for what a selector names, as a dict of the arguments above; the
            last match wins, and what a dict leaves out is as for all.

    Raises:
        ConfigError: a number or selector that cannot work; fake-quant would start before there
            are ranges.

    Example:
        >>> import torch, fxquant
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> prepared = fxquant.prepare(net, mode="qat", example_inputs=torch.randn(2, 3, 8, 8))
        >>> schedule = Schedule(prepared, fake_quant_from=2, freeze_norms_at=3)
        >>> for batch in torch.randn(3, 2, 3, 8, 8):
        ...     loss = prepared.train()(batch).sum()  # and backward, and the optimizer
        ...     schedule.step()
        >>> schedule, prepared.get_submodule("1").training
        (Schedule(after 3 steps), False)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        observe_from: int = 0,
        observe_until: int | None = None,
        fake_quant_from: int = 0,
        freeze_norms_at: int | None = None,
        overrides: Mapping[Any, Mapping[str, int | None]] | None = None,
    ) -> None:
        self._model = _trainable(model)
        general = Phases(observe_from, observe_until, fake_quant_from, freeze_norms_at)
        self._fakes = dict.fromkeys(_fakes(self._model, None), general)
        self._norms = dict.fromkeys(_norms(self._model, None, allow_none=True), general)
        for selector, given in (overrides or {}).items():
            phases = _override(general, selector, given)
            fakes = _fakes(self._model, selector, allow_none=True)
            norms = _norms(self._model, selector, allow_none=True)
            if not fakes and not norms:
                raise _nothing(self._model, selector)
            self._fakes |= dict.fromkeys(fakes, phases)
            self._norms |= dict.fromkeys(norms, phases)
        self._check_order()
        self._steps = 0
        self._apply()

    @property
    def steps(self) -> int:
        """How often ``step()`` was called."""
        return self._steps

    def step(self) -> None:
        """Count one step, and switch what is due."""
        self._steps += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs of it."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another schedule with the same arguments was.

        Args:
            state: what its ``state_dict()`` returned.

        Raises:
            ConfigError: it is something else.
        """
        steps = state.get("steps") if isinstance(state, Mapping) else None
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ConfigError(
                f"{state!r} is no state of a Schedule: pass what state_dict() of one returned"
            )
        self._steps = steps
        self._apply()

    def __repr__(self) -> str:
        return f"Schedule(after {self._steps} step{'s' * (self._steps != 1)})"

    def _apply(self) -> None:
        for fake, phases in self._fakes.items():
            rounding = self._steps >= phases.fake_quant_from
            _switch(fake, observing=phases.observing(self._steps), quantizing=rounding)
        for frozen in (True, False):
            paths = [
                path
                for path, phases in self._norms.items()
                if (phases.freeze_norms_at is not None and self._steps >= phases.freeze_norms_at)
                is frozen
            ]
            self._model.freeze(paths, frozen)

    def _check_order(self) -> None:
        for fake, phases in self._fakes.items():
            blind = isinstance(fake, FakeQuantize) and not fake.seen
            if blind and phases.fake_quant_from < phases.observe_from:
                raise ConfigError(
                    f"fake-quant would start at step {phases.fake_quant_from} and observers only "
                    f"at {phases.observe_from}: until then {fake.path or 'an input'} has no range. "
                    "Start observers first, or call fxquant.calibrate(prepared, data) before"
                )


def _override(general: Phases, selector: object, given: Mapping[str, int | None]) -> Phases:
    known = [field.name for field in dataclasses.fields(Phases)]
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"the override of {selector!r} is a {type(given).__name__}: it is a dict of {known}"
        )
    for name in given:
        if name not in known:
            raise ConfigError(f"the override of {selector!r} has {name!r}: there are {known}")
    changes: dict[str, Any] = dict(given)
    return dataclasses.replace(general, **changes)


def _switch(fake: FakeQuantizer, **wanted: bool) -> None:
    # Each switch writes to memory of the device, and most steps change none.
    if any(getattr(fake, name) is not on for name, on in wanted.items()):
        fake.switch(**wanted)


def _trainable(model: nn.Module) -> TrainableModule:
    inner = unwrapped(model)
    if not isinstance(inner, TrainableModule) or KEY not in inner.meta:
        raise ConfigError(
            f"this {type(inner).__name__} was not prepared for training: pass what "
            "fxquant.prepare(model, mode='qat') returned"
        )
    return inner


def _nothing(model: GraphModule, selector: Selector) -> ConfigError:
    return ConfigError(nothing_matches(selector, [n for n in model.graph.nodes if info(n).path]))


def _fakes(
    model: GraphModule, where: Selector | None, allow_none: bool = False
) -> list[FakeQuantizer]:
    matches = _unit_matches(model, where)
    found: list[FakeQuantizer] = []
    for node in model.graph.find_nodes(op="call_module"):
        fake = module_of(node)
        if isinstance(fake, TrainedUnit) and matches(node):
            found += [each for each in fake.added if isinstance(each, FakeQuantizer)]
        if isinstance(fake, FakeQuantizer):
            # A weight belongs to the layer that reads it, an activation to what makes it.
            owner = node.args[0] if isinstance(fake, FakeQuantize) else next(iter(node.users), node)
            if isinstance(owner, Node) and matches(owner):
                found.append(fake)
    if not found and where is not None and not allow_none:
        raise _nothing(model, where)
    return found


def _norms(model: GraphModule, where: Selector | None, allow_none: bool = False) -> list[str]:
    matches = _unit_matches(model, where)
    found = []
    for node in filter(matches, model.graph.find_nodes(op="call_module")):
        module = module_of(node)
        if is_op(node, "batch_norm"):
            found.append(str(node.target))
        elif isinstance(module, TrainedUnit):
            found += module.norms(model)
    if not found and where is not None and not allow_none:
        raise _nothing(model, where)
    return list(dict.fromkeys(found))


def _unit_matches(model: GraphModule, where: Selector | None) -> Callable[[Node], bool]:
    """Whether a node, or another one of its fused unit, is meant."""
    if where is None:
        return lambda node: True
    meant = predicate(where)
    units = {info(n).unit for n in model.graph.nodes if info(n).unit is not None and meant(n)}
    return lambda node: meant(node) or info(node).unit in units
