"""Progress: who sees it, when, and what is drawn; on a fake clock and a fake terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import ConfigError
from fxquant.progress import Meter, showing, track


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """It pretends."""
        return True


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages were not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def run(meter: Meter, clock: Clock, steps: int, each: float, total: int | None) -> None:
    """``steps`` steps of ``each`` seconds."""
    for done in range(1, steps + 1):
        clock.now += each
        meter(done, total)
    meter.close()


def test_nothing_is_drawn_within_two_seconds() -> None:
    clock, out = Clock(), Terminal()
    run(Meter("calibrating", stream=out, clock=clock), clock, 19, 0.1, 19)
    assert out.getvalue() == ""


def test_lines_come_at_every_tenth() -> None:
    clock, out = Clock(), Terminal()
    run(Meter("calibrating", stream=out, plain=True, clock=clock), clock, 100, 0.5, 100)
    lines = out.getvalue().splitlines()
    assert lines[0] == "calibrating: 4 of 100, 2 s, about 48 s left"
    assert lines[1] == "calibrating: 10 of 100, 5 s, about 45 s left"
    assert lines[-1] == "calibrating: 100 of 100, 50 s"
    assert len(lines) == 11


def test_a_slow_loop_is_heard_of_every_ten_seconds() -> None:
    clock, out = Clock(), Terminal()
    run(Meter("calibrating", stream=out, plain=True, clock=clock), clock, 60, 1.0, 1000)
    assert len(out.getvalue().splitlines()) == 6


@pytest.mark.parametrize("total", [None, 0])
def test_an_unknown_length_is_fine(total: int | None) -> None:
    clock, out = Clock(), Terminal()
    run(Meter("calibrating", stream=out, plain=True, clock=clock), clock, 25, 1.0, total)
    assert out.getvalue().splitlines() == [f"calibrating: {n}, {n} s" for n in (2, 12, 22)]


@pytest.mark.parametrize("bar", ["rich", "tqdm"])
@pytest.mark.parametrize("total", [20, None])
def test_bars_are_drawn_and_taken_away(
    bar: str, total: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(bar)
    without(monkeypatch, *({"rich", "tqdm"} - {bar}))
    # rich draws no bar where the environment says that the terminal is a dumb one
    monkeypatch.setenv("TERM", "xterm")
    clock, out = Clock(), Terminal()
    run(Meter("a [bold] label", stream=out, clock=clock), clock, 20, 0.5, total)
    assert "a [bold] label" in out.getvalue()
    assert out.getvalue().count("a [bold] label") >= 10
    assert "20/" in out.getvalue() or "20it" in out.getvalue()


def test_no_bar_where_neither_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "rich", "tqdm")
    clock, out = Clock(), Terminal()
    run(Meter("calibrating", stream=out, clock=clock), clock, 3, 1.0, 3)
    assert out.getvalue().splitlines()[-1] == "calibrating: 3 of 3, 3 s"


def test_a_bar_is_not_drawn_more_than_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = Clock(), list[int]()

    class Counting:
        def show(self, done: int, total: int | None, seconds: float) -> None:
            shown.append(done)

        def close(self) -> None:
            pass

    monkeypatch.setattr("fxquant.progress._display", lambda *_: Counting())
    run(Meter("", stream=Terminal(), clock=clock), clock, 4000, 0.001, 4000)
    assert 19 <= len(shown) <= 22
    assert shown[-1] == 4000


@pytest.mark.parametrize(
    ("progress", "stream", "reports"),
    [
        (None, Terminal(), True),
        (None, io.StringIO(), False),
        (False, Terminal(), False),
        (True, io.StringIO(), True),
    ],
)
def test_who_sees_progress(progress: bool | None, stream: io.StringIO, reports: bool) -> None:
    with showing(progress, "calibrating", stream=stream) as report:
        assert (report is not None) is reports


def test_a_function_is_called_itself() -> None:
    def told(done: int, total: int | None) -> None:
        pass

    with showing(told, "calibrating") as report:
        assert report is told


def test_no_stderr_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with showing(None, "calibrating") as report:
        assert report is None


def test_what_was_drawn_goes_away_on_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(Meter, "close", lambda self: closed.append(True))
    with pytest.raises(ZeroDivisionError), showing(True, "", stream=io.StringIO()):
        raise ZeroDivisionError
    assert closed == [True]


NET = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
BATCHES = [torch.randn(8, 4) for _ in range(5)]


@pytest.mark.parametrize("wrong", ["yes", 1, []])
def test_anything_else_is_refused_before_any_work(wrong: Any) -> None:
    drawn: list[int] = []

    def stream() -> Iterable[torch.Tensor]:
        drawn.append(1)
        yield from BATCHES

    with pytest.raises(ConfigError, match="pass True, False, a function"):
        fxquant.quantize(NET, stream(), backend="reference", progress=wrong)
    assert drawn == []


def quantize_with(progress: Any) -> None:
    fxquant.quantize(NET, BATCHES, backend="reference", progress=progress)


def test_calibration_shows_itself_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    quantize_with(True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "calibrating: 5 of 5, 0 s"


@pytest.mark.parametrize("progress", [None, False])
def test_calibration_is_silent(progress: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_with(progress)
    assert capsys.readouterr() == ("", "")


def test_track_gives_all_items_and_tells_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int | None]] = []
    tell: Callable[[int, int | None], None] = lambda done, total: told.append((done, total))  # noqa: E731
    assert list(track("abc", progress=tell)) == ["a", "b", "c"]
    assert list(track((c for c in "ab"), progress=tell)) == ["a", "b"]
    assert list(track((c for c in "a"), progress=tell, total=7)) == ["a"]
    assert told == [(1, 3), (2, 3), (3, 3), (1, None), (2, None), (1, 7)]
    assert list(track(range(3), "training")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_track_of_a_stream_without_length() -> None:
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

        def __len__(self) -> int:
            raise TypeError("a stream has no length")

    assert len(list(track(torch.utils.data.DataLoader(Stream(), batch_size=None)))) == 3


def test_leaving_a_tracked_loop_early_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(Meter, "close", lambda self: closed.append(True))
    looping = track([1, 2, 3], progress=True)
    assert next(looping) == 1
    getattr(looping, "close")()  # noqa: B009 - what `break` does to a generator
    assert closed == [True]
