"""The example of quantization-aware training in a small form: it wins back what static loses."""

from __future__ import annotations

from examples.qat_digits import compare


def test_training_wins_back_what_static_loses() -> None:
    found = compare(width=12, epochs=8)
    assert found.in_float > 93.0
    assert found.static < found.in_float - 4.0
    assert found.trained > found.static + 4.0
    assert found.trained > found.in_float - 4.0
    assert found.worst <= 1
