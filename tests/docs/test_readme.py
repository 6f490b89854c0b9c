"""The README's promises: its Python blocks run in order, and the commands it names exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's fenced blocks in ``language``, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


# Whether a toy is faster in int8 is measured, and depends on what else the machine is doing.
@pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")
def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they write files
    found = blocks("python")
    assert len(found) >= 3
    names: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(found, start=1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), names)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make (\w+)", README, re.MULTILINE))))
def test_make_target_exists(target: str) -> None:
    command = ["make", "--dry-run", "--file", str(ROOT / "Makefile"), target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_links_into_the_tree_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []
