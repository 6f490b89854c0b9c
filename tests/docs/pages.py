"""Reads the code blocks of Markdown pages, and runs them as their readers would."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

from fxquant.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "docs").rglob("*.md")
    if "_build" not in page.parts
)
_FENCE = re.compile(
    r"^(?P<fence>```+|:::+)(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=fence)\s*$",
    re.MULTILINE | re.DOTALL,
)
_CAPTION = re.compile(r"^:caption: *(.+)\n\n?", re.MULTILINE)
_NOT_CODE = ("{toctree}", "{include}", "{eval-rst}", "{note}")


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Args:
        language: what stands behind its fence.
        text: what is in it.
        line: where it begins.
        file: the file that it is shown as, if it has a caption.
    """

    language: str
    text: str
    line: int
    file: str = ""


def blocks(page: str) -> list[Block]:
    """The code blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        info, body = fence["info"].strip(), fence["body"]
        line = text[: fence.start()].count("\n") + 2
        if info.startswith(_NOT_CODE):
            continue
        file = ""
        if info.startswith("{code-block}"):
            info = info.removeprefix("{code-block}").strip()
            caption = _CAPTION.match(body)
            if caption is not None:
                file, body = caption[1].strip(), body[caption.end() :]
                line += 2
        found.append(Block(info, body, line, file))
    return found


def run_page(page: str) -> list[str]:
    """Run every block of a page in the current directory; the blocks share one namespace.

    ``python`` is executed, or written to the file its caption names; ``toml`` is written; every
    line of ``sh`` that begins with ``fxquant`` is a command that has to succeed, unless the comment
    before it says ``# exits with N``; ``text`` is what the block before it prints, with ``...``
    for anything.

    Returns:
        The languages of the blocks, in order.

    Raises:
        AssertionError: a block does not do what the page says.
    """
    # A module of its own, because dataclasses look up the one that they are defined in.
    module = types.ModuleType("page")
    sys.modules["page"] = module
    try:
        return _run_blocks(page, module.__dict__)
    finally:
        del sys.modules["page"]


def _run_blocks(page: str, names: dict[str, object]) -> list[str]:
    printed = ""
    ran = []
    for block in blocks(page):
        where = f"{page}:{block.line}"
        ran.append(block.language)
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            printed = _run_python(block, where, names)
        elif block.language == "sh":
            printed = _run_shell(block, where)
        elif block.language == "text":
            assert _alike(block.text, printed), f"{where} shows\n{block.text}\nbut got\n{printed}"
        else:
            raise AssertionError(f"{where}: nothing runs {block.language!r} blocks")
    return ran


def _run_python(block: Block, where: str, names: dict[str, object]) -> str:
    # Empty lines before it, so that tracebacks name the lines of the page.
    code = compile("\n" * (block.line - 1) + block.text, where, "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return out.getvalue()


def _run_shell(block: Block, where: str) -> str:
    wanted, printed = 0, ""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        told = re.fullmatch(r"# exits with (\d+)", line.strip())
        if told is not None:
            wanted = int(told[1])
        if not words:
            continue
        if words[0] in ("pip", "make"):
            continue
        assert words[0] == "fxquant", f"{where}: nothing runs {words[0]!r}"
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(words[1:])
            except SystemExit as stopped:  # help and versions end like this
                code = int(stopped.code or 0)
        assert code == wanted, f"{where}: `{line}` exits with {code}\n{err.getvalue()}"
        printed, wanted = out.getvalue(), 0
    return printed


def _alike(shown: str, printed: str) -> bool:
    """Whether ``printed`` is what a page shows; spaces count as one, ``...`` is anything."""
    parts = [re.escape(" ".join(part.split())) for part in shown.split("...")]
    return re.fullmatch(r"\s*.*\s*".join(parts), " ".join(printed.split()), re.DOTALL) is not None
