"""How the site is built: `make docs`, with warnings as errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fxquant

project = "fxquant"
author = "the fxquant developers"
version = release = fxquant.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fxquant {release}"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
root = Path(__file__).resolve().parent.parent


def plain_summaries(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Dataclass fields are told in ``Args``: the attributes of their own have nothing to add."""
    if what == "attribute" and not lines:
        lines.append("")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", plain_summaries)
