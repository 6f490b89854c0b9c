"""The command, and files for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from tests.cli import models
from tests.cli.command import Command


@pytest.fixture
def fx(capsys: pytest.CaptureFixture[str]) -> Command:
    """``fx("quantize", ...)`` runs the command in this process."""
    return Command(capsys)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A quantized model in a file."""
    path = tmp_path / "model.pt"
    made = fxquant.quantize(models.Holder.made, models.loader(), backend="reference")
    torch.save(made, path)
    return path
