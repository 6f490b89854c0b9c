"""Calibration: user data in, observers filled; edits no graph."""

from fxquant.calibration.binding import bind_batch
from fxquant.calibration.data import FirstBatch, first_batch
from fxquant.calibration.feed import CalibrationResult, calibrate
from fxquant.calibration.together import first_of_all

__all__ = [
    "CalibrationResult",
    "FirstBatch",
    "bind_batch",
    "calibrate",
    "first_batch",
    "first_of_all",
]
