"""The LSTM example in a small form: int8 loses at most half a point."""

from __future__ import annotations

from examples.lstm_digits import compare


def test_int8_is_as_right_as_float() -> None:
    found = compare(hidden=64, epochs=10)
    assert found.float_accuracy > 90.0
    assert found.int8_accuracy >= found.float_accuracy - 0.5
    assert found.int8_bytes < 0.4 * found.float_bytes
