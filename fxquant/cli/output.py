"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fxquant.errors import ConfigError


def check_writable(path: str) -> None:
    """Refuse a place that cannot be written to, before any work starts.

    Raises:
        ConfigError: its folder is not there, or it is a folder itself.
    """
    target = Path(path)
    if _is_device(target):
        return
    if target.is_dir():
        raise ConfigError(f"cannot write {path!r}: it is a folder")
    if not target.parent.is_dir():
        raise ConfigError(f"cannot write {path!r}: there is no folder {str(target.parent)!r}")
    if not os.access(target.parent, os.W_OK):
        raise ConfigError(f"cannot write {path!r}: {str(target.parent)!r} is write-protected")


def write(path: str, fill: Callable[[BinaryIO], object]) -> None:
    """Fill a file beside ``path``, then put it in its place; on failure nothing is left.

    Args:
        path: the file; one that stands there is replaced.
        fill: writes the bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    # Through links: what they point to is replaced, and they stay.
    target = Path(os.path.realpath(path))
    if _is_device(target):
        try:
            with target.open("wb") as stream:
                fill(stream)
        except OSError as error:
            raise ConfigError(f"cannot write {path!r}: {error.strerror}") from error
        return
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
    except OSError as error:
        raise ConfigError(f"cannot write {path!r}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            fill(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, _mode(target))
        os.replace(name, target)
    except BaseException as error:
        # Ctrl-C included: what is half written must not stay.
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise ConfigError(f"cannot write {path!r}: {error.strerror}") from error
        raise


def write_text(path: str, text: str) -> None:
    """Write ``text`` and a line end as UTF-8, all or nothing.

    Raises:
        ConfigError: the file cannot be written.
    """
    data = f"{text}\n".encode("utf-8", "backslashreplace")
    write(path, lambda stream: stream.write(data))


def _is_device(target: Path) -> bool:
    """Whether it is a pipe, a terminal or the like, which must not be replaced by a file."""
    return target.exists() and not target.is_file() and not target.is_dir()


def _mode(target: Path) -> int:
    """The permissions the file has, or would get from any other program."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
