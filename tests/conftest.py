"""What every test shares: one torch thread per worker, seeds, repeatable property tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Workers share the cores between them: without this each would start a thread per core, and
# OpenMP reads its limit once, when torch is first imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Derandomized, because a suite that passes must pass again; no deadline, because no test here
# may depend on how busy the machine is.
hypothesis.settings.register_profile("fxquant", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("fxquant")


def pytest_configure(config: pytest.Config) -> None:
    """The models of these tests are tiny: calls cost more than arithmetic, so being told that
    int8 is slower is right and expected. Tests of that warning ask for it by name.
    """
    config.addinivalue_line("filterwarnings", "ignore::fxquant.errors.SpeedWarning")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Start every test from the same random state, whatever ran before it in this worker."""
    torch.manual_seed(0)
    yield
