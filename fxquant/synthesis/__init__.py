"""Calibration without data: inputs made from the statistics a model's BatchNorms carry."""

from fxquant.synthesis.fit import REAL_DATA_IS_BETTER, synthesize

__all__ = ["REAL_DATA_IS_BETTER", "synthesize"]
