"""The docs: every code block runs, every link leads somewhere, every public name is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import fxquant
from tests.docs import pages
from tests.docs.pages import PAGES, ROOT, blocks, run_page


# Whether a toy is faster in int8 is measured, and depends on what else the machine is doing.
@pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    try:
        run_page(page)
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]


def test_there_are_pages_with_code() -> None:
    assert len(PAGES) >= 12
    assert sum(len(blocks(page)) for page in PAGES) >= 40


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    here = (ROOT / page).parent
    assert [target for target in targets if not (here / target).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8").splitlines()
    names = [page.removeprefix("docs/").removesuffix(".md") for page in PAGES]
    assert [name for name in names if name != "index" and name not in index] == []


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert [name for name in fxquant.__all__ if f":: fxquant.{name}\n" not in text] == []


def write(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(text)
    return "page.md"


@pytest.mark.parametrize(
    "text",
    [
        "```python\nassert False\n```\n",
        "```python\nprint('a')\n```\n\n```text\nb\n```\n",
        "```sh\nfxquant report nowhere.pt\n```\n",
        "```sh\nrm -r x\n```\n",
        "```cobol\nSTOP RUN.\n```\n",
        "```\nno language\n```\n",
        ":::{code-block} python\nassert False\n:::\n",
    ],
)
def test_a_page_that_is_wrong_fails(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write(tmp_path, text, monkeypatch)
    with pytest.raises(AssertionError):
        run_page(page)


def test_a_page_that_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "```{code-block} python\n:caption: m.py\n\nx = 3\n```\n"
        "```python\nimport pathlib\na = 1\n```\n```python\nprint(a, '1.5 ms', 2)\n```\n"
        "```text\n1 ... ms 2\n```\n"
        "```python\nassert pathlib.Path('m.py').read_text() == 'x = 3\\n'\n```\n"
        "```sh\n# exits with 3\nfxquant report nowhere.pt\nfxquant backends \\\n  --json\n```\n"
    )
    page = write(tmp_path, text, monkeypatch)
    assert run_page(page) == ["python", "python", "python", "text", "python", "sh"]
