"""What a user may ask for: :class:`QSpec` (one tensor) and :class:`QConfig` (one op)."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Final, Literal

from fxquant.errors import ConfigError

Dtype = Literal["uint8", "int8"]
Granularity = Literal["tensor", "channel", "row", "group"]
ObserverKind = Literal["histogram", "minmax", "moving_average", "runtime"]
FloatDtype = Literal["float32", "bfloat16", "float16"]
Mode = Literal["static", "dynamic", "qat", "weight_only", "float16", "bfloat16", "auto"]
Scheme = Literal["static", "dynamic", "weight_only", "float"]

_DTYPES: Final = ("uint8", "int8")
_GRANULARITIES: Final = ("tensor", "channel", "row", "group")
_OBSERVERS: Final = ("histogram", "minmax", "moving_average", "runtime")
_FLOATS: Final = ("float32", "bfloat16", "float16")


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
        granularity: ``"tensor"`` for one scale, ``"channel"`` for one scale per output channel;
            of activations quantized at run time also ``"row"``, one scale for each row (token)
            or sample; of weights that are stored and not computed with also ``"group"``, one
            scale for every ``group_size`` neighbours of an output channel.
        observer: what watches the tensor during calibration: ``"histogram"`` (streaming
            histogram, range chosen by mean squared error), ``"minmax"`` or ``"moving_average"``;
            ``"runtime"`` watches nothing and takes the range of the tensor itself in every call.
        group_size: how many weights share a scale where ``granularity`` is ``"group"``, else 0.
        learned: whether mode ``"qat"`` trains the scale (and the zero point, if the spec is not
            symmetric) with the weights, from where the first batch puts it; other modes ignore it.

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
    group_size: int = 0
    learned: bool = False

    def __post_init__(self) -> None:
        _choose("dtype", self.dtype, _DTYPES)
        _choose("granularity", self.granularity, _GRANULARITIES)
        _choose("observer", self.observer, _OBSERVERS)
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ConfigError(f"QSpec.bits is {self.bits!r}: it must be an integer from 2 to 8")
        if not isinstance(self.symmetric, bool):
            raise ConfigError(f"QSpec.symmetric is {self.symmetric!r}: it must be True or False")
        if not isinstance(self.learned, bool):
            raise ConfigError(f"QSpec.learned is {self.learned!r}: it must be True or False")
        if self.learned and (self.observer == "runtime" or self.granularity in ("row", "group")):
            raise ConfigError(
                "QSpec.learned is True, and what is quantized at run time or by group has no scale "
                "of its own to learn: use granularity='tensor' or 'channel'"
            )
        self._check_granularity()

    def _check_granularity(self) -> None:
        if self.granularity == "row" and self.observer != "runtime":
            raise ConfigError(
                "QSpec.granularity is 'row', and only what is quantized at run time has one scale "
                "per row: pass observer='runtime' with it"
            )
        if self.observer == "runtime" and self.granularity not in ("row", "tensor"):
            raise ConfigError(
                f"QSpec.granularity is {self.granularity!r}: what is quantized at run time has one "
                "scale per 'row' or one per 'tensor'"
            )
        grouped, size = self.granularity == "group", self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size % 8 or size < 8 * grouped:
            raise ConfigError(
                f"QSpec.group_size is {size!r}: groups of weights have a multiple of 8 members, "
                "such as 32, 64 or 128"
            )
        if size and not grouped:
            raise ConfigError(f"QSpec.group_size is {size} and needs granularity='group'")

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
ROWS: Final = QSpec(granularity="row", observer="runtime")
"""Activations quantized at run time, one scale and zero point for each row."""


@dataclass(frozen=True)
class QConfig:
    """How one op is quantized: its inputs, its weight, its output.

    Args:
        activation: the spec of the op's activation inputs; ``None`` leaves them in float: an op
            with a weight then computes in float from a stored integer weight.
        weight: the spec of its weight; ``None`` leaves an op that has a weight in float.
        output: the spec of its result; the default ``"same"`` takes ``activation``, ``None``
            lets the op write float (its inputs and weight stay int8).
        float_dtype: what the op computes in, and reads and writes, where it is not int8; what an
            int8 layer writes for such readers.

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
    float_dtype: FloatDtype = "float32"

    def __post_init__(self) -> None:
        if self.float_dtype not in _FLOATS:
            raise ConfigError(
                f"QConfig.float_dtype is {self.float_dtype!r}: it must be one of {list(_FLOATS)}"
            )
        for name in ("activation", "weight", "output"):
            value = getattr(self, name)
            if value is None or isinstance(value, QSpec) or (name == "output" and value == "same"):
                continue
            raise ConfigError(f"QConfig.{name} is {value!r}: it must be a QSpec or None")
        self._check_activation()
        self._check_weight()

    def _check_activation(self) -> None:
        if self.activation is not None and self.activation.granularity in ("channel", "group"):
            raise ConfigError(
                f"QConfig.activation asks for one scale per {self.activation.granularity}: no "
                "integer kernel can add up products whose scales differ along the summed axis; "
                "use granularity='tensor', or 'row' at run time"
            )
        if isinstance(self.output, QSpec):
            if self.output.granularity != "tensor":
                raise ConfigError(
                    f"QConfig.output asks for one scale per {self.output.granularity}: use 'tensor'"
                )
            if self.output.observer == "runtime":
                raise ConfigError(
                    "QConfig.output has observer='runtime': ops that are quantized at run time "
                    "write float; pass output=None"
                )

    def _check_weight(self) -> None:
        if self.weight is None:
            return
        if self.weight.observer == "runtime":
            raise ConfigError("QConfig.weight has observer='runtime': weights do not change")
        if self.activation is None:
            return
        if not (self.weight.dtype == "int8" and self.weight.symmetric):
            raise ConfigError(
                "QConfig.weight must be symmetric int8: the kernels take no weight zero point "
                "(with activation=None, where weights are only stored, they may have one)"
            )
        if self.weight.granularity == "group":
            raise ConfigError(
                "QConfig.weight asks for one scale per group: no integer kernel adds up products "
                "whose scales differ along the summed axis; pass activation=None with it"
            )

    @property
    def scheme(self) -> Scheme:
        """How the op is quantized: ``static``, ``dynamic``, ``weight_only``, or ``float``."""
        if self.activation is None:
            return "float" if self.weight is None else "weight_only"
        return "dynamic" if self.activation.observer == "runtime" else "static"

    @property
    def result(self) -> QSpec | None:
        """The spec of the op's result, with ``"same"`` resolved."""
        return self.activation if self.output == "same" else self.output


_WEIGHT_ONLY: Final = QConfig(activation=None)
_GROUPS: Final = QSpec("int8", bits=4, symmetric=True, granularity="group", group_size=32)

PRESETS: Final[dict[str, QConfig]] = {
    "default": QConfig(),
    "x86": QConfig(),
    "onednn": QConfig(),
    "fbgemm": QConfig(),
    "qnnpack": QConfig(weight=dataclasses.replace(DEFAULT_WEIGHT, granularity="tensor")),
    "int8-bf16": QConfig(float_dtype="bfloat16"),
    "dynamic": QConfig(activation=ROWS),
    "dynamic-symmetric": QConfig(
        activation=QSpec("int8", symmetric=True, granularity="row", observer="runtime")
    ),
    "weight-only-int8": _WEIGHT_ONLY,
    "weight-only-int4": QConfig(activation=None, weight=_GROUPS),
    "float16": QConfig(activation=None, weight=None, float_dtype="float16"),
    "bfloat16": QConfig(activation=None, weight=None, float_dtype="bfloat16"),
}
"""Configurations by name."""

_OF_MODE: Final[dict[str, str]] = {
    "dynamic": "dynamic",
    "weight_only": "weight-only-int8",
    "float16": "float16",
    "bfloat16": "bfloat16",
}

_BY_MODE: Final[dict[tuple[str, str], QConfig]] = {
    ("int8-bf16", "dynamic"): QConfig(activation=ROWS, float_dtype="bfloat16"),
}
"""Presets that mean something else in a mode."""


def resolve_qconfig(qconfig: QConfig | str | None, mode: Mode = "static") -> QConfig:
    """Turn what the user passed as ``qconfig=`` into a :class:`QConfig`.

    Args:
        qconfig: a configuration, the name of a preset, or ``None`` for that of the mode.
        mode: whose preset stands for ``None``.

    Raises:
        ConfigError: a name that is no preset, or something that is no configuration.
    """
    if qconfig is None:
        return PRESETS[_OF_MODE.get(mode, "default")]
    if isinstance(qconfig, QConfig):
        return qconfig
    if isinstance(qconfig, str):
        if (qconfig, mode) in _BY_MODE:
            return _BY_MODE[qconfig, mode]
        if qconfig in PRESETS:
            return PRESETS[qconfig]
        near = difflib.get_close_matches(qconfig, PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no preset is called {qconfig!r}: there are {sorted(PRESETS)}.{hint}")
    raise ConfigError(
        f"qconfig is a {type(qconfig).__name__}: pass a QConfig, the name of a preset, or None"
    )
