"""Renders templates into one self-contained file that runs nothing but our own script.

Everything that a user chose is shown with :func:`fxquant.graph.text.shown` and escaped by jinja2;
it is in text and attributes, never in the script or the style, whose hashes are all that the
page's content security policy allows.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fxquant.lazy import lazy_module

if TYPE_CHECKING:
    import jinja2
    import markupsafe
else:
    jinja2 = lazy_module("jinja2")
    markupsafe = lazy_module("markupsafe")

_FOLDER: Final = "templates"


def rendered(name: str, /, **values: Any) -> str:
    """A page, or a part of one.

    Args:
        name: the template.
        values: what it shows; strings are escaped.
    """
    style, script = _read("page.css"), _read("page.js")
    return (
        _environment()
        .get_template(name)
        .render(
            style=_trusted(style),
            script=_trusted(script),
            style_hash=_trusted(_hash(style)),
            script_hash=_trusted(_hash(script)),
            **values,
        )
    )


def saved(page: str, path: str | os.PathLike[str] | None) -> str:
    """Write a page to a file, whole or not at all, if there is a path.

    Args:
        page: the page.
        path: where to; ``None`` writes nothing.

    Returns:
        The page.
    """
    if path is not None:
        target = Path(path)
        handle, name = tempfile.mkstemp(".part", f".{target.name}.", target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(page)
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    return page


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def _read(name: str) -> str:
    folder = importlib.resources.files("fxquant.report.html").joinpath(_FOLDER)
    return folder.joinpath(name).read_text(encoding="utf-8")


def _trusted(text: str) -> Any:
    """Our own style and script, and their hashes, as they are."""
    return markupsafe.Markup(text)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
