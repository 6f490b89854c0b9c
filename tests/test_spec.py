"""What a QSpec and a QConfig refuse, and which scheme a configuration stands for."""

from __future__ import annotations

from typing import Any

import pytest

from fxquant.errors import ConfigError
from fxquant.spec import PRESETS, QConfig, QSpec, resolve_qconfig

GROUPS = QSpec("int8", bits=4, symmetric=True, granularity="group", group_size=64)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dtype": "int4"}, "QSpec.dtype is 'int4'"),
        ({"granularity": "rows"}, "did you mean 'row'"),
        ({"granularity": "row"}, "observer='runtime'"),
        ({"granularity": "channel", "observer": "runtime"}, "'row' or one per 'tensor'"),
        ({"granularity": "group"}, "multiple of 8"),
        ({"granularity": "group", "group_size": 12}, "multiple of 8"),
        ({"granularity": "group", "group_size": True}, "multiple of 8"),
        ({"group_size": 32}, "needs granularity='group'"),
    ],
)
def test_a_spec_that_cannot_work_says_what_to_pass(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        QSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"float_dtype": "half"}, "float_dtype"),
        ({"weight": GROUPS}, "activation=None"),
        ({"weight": QSpec("uint8", granularity="channel")}, "symmetric int8"),
        ({"activation": GROUPS}, "per group"),
        ({"output": QSpec(granularity="row", observer="runtime")}, "per row"),
        ({"output": QSpec(observer="runtime")}, "output=None"),
        ({"weight": QSpec("int8", symmetric=True, observer="runtime")}, "weights do not change"),
    ],
)
def test_a_config_that_cannot_work_says_what_to_pass(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        QConfig(**fields)


def test_a_config_tells_its_scheme() -> None:
    found = {name: config.scheme for name, config in PRESETS.items()}
    assert found["default"] == found["x86"] == found["int8-bf16"] == "static"
    assert found["dynamic"] == found["dynamic-symmetric"] == "dynamic"
    assert found["weight-only-int8"] == found["weight-only-int4"] == "weight_only"
    assert found["float16"] == found["bfloat16"] == "float"
    asymmetric = QConfig(activation=None, weight=QSpec("uint8", granularity="channel"))
    assert asymmetric.scheme == "weight_only"


def test_each_mode_has_its_default() -> None:
    assert resolve_qconfig(None) == resolve_qconfig(None, "qat") == QConfig()
    assert resolve_qconfig(None, "dynamic") is PRESETS["dynamic"]
    assert resolve_qconfig(None, "weight_only") is PRESETS["weight-only-int8"]
    assert resolve_qconfig("qnnpack", "dynamic") is PRESETS["qnnpack"]
