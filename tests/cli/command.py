"""Runs the command in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from fxquant.cli import main

M = "tests.cli.models"


@dataclass(frozen=True)
class Done:
    """What a command left.

    Args:
        code: its exit status.
        out: what it printed on stdout.
        err: what it printed on stderr.
    """

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The JSON on stdout."""
        return json.loads(self.out)


class Command:
    """``fxquant``, called with words.

    Args:
        capsys: what catches the streams.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> Done:
        """Run it."""
        try:
            code = main([str(word) for word in words])
        except SystemExit as stopped:
            assert isinstance(stopped.code, int)
            code = stopped.code
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        return Done(code, out, err)
