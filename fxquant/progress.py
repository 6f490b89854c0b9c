"""Progress of long loops: a bar where rich or tqdm is installed, else plain lines, on stderr.

Nothing appears for what is over within :data:`AFTER` seconds, nor where nobody watches.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import operator
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Final, Protocol, TextIO, TypeVar

from fxquant.errors import ConfigError

Report = Callable[[int, int | None], None]
Progress = bool | Report | None
Clock = Callable[[], float]
T = TypeVar("T")

AFTER: Final = 2.0
"""Seconds before the first sign of progress."""
_TICK: Final = 0.1
"""Seconds between two drawings of a bar."""
_LINE: Final = 10.0
"""Most seconds between two plain lines."""


class Display(Protocol):
    """What draws."""

    def show(self, done: int, total: int | None, seconds: float) -> None:
        """Draw that ``done`` of ``total`` (``None``: unknown) took ``seconds``."""

    def close(self) -> None:
        """Draw nothing more."""


class Lines:
    """One line at the start, at every tenth, and at least every ten seconds.

    Args:
        label: what is going on, ``"calibrating"``.
        stream: where the lines go.
    """

    def __init__(self, label: str, stream: TextIO) -> None:
        self._label, self._stream = label, stream
        self._last: tuple[int, float] | None = None

    def show(self, done: int, total: int | None, seconds: float) -> None:
        """Print a line if enough has happened since the last one."""
        tenth = 10 * done // total if total else 0
        if self._last is not None:
            before, when = self._last
            if tenth == before and seconds - when < _LINE:
                return
        self._last = (tenth, seconds)
        if not total:
            print(f"{self._label}: {done}, {seconds:.0f} s", file=self._stream, flush=True)
            return
        left = seconds / done * (total - done) if done else 0.0
        more = f", about {left:.0f} s left" if done < total else ""
        line = f"{self._label}: {done} of {total}, {seconds:.0f} s{more}"
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Lines stay."""


class RichBar:
    """A bar of rich, drawn by our own calls: no thread, and gone at the end.

    Args:
        label: what is going on.
        stream: where it is drawn.
    """

    def __init__(self, label: str, stream: TextIO) -> None:
        console = importlib.import_module("rich.console").Console(file=stream)
        rich = importlib.import_module("rich.progress")
        columns = (
            # Labels are text: square brackets in them are no markup of rich.
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),  # counts where the total is unknown, too
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(),
        )
        self._bar: Any = rich.Progress(
            *columns, console=console, auto_refresh=False, transient=True
        )
        self._task = self._bar.add_task(label, total=None)
        self._bar.start()

    def show(self, done: int, total: int | None, seconds: float) -> None:
        """Draw the bar."""
        self._bar.update(self._task, completed=done, total=total, refresh=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


class TqdmBar:
    """A bar of tqdm.

    Args:
        label: what is going on.
        stream: where it is drawn.
    """

    def __init__(self, label: str, stream: TextIO) -> None:
        made = importlib.import_module("tqdm").tqdm
        self._bar: Any = made(desc=label, file=stream, leave=False, mininterval=0.0)

    def show(self, done: int, total: int | None, seconds: float) -> None:
        """Draw the bar."""
        self._bar.total = total
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


_BARS: Final[tuple[tuple[str, Callable[[str, TextIO], Display]], ...]] = (
    ("rich", RichBar),
    ("tqdm", TqdmBar),
)


def _display(label: str, stream: TextIO, plain: bool) -> Display:
    """The best display that is installed and that the stream can show."""
    if not plain and stream.isatty():
        for name, made in _BARS:
            # A name that is None in sys.modules is how imports are switched off.
            if sys.modules.get(name, "") is not None and importlib.util.find_spec(name):
                return made(label, stream)
    return Lines(label, stream)


class Meter:
    """Counts how far a loop is, and draws it once it has taken long enough.

    Args:
        label: what is going on.
        stream: where it is drawn; by default stderr as it is when the meter is made.
        after: seconds before anything is drawn.
        plain: lines and no bar, whatever is installed.
        clock: seconds; never goes back.

    Example:
        >>> import io
        >>> times, out = iter([0.0, 1.0, 3.0]), io.StringIO()
        >>> meter = Meter("calibrating", stream=out, clock=lambda: next(times))
        >>> meter(1, 4), meter(2, 4), meter.close()
        (None, None, None)
        >>> out.getvalue()
        'calibrating: 2 of 4, 3 s, about 3 s left\\n'
    """

    def __init__(
        self,
        label: str,
        *,
        stream: TextIO | None = None,
        after: float = AFTER,
        plain: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        self._label, self._plain, self._after, self._clock = label, plain, after, clock
        self._stream = sys.stderr if stream is None else stream
        self._start = clock()
        self._drawn = self._start - _TICK
        self._display: Display | None = None

    def __call__(self, done: int, total: int | None = None) -> None:
        """Note that ``done`` of ``total`` are done; ``None`` is a total nobody knows."""
        now = self._clock()
        if now - self._start < self._after:
            return
        if now - self._drawn < _TICK and done != total:
            return
        if self._display is None:
            self._display = _display(self._label, self._stream, self._plain)
        self._drawn = now
        self._display.show(done, total, now - self._start)

    def close(self) -> None:
        """Take away what was drawn, if it does not stay."""
        if self._display is not None:
            self._display.close()
            self._display = None


def check_progress(progress: object) -> None:
    """Refuse what cannot say or show progress.

    Raises:
        ConfigError: it is neither a bool, nor a function, nor ``None``.
    """
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise ConfigError(
            f"progress is a {type(progress).__name__}: pass True, False, a function "
            "f(done, total), or None, which shows long loops where stderr is a terminal"
        )


@contextlib.contextmanager
def showing(
    progress: Progress,
    label: str,
    *,
    stream: TextIO | None = None,
    plain: bool = False,
    clock: Clock = time.monotonic,
) -> Generator[Report | None]:
    """What is to be called after each step of a loop, or ``None`` where nobody wants to know.

    Args:
        progress: ``None`` shows loops of more than two seconds where ``stream`` is a terminal;
            ``True`` shows every loop, wherever; ``False`` none; a function is called itself.
        label: what is going on.
        stream: by default stderr.
        plain: lines and no bar.
        clock: seconds.

    Raises:
        ConfigError: ``progress`` is something else.
    """
    check_progress(progress)
    if callable(progress):
        yield progress
        return
    watched = sys.stderr if stream is None else stream
    # Without a console, as under pythonw, there is no stderr.
    if progress is False or watched is None or (progress is None and not watched.isatty()):
        yield None
        return
    after = 0.0 if progress else AFTER
    meter = Meter(label, stream=watched, after=after, plain=plain, clock=clock)
    try:
        yield meter
    finally:
        meter.close()


def track(
    items: Iterable[T],
    label: str = "training",
    *,
    progress: Progress = None,
    total: int | None = None,
) -> Iterator[T]:
    """Go through ``items`` and show how far that is; for training loops of your own.

    Args:
        items: anything that can be looped over, a DataLoader for one.
        label: what is going on.
        progress: as in :func:`showing`.
        total: how many there are; by default their length, if they have one.

    Example:
        >>> [2 * item for item in track([1, 2, 3], "doubling")]
        [2, 4, 6]
    """
    if total is None:
        try:
            hint = operator.length_hint(items, -1)
        except (NotImplementedError, TypeError):
            hint = -1  # a DataLoader over a stream says that it has no length
        total = hint if hint >= 0 else None
    with showing(progress, label) as report:
        for done, item in enumerate(items, start=1):
            yield item
            del item  # it has to be gone before the next one is drawn
            if report is not None:
                report(done, total)
