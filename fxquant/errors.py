"""The errors fxquant raises: each says what happened, where, why, and what to do.

Every class is an :class:`FxQuantError` and also the builtin that fits, so that
``except ValueError`` keeps working for people who do not know this package.
"""

from __future__ import annotations

import sys
import warnings
from typing import Final

from fxquant.text import readable

_PACKAGE: Final = __name__.partition(".")[0]


class FxQuantError(Exception):
    """Base of every error that fxquant raises on purpose.

    Messages quote names of modules, files and selectors, which may hold anything: what would act
    on a terminal shows as an escape, and the middle of very long words is left out.
    """

    def __str__(self) -> str:
        return readable(super().__str__())


class TraceError(FxQuantError, RuntimeError):
    """The model could not be turned into a graph."""


class GuardError(FxQuantError, RuntimeError):
    """A call would take another way through the model than the one that was captured."""


class PatternError(FxQuantError, ValueError):
    """A fusion pattern is defined in a way that can never work."""


class CalibrationError(FxQuantError, ValueError):
    """Calibration data is missing, malformed or not finite."""


class ConfigError(FxQuantError, ValueError):
    """An argument, configuration, override or backend name is not usable."""


class QParamError(FxQuantError, ValueError):
    """A scale or zero point is not usable."""


class VerifyError(FxQuantError, AssertionError):
    """A pass left the graph in a state its stage does not allow."""


class LoweringError(FxQuantError, RuntimeError):
    """A backend could not be used, or nothing in the model could become int8."""


class LoadError(FxQuantError, OSError):
    """A saved artefact cannot be read."""


class FxQuantWarning(UserWarning):
    """Base of every warning that fxquant gives."""


class CalibrationWarning(FxQuantWarning):
    """Calibration finished, but something about the data deserves a look."""


class SpeedWarning(FxQuantWarning):
    """The quantized model was measured slower than its float original."""


def warn_user(message: str, category: type[FxQuantWarning]) -> None:
    """Warn at the line of the user's code that called fxquant.

    Args:
        message: what happened, why, and what to do.
        category: which warning.
    """
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and _is_own(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(readable(message), category, stacklevel=level)


def _is_own(module: str) -> bool:
    # Context managers put frames of contextlib between ours.
    return module.partition(".")[0] in (_PACKAGE, "contextlib")
