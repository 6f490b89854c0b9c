"""Schedule, and the functions that switch at once: what is on when, and for what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import ConfigError
from fxquant.numerics.fake_quantizer import FakeQuantize, FakeQuantizer
from fxquant.numerics.fake_weights import FakeQuantizeWeight
from fxquant.schedule import Schedule, freeze_norms, set_fake_quant, set_observers
from tests.qat.models import built, pictures, trained


def prepared() -> Any:
    return fxquant.prepare(built("residual"), mode="qat", example_inputs=(pictures(),))


def fakes(model: nn.Module, kind: type[FakeQuantizer] = FakeQuantizer) -> list[FakeQuantizer]:
    return [m for m in model.modules() if isinstance(m, kind)]


def states(model: Any) -> tuple[bool, bool, bool]:
    """Whether all observe, whether all round, and whether the norms follow their batches."""
    observing = {fake.observing for fake in fakes(model)}
    rounding = {fake.quantizing for fake in fakes(model)}
    assert len(observing) == len(rounding) == 1
    return observing.pop(), rounding.pop(), model.bn1.training and model.bn2.training


def test_everything_happens_at_its_step() -> None:
    model = prepared()
    schedule = Schedule(
        model, observe_from=1, observe_until=4, fake_quant_from=2, freeze_norms_at=3
    )
    seen = []
    for _ in range(5):
        seen.append(states(model))
        schedule.step()
    assert seen == [
        (False, False, True),
        (True, False, True),
        (True, True, True),
        (True, True, False),
        (False, True, False),
    ]
    assert schedule.steps == 5


def test_by_default_all_is_on_from_the_beginning_to_the_end() -> None:
    model = prepared()
    schedule = Schedule(model)
    for _ in range(3):
        assert states(model) == (True, True, True)
        schedule.step()


def test_what_is_frozen_stays_so_through_train_and_copies() -> None:
    model = prepared()
    freeze_norms(model)
    for each in (model, copy.deepcopy(model)):
        each.eval().train()
        assert each.training and not each.bn1.training and not each.bn2.training
    before = model.bn1.running_mean.clone()
    trained(model, pictures)
    assert torch.equal(model.bn1.running_mean, before)
    freeze_norms(model, False)
    assert model.bn1.training
    trained(model, pictures)
    assert not torch.equal(model.bn1.running_mean, before)


def test_thawing_leaves_a_norm_that_the_user_froze() -> None:
    model = prepared()
    model.bn1.eval()
    freeze_norms(model, False)
    assert not model.bn1.training and model.bn2.training


def test_a_frozen_norm_trains_its_weight() -> None:
    model = prepared()
    freeze_norms(model)
    before = model.bn1.weight.detach().clone()
    trained(model, pictures)
    assert not torch.equal(model.bn1.weight, before)


def test_overrides_apply_to_what_they_name() -> None:
    model = prepared()
    schedule = Schedule(
        model,
        freeze_norms_at=1,
        overrides={
            "conv?": {"fake_quant_from": 2},
            "conv2": {"fake_quant_from": 3, "freeze_norms_at": None},
        },
    )

    def rounding() -> set[str]:
        return {f.path for f in fakes(model, FakeQuantizeWeight) if f.quantizing}

    assert rounding() == {"head"}
    schedule.step()
    assert not model.bn1.training and model.bn2.training
    schedule.step()
    assert rounding() == {"head", "conv1"}
    schedule.step()
    assert rounding() == {"head", "conv1", "conv2"}


@pytest.mark.parametrize("where", [nn.Linear, "head", "re:he.d"])
def test_functions_take_selectors(where: Any) -> None:
    model = prepared()
    set_fake_quant(model, False, where)
    off = [f.path for f in fakes(model) if not f.quantizing]
    assert off == ["head"]
    set_observers(model, False)
    assert not any(f.observing for f in fakes(model))
    freeze_norms(model, where="bn1")
    assert not model.bn1.training and model.bn2.training


def test_ranges_stay_when_observers_are_off() -> None:
    model = prepared()
    trained(model, pictures)
    set_observers(model, False)
    before = {key: v.clone() for key, v in model.state_dict().items() if key.endswith("scale")}
    trained(model, pictures, rate=0.1)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    converted = fxquant.convert(model, backend="reference")
    assert fxquant.verify(model, converted, [pictures(50)]).ok


def test_without_fake_quant_it_is_float_until_it_starts() -> None:
    model, made = built("residual"), prepared()
    schedule = Schedule(made, fake_quant_from=1)
    x = pictures(3)
    with torch.no_grad():
        torch.testing.assert_close(made(x), copy.deepcopy(model)(x), rtol=0, atol=1e-6)
        schedule.step()
        assert not torch.allclose(made.eval()(x), model.eval()(x), rtol=0, atol=1e-4)


def test_it_resumes_with_model_and_optimizer() -> None:
    arguments: dict[str, Any] = {"observe_until": 3, "fake_quant_from": 2, "freeze_norms_at": 3}
    one = prepared()
    schedule = Schedule(one, **arguments)
    for _ in range(3):
        trained(one, pictures, steps=1)
        schedule.step()
    two = prepared()
    two.load_state_dict(one.state_dict())
    other = Schedule(two, **arguments)
    other.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert other.steps == 3 and states(two) == states(one) == (False, True, False)
    for model, each in ((one, schedule), (two, other)):
        trained(model, pictures, steps=2)
        each.step()
    for key, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[key], value), key


def test_it_sees_through_compiled_models() -> None:
    model = prepared()
    compiled: Any = torch.compile(model, backend="eager")
    Schedule(compiled, fake_quant_from=5)
    assert not any(f.quantizing for f in fakes(model))


def test_after_calibration_fake_quant_may_start_before_observers() -> None:
    model = prepared()
    with pytest.raises(ConfigError, match="has no range"):
        Schedule(model, observe_from=5)
    fxquant.calibrate(model, [pictures()])
    Schedule(model, observe_from=5)
    assert all(not f.observing and f.quantizing for f in fakes(model, FakeQuantize))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observe_from": -1}, "0 or more"),
        ({"fake_quant_from": 1.5}, "0 or more"),
        ({"freeze_norms_at": True}, "0 or more"),
        ({"observe_from": 3, "fake_quant_from": 3, "observe_until": 3}, "at least one step"),
        ({"overrides": {"nowhere": {}}}, "matches nothing"),
        ({"overrides": {"conv1": {"begin": 1}}}, "has 'begin'"),
        ({"overrides": {"conv1": None}}, "is a dict of"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(prepared(), **options)


def test_other_models_and_states_are_refused() -> None:
    with pytest.raises(ConfigError, match="not prepared for training"):
        Schedule(nn.Linear(2, 2))
    static = fxquant.prepare(built("residual").eval(), example_inputs=(pictures(),))
    with pytest.raises(ConfigError, match="not prepared for training"):
        set_fake_quant(static, False)
    schedule = Schedule(prepared())
    bad: list[Any] = [{}, {"steps": -1}, {"steps": "2"}]
    for state in bad:
        with pytest.raises(ConfigError, match="no state"):
            schedule.load_state_dict(state)
    with pytest.raises(ConfigError, match="matches nothing"):
        freeze_norms(prepared(), where="nowhere")
