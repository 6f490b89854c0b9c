"""Data for calibration and comparison: files of arrays, folders of them, or the user's loader."""

from __future__ import annotations

import importlib
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fxquant.calibration.data import as_batches, is_function, length
from fxquant.cli.code import call, imported
from fxquant.errors import CalibrationError

KINDS: Final = (".npy", ".npz", ".safetensors")
_BY_PLACE: Final = re.compile(r"arr_\d+")
"""What numpy.savez calls arrays without names."""
_UNREADABLE: Final = (ValueError, TypeError, OSError, EOFError, KeyError, zipfile.BadZipFile)
"""What numpy raises on something that is no array."""


@dataclass(frozen=True)
class Files:
    """Batches in files, read one at a time.

    Args:
        paths: the files.
        batch_size: split what a file holds into batches of so many samples.
    """

    paths: tuple[str, ...]
    batch_size: int | None = None

    def __iter__(self) -> Iterator[Any]:
        for path in self.paths:
            held = read(path)
            if self.batch_size is None:
                yield held
            else:
                yield from _split(held, self.batch_size, path)

    def __length_hint__(self) -> int:
        if self.batch_size is not None:
            raise TypeError("unknown")  # how this protocol says that there is no hint
        return len(self.paths)


@dataclass(frozen=True)
class Loaded:
    """Batches of the user's code, which is blamed for what it raises.

    Args:
        batches: what the loader gave.
        spec: its name.
    """

    batches: Iterable[Any]
    spec: str

    def __iter__(self) -> Iterator[Any]:
        what = f"get data from {self.spec}"
        iterator = call(lambda: iter(self.batches), what, CalibrationError)
        while True:
            batch = call(lambda: next(iterator, _END), what, CalibrationError)
            if batch is _END:
                return
            yield batch

    def __length_hint__(self) -> int:
        known = length(self.batches)
        if known is None:
            raise TypeError("unknown")  # how this protocol says that there is no hint
        return known


_END: Final = object()


def load_data(spec: str, batch_size: int | None = None) -> Any:
    """What a file, a folder or ``package.module:loader`` gives.

    Args:
        spec: where the data is; a loader is called without arguments, unless it takes the model.
        batch_size: split what files hold.

    Raises:
        CalibrationError: there is none, or it cannot be read.
    """
    if os.path.isdir(spec):
        names = sorted(name for name in os.listdir(spec) if name.endswith(KINDS))
        if not names:
            raise CalibrationError(
                f"the folder {spec!r} holds no data: files are to end with {', '.join(KINDS)}"
            )
        return Files(tuple(os.path.join(spec, name) for name in names), batch_size)
    if os.path.isfile(spec):
        if not spec.endswith(KINDS):
            raise CalibrationError(f"{spec!r} is no data: files are to end with {', '.join(KINDS)}")
        return Files((spec,), batch_size)
    if ":" not in spec:
        raise CalibrationError(
            f"the data {spec!r} is neither a file ({', '.join(KINDS)}), nor a folder of them, nor "
            "package.module:loader"
        )
    if batch_size is not None:
        raise CalibrationError("--batch-size is for files: let the loader make its batches")
    return _from_code(spec)


def load_transform(spec: str | None) -> Callable[[Any], Any] | None:
    """The function at ``package.module:function``.

    Raises:
        CalibrationError: it is not there, or no function.
    """
    if spec is None:
        return None
    found = imported(spec, CalibrationError, "the transform")
    if not callable(found):
        raise CalibrationError(f"the transform {spec!r} is a {type(found).__name__}")
    return found  # type: ignore[no-any-return]  # callable() says that much and no more


def _from_code(spec: str) -> Any:
    found = imported(spec, CalibrationError, "the data")
    if not callable(found) or isinstance(found, Tensor):
        return Loaded(as_batches(found), spec)
    try:
        found = call(found, f"get data from {spec}()", CalibrationError)
    except CalibrationError as error:
        # f(model) is a form of its own: it was called without the model it wants.
        if isinstance(error.__cause__, TypeError) and _takes_model(found):
            return lambda model: call(lambda: found(model), f"run {spec}", CalibrationError)
        raise
    return Loaded(as_batches(found), spec)


def _takes_model(found: Any) -> bool:
    try:
        return is_function(found)
    except CalibrationError:
        return False


def read(path: str) -> Any:
    """One file as a batch: a tensor, a tuple of tensors, or tensors by name.

    Arrays in float64 become float32; nothing is ever unpickled.

    Raises:
        CalibrationError: it cannot be read.
        ModuleNotFoundError: numpy is not installed.
    """
    if path.endswith(".safetensors"):
        try:
            return _batch(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CalibrationError(f"{path!r} cannot be read: {error}") from error
    numpy: Any = importlib.import_module("numpy")
    try:
        with open(path, "rb") as stream:
            held = numpy.load(stream, allow_pickle=False)
            if hasattr(held, "files"):
                with held:
                    return _batch({name: _tensor(numpy, held[name]) for name in held.files})
            return _tensor(numpy, held)
    except _UNREADABLE as error:
        # What numpy does not know it takes for a pickle, and says how to open that.
        why = "it holds no array of numbers" if "allow_pickle" in str(error) else error
        raise CalibrationError(f"{path!r} cannot be read: {why}") from error


def _tensor(numpy: Any, array: Any) -> Tensor:
    # Arrays written on a machine of the other byte order are legal, and torch takes none.
    native = array.dtype.newbyteorder("=")
    made = torch.from_numpy(numpy.asarray(array, dtype=native, order="C"))
    return made.float() if made.dtype is torch.float64 else made


def _batch(held: Mapping[str, Tensor]) -> Any:
    """One tensor stands for itself, those numpy numbered for arguments by place."""
    if not held:
        raise ValueError("it holds no array")
    if len(held) == 1:
        return next(iter(held.values()))
    if all(_BY_PLACE.fullmatch(name) for name in held):
        return tuple(held[name] for name in sorted(held, key=lambda name: int(name[4:])))
    return dict(held)


def _split(held: Any, size: int, path: str) -> Iterator[Any]:
    """Batches of ``size`` samples; all tensors of a file have as many."""
    if isinstance(held, Tensor):
        if not held.dim():
            raise CalibrationError(f"{path!r} holds a single number, which cannot be split")
        yield from held.split(size)
        return
    parts = held.values() if isinstance(held, dict) else held
    lengths = {len(each) if each.dim() else -1 for each in parts}
    if len(lengths) != 1 or lengths == {-1}:
        raise CalibrationError(
            f"{path!r} cannot be split into batches of {size}: its arrays differ in their first "
            "dimension"
        )
    for pieces in zip(*(each.split(size) for each in parts), strict=True):
        yield dict(zip(held, pieces, strict=True)) if isinstance(held, dict) else pieces
