"""What a user may ask for: :class:`QSpec` (one tensor) and :class:`QConfig` (one op)."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Final, Literal

from fxquant.errors import ConfigError

Dtype = Literal["uint8", "int8"]
Granularity = Literal["tensor", "channel"]
ObserverKind = Literal["histogram", "minmax", "moving_average"]
Mode = Literal["static", "dynamic", "qat", "weight_only", "float16", "bfloat16", "auto"]

_DTYPES: Final = ("uint8", "int8")
_GRANULARITIES: Final = ("tensor", "channel")
_OBSERVERS: Final = ("histogram", "minmax", "moving_average")


def _choose(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"QSpec.{field} is {value!r}: it must be one of {list(allowed)}{hint}")


@dataclass(frozen=True)
class QSpec:
    """How one tensor is quantized.

    Args:
        dtype: ``"uint8"`` or ``"int8"``, the type the codes are stored in.
        bits: how many of its 8 bits are used, 2 to 8.
        symmetric: whether the zero point is fixed at the middle of the code range.
        granularity: ``"tensor"`` for one scale, ``"channel"`` for one scale per output channel.
        observer: what watches the tensor during calibration: ``"histogram"`` (streaming
            histogram, range chosen by mean squared error), ``"minmax"`` or ``"moving_average"``.

    Raises:
        ConfigError: a field has a value that cannot work.

    Example:
        >>> QSpec(dtype="int8", bits=4, symmetric=True).quant_max
        7
    """

    dtype: Dtype = "uint8"
    bits: int = 8
    symmetric: bool = False
    granularity: Granularity = "tensor"
    observer: ObserverKind = "histogram"

    def __post_init__(self) -> None:
        _choose("dtype", self.dtype, _DTYPES)
        _choose("granularity", self.granularity, _GRANULARITIES)
        _choose("observer", self.observer, _OBSERVERS)
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ConfigError(f"QSpec.bits is {self.bits!r}: it must be an integer from 2 to 8")
        if not isinstance(self.symmetric, bool):
            raise ConfigError(f"QSpec.symmetric is {self.symmetric!r}: it must be True or False")

    @property
    def quant_min(self) -> int:
        """Smallest code; symmetric int8 leaves out -2**(bits-1) so that the range is even."""
        if self.dtype == "uint8":
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.symmetric else 0)

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1 if self.dtype == "uint8" else (1 << (self.bits - 1)) - 1


DEFAULT_ACTIVATION: Final = QSpec()
DEFAULT_WEIGHT: Final = QSpec("int8", symmetric=True, granularity="channel", observer="minmax")


@dataclass(frozen=True)
class QConfig:
    """How one op is quantized: its inputs, its weight, its output.

    Args:
        activation: the spec of the op's activation inputs; ``None`` leaves the op in float.
        weight: the spec of its weight; ``None`` leaves an op that has a weight in float.
        output: the spec of its result; the default ``"same"`` takes ``activation``, ``None``
            lets the op write float (its inputs and weight stay int8).

    Raises:
        ConfigError: a field is neither a :class:`QSpec` nor one of the values above.

    Example:
        >>> QConfig(weight=QSpec("int8", bits=4, symmetric=True, granularity="channel"))
        ... # doctest: +ELLIPSIS
        QConfig(...)
    """

    activation: QSpec | None = DEFAULT_ACTIVATION
    weight: QSpec | None = DEFAULT_WEIGHT
    output: QSpec | Literal["same"] | None = "same"

    def __post_init__(self) -> None:
        for name in ("activation", "weight", "output"):
            value = getattr(self, name)
            if value is None or isinstance(value, QSpec) or (name == "output" and value == "same"):
                continue
            raise ConfigError(f"QConfig.{name} is {value!r}: it must be a QSpec or None")
        if self.activation is not None and self.activation.granularity == "channel":
            raise ConfigError(
                "QConfig.activation asks for one scale per channel: no integer kernel can add up "
                "products whose scales differ along the summed axis; use granularity='tensor'"
            )
        if isinstance(self.output, QSpec) and self.output.granularity == "channel":
            raise ConfigError("QConfig.output asks for one scale per channel: use 'tensor'")
        if self.weight is not None and not (self.weight.dtype == "int8" and self.weight.symmetric):
            raise ConfigError(
                "QConfig.weight must be symmetric int8: the kernels take no weight zero point"
            )

    @property
    def result(self) -> QSpec | None:
        """The spec of the op's result, with ``"same"`` resolved."""
        return self.activation if self.output == "same" else self.output


PRESETS: Final[dict[str, QConfig]] = {
    "default": QConfig(),
    "x86": QConfig(),
    "onednn": QConfig(),
    "fbgemm": QConfig(),
    "qnnpack": QConfig(weight=dataclasses.replace(DEFAULT_WEIGHT, granularity="tensor")),
}


def resolve_qconfig(qconfig: QConfig | str | None) -> QConfig:
    """Turn what the user passed as ``qconfig=`` into a :class:`QConfig`.

    Raises:
        ConfigError: a name that is no preset, or something that is no configuration.
    """
    if qconfig is None:
        return PRESETS["default"]
    if isinstance(qconfig, QConfig):
        return qconfig
    if isinstance(qconfig, str):
        if qconfig in PRESETS:
            return PRESETS[qconfig]
        near = difflib.get_close_matches(qconfig, PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no preset is called {qconfig!r}: there are {sorted(PRESETS)}.{hint}")
    raise ConfigError(
        f"qconfig is a {type(qconfig).__name__}: pass a QConfig, the name of a preset, or None"
    )
