"""The BERT example in a small form: dynamic int8 loses at most half a point."""

from __future__ import annotations

import warnings

import pytest

from examples.bert_sources import main
from fxquant.errors import SpeedWarning


def test_dynamic_is_as_right_as_float(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpeedWarning)
        real, codes = main(limit=700, epochs=2)
    assert real > 0.6  # a guess is right in 0.25 of the cases
    assert codes >= real - 0.005
    assert "int8" in capsys.readouterr().out
