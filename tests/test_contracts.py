"""The rules that linters hold: each is broken on purpose in a copy, and the linter must say so."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

FLOORS = "A module imports only from the floors below its own"
PASSES = "No pass imports another pass"
PROTOCOL = "Passes know backends by their protocol only"
TORCHLESS = "What users may ask for, and the errors, need no torch"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package and its configuration, to be spoiled."""
    shutil.copytree(ROOT / "fxquant", tmp_path / "fxquant")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(tree: Path, file: str, line: str) -> None:
    """Append ``line`` to ``file`` of the copied package; a file that is not there is made."""
    with (tree / "fxquant" / file).open("a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")


def lint_imports(tree: Path) -> tuple[int, dict[str, str]]:
    """Check the copy; the verdict (``KEPT`` or ``BROKEN``) of every contract by its name."""
    command = [str(BIN / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    verdicts = dict(re.findall(r"^(.+) (KEPT|BROKEN)\b", done.stdout, re.MULTILINE))
    assert verdicts, done.stdout + done.stderr
    return done.returncode, verdicts


def test_contracts_hold_in_the_copy_as_it_is(tree: Path) -> None:
    status, verdicts = lint_imports(tree)
    assert status == 0
    assert verdicts == dict.fromkeys((FLOORS, PASSES, PROTOCOL, TORCHLESS), "KEPT")


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("errors.py", "import fxquant.spec", FLOORS),
        ("graph/planted.py", "import fxquant.numerics.affine", FLOORS),
        ("numerics/planted.py", "from fxquant.graph import ops", FLOORS),
        ("patterns/planted.py", "import fxquant.passes", FLOORS),
        ("patterns/planted.py", "import fxquant.backends", FLOORS),
        ("backends/planted.py", "import fxquant.passes", FLOORS),
        ("passes/planted.py", "import fxquant.report", FLOORS),
        ("undeclared.py", "", FLOORS),
        ("passes/planted.py", "import fxquant.passes.planted_too", PASSES),
        ("passes/planted.py", "import fxquant.backends.planted", PROTOCOL),
        ("spec.py", "import torch", TORCHLESS),
    ],
)
def test_a_forbidden_import_breaks_its_contract(
    tree: Path, file: str, line: str, contract: str
) -> None:
    for module in ("passes/planted_too.py", "backends/planted.py"):
        plant(tree, module, "")
    plant(tree, file, line)
    status, verdicts = lint_imports(tree)
    assert status == 1
    assert [name for name, verdict in verdicts.items() if verdict == "BROKEN"] == [contract]


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("numerics/planted.py", "import torch.ao.quantization", "TID251"),
        ("numerics/planted.py", "from torch.ao.nn import quantized", "TID251"),
        ("numerics/planted.py", "import torch\n\nDTYPE = torch.quint8", "TID251"),
        ("passes/planted.py", "import torch.fx\n\nTRACE = torch.fx.symbolic_trace", "TID251"),
        ("passes/planted.py", "import os\n\nFLAG = os.environ", "TID251"),
        ("passes/planted.py", "from . import fuse", "TID252"),
        ("passes/planted.py", "def late() -> None:\n    import math\n\n    math.pi", "PLC0415"),
    ],
)
def test_a_forbidden_name_is_found_by_the_linter(
    tree: Path, file: str, line: str, rule: str
) -> None:
    plant(tree, file, line)
    command = [str(BIN / "ruff"), "check", "--no-cache", "--output-format=concise", "--exit-zero"]
    done = subprocess.run(
        [*command, f"fxquant/{file}"], cwd=tree, capture_output=True, text=True, check=True
    )
    assert f" {rule} " in done.stdout
