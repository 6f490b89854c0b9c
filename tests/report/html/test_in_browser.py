"""The pages in a real browser: they do what they say by mouse and by keyboard, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.report.diff import diff_models
from tests.report.html.browser import CHROMIUM, Tab, chromium
from tests.report.html.pages import Page
from tests.report.html.test_pages import HOSTILE, hostile_diff, long_chain
from tests.report.test_report_api import Small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]

SHOWN = "document.querySelectorAll('g.b[data-i]:not(.off)').length"
PANEL = "document.getElementById('panel').textContent"
PATHS = "[...document.querySelectorAll('path.e:not(.off)')].map((e) => e.getAttribute('d'))"
PLACES = "[...document.querySelectorAll('g.b:not(.off)')].map((g) => g.getAttribute('transform'))"
CHOSEN = "document.querySelector('g.b.on')?.getAttribute('aria-label') ?? ''"


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def chain(tab: Tab, tmp_path: Path) -> Tab:
    """A chain of forty ops, one of which is another."""
    tab.events.clear()
    diff = diff_models(long_chain(40, 0), long_chain(40, 20))
    tab.open(diff.to_html(), tmp_path / "chain.html")
    return tab


def click(tab: Tab, selector: str) -> None:
    """A click of the mouse in the middle of an element."""
    place = tab.run(
        f"(() => {{ const e = document.querySelector({selector!r});"
        " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        point = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        tab.call("Input.dispatchMouseEvent", type=kind, **point)


def test_the_script_draws_what_was_drawn_already(tab: Tab, tmp_path: Path) -> None:
    """The folded drawing of the file, and that of the script, are the same."""
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 8, 8)]
    quantized = fxquant.quantize(Small().eval(), batches, backend="reference")
    tab.events.clear()
    for diff in (fxquant.diff(quantized), diff_models(long_chain(40, 0), long_chain(40, 20))):
        page = diff.to_html()
        tab.open(page, tmp_path / "drawn.html")
        assert not tab.run("document.documentElement.classList.contains('nojs')")
        of_file = [a["d"] for a in Page(page).having("path", "data-e") if " off" not in a["class"]]
        assert tab.run(PATHS) == of_file
        blocks = Page(page).having("g", "data-h")
        assert tab.run(PLACES) == [a["transform"] for a in blocks if " off" not in a["class"]]
    assert tab.complaints() == []


def test_folded_runs_unfold_and_fold(chain: Tab) -> None:
    assert chain.run(SHOWN) == 3  # the input, the change, the output
    click(chain, "g.pill")
    assert chain.run(SHOWN) == 22
    assert "n1" in chain.run(PANEL)
    click(chain, "#panel button")
    assert chain.run(SHOWN) == 3
    click(chain, "#unfold")
    assert chain.run(SHOWN) == 41
    heights = chain.run(
        "[...document.querySelectorAll('g.b:not(.off)')].map((g) => +g.getAttribute('transform')"
        ".match(/,(\\d+)/)[1]).sort((a, b) => a - b)"
    )
    assert len(set(heights)) == len(heights)  # one column: no two at the same height
    click(chain, "#fold")
    assert chain.run(SHOWN) == 3
    assert chain.complaints() == []


def test_keys_go_everywhere(chain: Tab) -> None:
    chain.press("n", "n")
    assert chain.run(CHOSEN).startswith("replaced")
    assert "gelu" in chain.run(PANEL)
    chain.press("ArrowDown")
    assert "unchanged nodes" in chain.run(CHOSEN)
    chain.press("Enter")
    assert chain.run(SHOWN) == 22
    chain.press("/", "/")
    assert chain.run("document.activeElement.id") == "search"
    for letter in "gelu":
        chain.press(letter, letter)
    assert chain.run("document.getElementById('count').textContent") == "1 of 41 blocks"
    assert chain.run("document.querySelectorAll('g.b.hit').length") == 1
    chain.press("Escape")
    assert chain.run("document.querySelectorAll('g.b.hit').length") == 0
    assert chain.complaints() == []


def test_filters_and_themes(chain: Tab) -> None:
    click(chain, "button[data-kind=replaced]")
    assert chain.run("document.querySelectorAll('g.b[data-i]:not(.dim)').length") == 1
    colour = "getComputedStyle(document.body).backgroundColor"
    light = chain.run(colour)
    click(chain, "#theme")
    assert chain.run(colour) != light
    chain.call("Emulation.setEmulatedMedia", features=[
        {"name": "prefers-color-scheme", "value": "dark"}
    ])  # fmt: skip
    click(chain, "#theme")
    assert chain.run(colour) == light  # chosen by hand, against the system's wish
    chain.call("Emulation.setEmulatedMedia", features=[])
    assert chain.complaints() == []


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_do_nothing(tab: Tab, tmp_path: Path, name: str) -> None:
    tab.events.clear()
    tab.open(hostile_diff(name).to_html(title=name), tmp_path / "hostile.html")
    for _ in range(3):
        tab.press("n", "n")
    assert tab.run(CHOSEN)
    assert tab.run("document.querySelectorAll('script, img, iframe, a').length") == 1
    assert tab.complaints() == []


def test_foreign_code_would_be_blocked(tab: Tab, tmp_path: Path) -> None:
    """The test of the test: were something let through, the policy stops it, and we see that."""
    tab.events.clear()
    page = diff_models(long_chain(3, 0), long_chain(3, 1)).to_html()
    spoiled = page.replace("</body>", "<script>document.title = 'owned'</script></body>")
    tab.open(spoiled, tmp_path / "spoiled.html")
    assert tab.run("document.title") == "Graph diff"
    assert any("Content Security Policy" in each for each in tab.complaints())


def test_five_thousand_nodes_unfold(tab: Tab, tmp_path: Path) -> None:
    tab.events.clear()
    diff = diff_models(long_chain(5000, 1), long_chain(5000, 2500))
    tab.open(diff.to_html(), tmp_path / "large.html")
    click(tab, "#unfold")
    assert tab.run(SHOWN) == 5001
    assert tab.complaints() == []
