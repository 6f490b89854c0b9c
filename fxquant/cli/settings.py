"""How to quantize: a TOML file, and the options that stand above it."""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fxquant.cli.code import imported
from fxquant.cli.parsing import did_you_mean, positive, share
from fxquant.errors import ConfigError
from fxquant.spec import PRESETS, QConfig, QSpec, resolve_qconfig

FLOAT: Final = "float"
"""What stands for ``None``, which TOML and shells do not have."""
MODES: Final = ("static", "dynamic", "qat", "weight_only", "bfloat16", "float16")
_QSPEC: Final = tuple(each.name for each in dataclasses.fields(QSpec))
_QCONFIG: Final = tuple(each.name for each in dataclasses.fields(QConfig))


@dataclass(frozen=True)
class Settings:
    """How a model is quantized.

    Args:
        mode: as in :func:`fxquant.quantize`, and so on.
        qconfig: preset or configuration.
        backend: what it is to run on.
        overrides: selector, as it was written, to configuration.
        patterns: ``package.module:name`` of fusion patterns.
        max_batches: of calibration.
        min_coverage: share of ops that must be int8.
        strict: raise where a module stays as it is.
        train: ``package.module:name`` of the function that trains, in mode ``qat``.
    """

    mode: str = "static"
    qconfig: QConfig | str | None = None
    backend: str = "auto"
    overrides: Mapping[str, QConfig | str | None] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    max_batches: int | None = None
    min_coverage: float | None = None
    strict: bool = False
    train: str | None = None

    def keywords(self) -> dict[str, Any]:
        """Arguments of :func:`fxquant.prepare`; what is named is imported."""
        return {
            "mode": self.mode,
            "qconfig": self.qconfig,
            "backend": self.backend,
            "overrides": {_selector(key): value for key, value in self.overrides.items()} or None,
            "patterns": _patterns(self.patterns),
            "strict": self.strict,
        }

    def to_dict(self) -> dict[str, Any]:
        """The settings in plain types that JSON can hold; the keys are stable."""
        return {
            **{each.name: getattr(self, each.name) for each in dataclasses.fields(self)},
            "qconfig": _plain(self.qconfig),
            "overrides": {key: _plain(value) for key, value in self.overrides.items()},
            "patterns": list(self.patterns),
        }


_KEYS: Final = tuple(each.name for each in dataclasses.fields(Settings))
_TYPES: Final[dict[str, tuple[type | tuple[type, ...], str]]] = {
    "mode": (str, "a string"),
    "qconfig": ((str, dict), "the name of a preset or a table"),
    "backend": (str, "a string"),
    "overrides": (dict, "a table"),
    "patterns": (list, "a list of strings"),
    "max_batches": (int, "a whole number"),
    "min_coverage": ((int, float), "a number"),
    "strict": (bool, "true or false"),
    "train": (str, "the package.module:name of a function"),
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options of quantization."""
    group = parser.add_argument_group("quantization")
    group.add_argument("-c", "--config", metavar="FILE", help="settings in TOML")
    group.add_argument("--mode", choices=MODES, help="static unless told otherwise")
    group.add_argument("--qconfig", metavar="PRESET", help=f"one of {', '.join(PRESETS)}")
    group.add_argument("--backend", metavar="NAME", help="see `fxquant backends`")
    group.add_argument(
        "--override",
        metavar="SELECTOR=PRESET",
        action="append",
        default=[],
        help="for some ops: a path, a glob, re:..., or torch.nn:Conv2d; `float` leaves them float",
    )
    group.add_argument(
        "--pattern",
        metavar="MODULE:NAME",
        action="append",
        default=[],
        help="fusion patterns of your own",
    )
    group.add_argument(
        "--train",
        metavar="MODULE:FUNCTION",
        help="with --mode qat: f(model) trains the model that it is given",
    )
    group.add_argument("--max-batches", type=positive, metavar="N", help="of calibration")
    group.add_argument("--min-coverage", type=share, metavar="SHARE", help="0 to 1, else it fails")
    group.add_argument(
        "--strict", action="store_true", help="fail where a module would stay as it is"
    )


def read_settings(arguments: argparse.Namespace) -> Settings:
    """What the file and the options say; options win.

    Raises:
        ConfigError: something cannot be used.
    """
    settings = Settings() if arguments.config is None else from_toml(arguments.config)
    overrides = dict(settings.overrides)
    for text in arguments.override:
        selector, sign, value = text.rpartition("=")
        if not sign or not selector or not value:
            raise ConfigError(
                f"--override {text!r} is not of the form SELECTOR=PRESET, such as head=float"
            )
        overrides.pop(selector, None)  # the last one wins, wherever the first one stood
        overrides[selector] = _config(value, f"--override {selector!r}")
    given = {
        name: getattr(arguments, name)
        for name in ("mode", "qconfig", "backend", "max_batches", "min_coverage", "train")
        if getattr(arguments, name) is not None
    }
    made = dataclasses.replace(
        settings,
        **given,
        overrides=overrides,
        patterns=(*settings.patterns, *arguments.pattern),
        strict=settings.strict or arguments.strict,
    )
    if isinstance(made.qconfig, str):
        resolve_qconfig(made.qconfig)
    _check_train(made)
    return made


def _check_train(settings: Settings) -> None:
    if settings.mode == "qat" and settings.train is None:
        raise ConfigError(
            "mode qat trains the model: pass --train package.module:function, a function that "
            "trains the model it is given"
        )
    if settings.mode != "qat" and settings.train is not None:
        raise ConfigError(f"--train is for --mode qat, and the mode is {settings.mode}")


def from_toml(path: str) -> Settings:
    """Settings in a file.

    Raises:
        ConfigError: it is not there, is no TOML, or holds a key or a value that is none.
    """
    try:
        with open(path, "rb") as stream:
            held = tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"cannot read {path!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path!r} is no TOML: {error}") from error
    _check_keys(held, _KEYS, path)
    for key, value in held.items():
        kinds, wanted = _TYPES[key]
        # True is an int to Python, and 4 no bool.
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ConfigError(f"{path!r}: {key} is {value!r}: it must be {wanted}")
    if not all(isinstance(each, str) for each in held.get("patterns", ())):
        raise ConfigError(f"{path!r}: patterns is {held['patterns']!r}: it must be strings")
    if "mode" in held and held["mode"] not in MODES:
        hint = did_you_mean(held["mode"], MODES)
        raise ConfigError(f"{path!r}: mode is {held['mode']!r}: there are {list(MODES)}{hint}")
    if "qconfig" in held:
        held["qconfig"] = _config(held["qconfig"], f"{path!r}: qconfig")
        if held["qconfig"] is None:
            raise ConfigError(f"{path!r}: qconfig is 'float': then nothing is quantized")
    held["overrides"] = {
        selector: _config(value, f"{path!r}: overrides.{selector}")
        for selector, value in held.get("overrides", {}).items()
    }
    held["patterns"] = tuple(held.get("patterns", ()))
    return Settings(**held)


def _check_keys(held: Collection[str], known: Collection[str], where: str) -> None:
    for key in held:
        if key not in known:
            hint = did_you_mean(key, list(known))
            raise ConfigError(
                f"{where}: there is no setting {key!r}{hint}; there are {list(known)}"
            )


def _config(value: object, where: str) -> QConfig | str | None:
    """The configuration that a string or a table stands for."""
    if value == FLOAT:
        return None
    if isinstance(value, str):
        try:
            resolve_qconfig(value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error} {FLOAT!r} leaves ops in float.") from error
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}: it must be the name of a preset or a table")
    _check_keys(value, _QCONFIG, where)
    made: dict[str, Any] = dict(value)
    for name in ("activation", "weight", "output"):
        if name not in made or (name == "output" and made[name] == "same"):
            continue
        made[name] = _spec(made[name], f"{where}.{name}")
    try:
        return QConfig(**made)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _spec(value: object, where: str) -> QSpec | None:
    if value == FLOAT:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}: it must be a table or {FLOAT!r}")
    _check_keys(value, _QSPEC, where)
    try:
        return QSpec(**value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _selector(text: str) -> Any:
    """``torch.nn:Conv2d`` is the class; everything else is the path, glob or expression it says."""
    if text.startswith("re:") or ":" not in text:
        return text
    return imported(text, ConfigError, "the override")


def _patterns(specs: tuple[str, ...]) -> tuple[Any, ...]:
    found: list[Any] = []
    for spec in specs:
        given = imported(spec, ConfigError, "the pattern")
        found.extend(given if isinstance(given, tuple | list) else [given])
    return tuple(found)


def _plain(config: QConfig | str | None) -> Any:
    return dataclasses.asdict(config) if isinstance(config, QConfig) else config
